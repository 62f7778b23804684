"""A Hugging Face causal language model as a ResidualModel: its sites are found generically, and checked before they are used.

Loading has these steps, and each step refuses what the next one would get wrong: files are read (safetensors only, none of their
code), an adapter is merged, sites are found (`site_discovery`), and parity is checked: the model is resumed at every site from
the residual of *another row* and must give that row's logits. (With the row's own residual, an injection that silently does
nothing would pass, and so would a model in which information passes a site outside the residual.)

A run is one forward pass of the whole model, so masks, positions, norms, soft-capping and heads stay the model's own. A row that
enters at a block replaces that block's input. A row that enters between a block's sublayers also cancels what the writer wrote.
A row that enters at the last site replaces the last block's output. What the model computes for a row before its entry is
overwritten; if every row enters after a block, the block passes its input on instead. Zeroing the writer, rather than adding the
difference later, keeps an entry exact in every dtype.

Shape legend: b batch row, t token, d width of the residual stream, v vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bridge.errors import first_line
from bridge.huggingface.adapters import TOKENIZER, adapter_folder, has_adapter, inner_model, merge_adapters, with_adapter
from bridge.huggingface.gguf_file import as_plain_model, find_gguf, loading_options
from bridge.huggingface.identity import Identity, fingerprint_of, identity_of
from bridge.huggingface.live import check_weights, copy_model, unwrap
from bridge.huggingface.prompts import Prompts, load_tokenizer
from bridge.huggingface.site_discovery import (
    PARITY_FP32,
    PROBE_ROWS,
    DenseModelError,
    context_of,
    find_middles,
    forward,
    largest_magnitude,
    probe_tokens,
    watch_blocks,
)
from bridge.models.dense_run import DenseRun, Reached, active_runs, lock_runs
from bridge.models.residual import EMBEDDING, Enter, Trace, check_sites

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of buffers (masks and constants) that earlier versions of transformers saved with a model's weights.
_BUFFER = re.compile(
    r"\b(attn|attention)\.(bias|masked_bias|causal_mask)$|\b(inv_freq|position_ids|embed_positions|embed_positions\.weights)$"
)


@dataclass(frozen=True)
class Parity:
    """Exactness of resuming a model: the largest absolute logit error per site, and the tolerance for it."""

    errors: tuple[float, ...]
    tolerance: float

    @property
    def largest(self) -> float:
        """Largest absolute logit error over all sites."""
        return max(self.errors)


class DenseModel:
    """A frozen causal LM as a ResidualModel, made by `load_dense`; the constructor finds its sites and checks them.

    It is not an nn.Module, so that a module that holds one neither trains nor saves it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        revision: str | None,
        *,
        live: bool = False,
        damage: str = "",
    ) -> None:
        self.model, self.tokenizer, self.name, self.revision, self.live = model, tokenizer, name, revision, live
        who = f"model {name!r}"
        self.context = context_of(model)
        # parity tests the wiring, not a caller's autocast; probing does not change a caller's random state
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            tokens_bt = probe_tokens(model, who, self.context)
            calls, logits_btv = watch_blocks(model, who, tokens_bt)
            self.width, self.vocabulary = calls[0].x_btd.shape[-1], logits_btv.shape[-1]
            rows = cast(Any, model.get_input_embeddings()).weight.shape[0]
            self.prompts = Prompts(tokenizer, min(rows, self.vocabulary), name=name, damage=damage)
            self.blocks = find_middles(who, calls)
            kinds = (("parallel",) if block.middle is None else ("attn", "mlp") for block in self.blocks)
            self.sublayers: tuple[str, ...] = tuple(kind for block in kinds for kind in block)
            self._skips_blocks = False
            self.parity = _check_parity(self, who, tokens_bt, logits_btv)
            self._skips_blocks = _can_skip_blocks(self, tokens_bt, self.parity.tolerance)

    @property
    def n_sites(self) -> int:
        """Number of sites: sublayers + 1."""
        return len(self.sublayers) + 1

    @property
    def readers(self) -> tuple[str, ...]:
        """Kind of sublayer that reads at each site; at the last site, the unembedding."""
        return (*self.sublayers, "unembed")

    @property
    def device(self) -> torch.device:
        """Device that the model takes its tokens on."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> DenseModel:
        """Move the model's weights to a device, in place."""
        nn.Module.to(self.model, device)
        return self

    def run(self, tokens_bt: Tensor, enter: Enter | None = None, *, last_only: bool = False) -> Trace:
        """Run a batch; rows may enter at any site with their own residual, through which gradients flow.

        The trace has the residual of every row at every site; before a row's entry it is computed from the row's tokens. If every
        row enters after a block, the block's sites have no rows. With last_only the logits are those of the last position (b1v).
        """
        with self._hooked_run(tokens_bt, enter) as run:
            logits_btv = forward(self.model, tokens_bt, last_only=last_only)
        return Trace(self.leaves(logits_btv), self._leave(run.trace(self.n_sites)))

    def residuals(self, tokens_bt: Tensor, until: int, enter: Enter | None = None) -> tuple[Tensor, ...]:
        """Return x_btd at every site up to and including `until`, as `run` gives them; the model stops there."""
        with self._hooked_run(tokens_bt, enter, until) as run, suppress(Reached):
            forward(self.model, tokens_bt)
        return self._leave(run.trace(until + 1))

    def leaves(self, x: Tensor) -> Tensor:
        """Return a tensor as it leaves the model: on the device of the tokens, in float32 if the weights have half precision.

        A residual that enters is cast at its entry (`DenseRun.replace_entering_rows`); one that left the model enters again
        unchanged. So code outside a dense model need not know its precision, nor that it may be spread over devices.
        """
        half = self.dtype.itemsize < torch.float32.itemsize
        return x.to(self.device, torch.float32 if half else x.dtype)

    def _leave(self, residuals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return residuals as they leave; one that requires gradients stays as it is, because its gradient may be asked for."""
        return tuple(x_btd if x_btd.requires_grad else self.leaves(x_btd) for x_btd in residuals)

    def fingerprint(self) -> str:
        """Return 64 hex digits of the current weights and configuration: equal fingerprints mean equal models."""
        return fingerprint_of(self.model)

    def identity(self) -> Identity:
        """Return the identity of this model as it is now: its digests, and facts that tell how another model differs."""
        with lock_runs():
            return identity_of(self.model, self.context)

    def found_at(self, adapter: str | None = None) -> str | None:
        """Return the path that this model loads from, an adapter merged: its name, or a live model's `name_or_path`.

        Returns None if a live model has no path, or differs from the model there because it was made or changed in memory.
        """
        where = getattr(self.model.config, "_name_or_path", None) if self.live else self.name
        if not self.live or not where:
            return where or None
        try:
            there = load_dense(where, adapter=adapter, dtype=self.dtype)
        except DenseModelError:
            return None
        return where if self.identity().difference(there.identity()) is None else None

    @contextmanager
    def _hooked_run(self, tokens_bt: Tensor, enter: Enter | None, until: int | None = None) -> Iterator[DenseRun]:
        """Check a batch and yield its run, with the run's hooks on the model for as long as the context lasts."""
        if self.context is not None and tokens_bt.shape[1] > self.context:
            raise ValueError(f"{tokens_bt.shape[1]} tokens are more than the {self.context} positions that {self.name} has")
        if enter is not None:
            check_sites(enter, self.n_sites)
            wanted = (*tokens_bt.shape, self.width)
            if tuple(enter.x_btd.shape) != wanted:
                given = f"{len(enter.site_b)} sites and residuals of shape {tuple(enter.x_btd.shape)}"
                raise ValueError(
                    f"{given} cannot enter a run whose residual has shape {wanted}; each row needs one site and one residual"
                )
        run, site = DenseRun(enter, self.n_sites, tokens_bt.device, until, skips_blocks=self._skips_blocks), 0
        with lock_runs(), ExitStack() as hooks:
            for block in self.blocks:
                middle, next_site = site + 1, site + (1 if block.middle is None else 2)
                if next_site <= run.first:
                    hooks.enter_context(run.skip_block(block))
                else:
                    before = partial(run.before_block, site, block.middle is not None)
                    hooks.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))
                    if block.middle is not None:
                        if run.has_entering_rows(middle):
                            after = partial(run.after_writer, middle, block.middle.writer_adds_residual)
                            hooks.enter_context(block.middle.writer.register_forward_hook(after))
                        reads = partial(run.before_reader, middle)
                        hooks.enter_context(block.middle.reader.register_forward_pre_hook(reads, with_kwargs=True))
                site = next_site
            last = partial(run.after_last, site)
            hooks.enter_context(self.blocks[-1].module.register_forward_hook(last))
            active_runs.append(run)
            hooks.callback(active_runs.pop)
            yield run


def load_dense(
    model: str | Path | PreTrainedModel | PeftModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    device_map: str | dict[str, Any] | None = None,
) -> DenseModel:
    """Load a causal LM as a DenseModel: a hub id, a folder, a .gguf file, or a live PreTrainedModel (or PeftModel).

    A live model is left exactly as it is, mode, gradients and hooks included: a frozen twin runs, which shares its weights and
    has no wrapper of torch.compile or DataParallel (`dtype`, `device_map` and `revision` do not apply; the device is the model's
    own unless given). If LoRA weights are merged, from `adapter` or a live PeftModel, the twin is a copy with its own weights.
    With a `device_map` of transformers ("auto", or a device by module) the model is spread over devices, which must hold all of
    it. Raises DenseModelError.
    """
    named = isinstance(model, (str, Path))
    if named:
        name = str(model)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            rule = "cannot stay on a disk: bridge reads all of its weights"
            raise DenseModelError(f"model {name!r}", rule, "give a ‹device_map› of devices that hold all of it")
        loaded, unused = _from_pretrained(name, revision, dtype, device_map)
        with _quiet():
            found = load_tokenizer(name, revision)  # the tokenizer, or why there is none
        check_weights(loaded, f"model {name!r}", spread=device_map is not None)
    else:
        model = unwrap(model)
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise DenseModelError(f"a {type(model).__name__}", "is not a model", "give a hub id, a folder or a PreTrainedModel")
        check_weights(model, f"model {type(model).__name__!r}")
        name, found, unused = type(inner_model(model)).__name__, (None, ""), None
        loaded = copy_model(model, own_weights=adapter is not None or has_adapter(model))
    if inner_model(loaded).config.is_encoder_decoder:
        raise DenseModelError(f"model {name!r}", "is an encoder-decoder model", "give a decoder-only causal language model")
    if has_adapter(loaded):
        loaded = merge_adapters(loaded, "its adapter", name)
    if adapter is not None:
        folder = adapter_folder(str(adapter))
        if (folder / TOKENIZER).is_file():
            with _quiet():
                found = load_tokenizer(str(folder))
        loaded = with_adapter(loaded, folder, str(adapter), name)
    if (named or device is not None) and (device_map is None or not named):
        loaded.to(device or "cpu")
    loaded.eval().requires_grad_(False)
    on_hub = named and not Path(name).exists()
    revision = getattr(loaded.config, "_commit_hash", None) if on_hub else None
    found, damage = found if tokenizer is None else (tokenizer, "")
    dense = DenseModel(loaded, found, name, revision, live=not named, damage=damage)
    if unused:  # raised last, because an encoder-decoder model has a clearer error above
        raise unused
    return dense


def _from_pretrained(
    name: str, revision: str | None, dtype: torch.dtype, device_map: str | dict[str, Any] | None
) -> tuple[Any, DenseModelError | None]:
    """Return the model of a hub id, a folder or a .gguf file, and an error if it does not use all weights in its files."""
    from transformers import AutoModelForCausalLM

    who, folder = f"model {name!r}", Path(name)
    is_adapter = DenseModelError(who, "is an adapter", "give the model that it was trained on, and this as the adapter")
    where, file = find_gguf(name) or (name, None)
    if file is None and folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise is_adapter
        if not (folder / "config.json").is_file():
            raise DenseModelError(who, "has no config.json", "give a folder that save_pretrained wrote")
        if not any(folder.glob("*.safetensors")):
            rule = "has no *.safetensors (other weight files can run code)"
            raise DenseModelError(who, rule, "convert its weights with save_pretrained")
    elif file is None and folder.is_file():
        raise DenseModelError(who, "is a file", "give the folder in Hugging Face format, with config.json and *.safetensors")
    with _quiet(), redirect_stderr(StringIO()) if file is not None else nullcontext():  # a progress bar with no other switch
        try:
            both: Any = AutoModelForCausalLM.from_pretrained(
                where, revision=revision, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **({} if file is None else loading_options(file)),
            )  # fmt: skip
            model, info = both
        except Exception as error:  # any fault in files that others wrote gets one line
            raise _why_not_loaded(name, who, error) from error
        if has_adapter(model):  # as of a hub id
            raise is_adapter
        unused = _unused_weights(who, info)
        return model if file is None else as_plain_model(model, who, where, file, revision), unused


def _unused_weights(who: str, info: dict[str, Any]) -> DenseModelError | None:
    """Return an error if the files hold weights that are not used, otherwise None. Raises DenseModelError if they lack some."""
    for key, *(found, wanted) in sorted(info["mismatched_keys"]):
        sizes = f"{key} of shape {tuple(found)}, but its config.json asks for {tuple(wanted)}"
        many = len(info["mismatched_keys"])
        raise DenseModelError(who, f"has {sizes} ({many} such)", "give the config.json that its weights were saved with")
    unused = sorted(key for key in info["unexpected_keys"] if not _BUFFER.search(key))
    if missing := sorted(info["missing_keys"]):
        others = f"; its file has {len(unused)} under other names, such as {unused[0]}" if unused else ""
        rule = f"holds no weights for {missing[0]} ({len(missing)} missing{others}): not a complete causal LM"
        raise DenseModelError(who, rule)
    if not unused:
        return None
    remedy = "fix config.json, or remove these weights by saving the model again with save_pretrained of transformers"
    return DenseModelError(who, f"has weights that its config.json does not use: {unused[0]} ({len(unused)} such)", remedy)


def _why_not_loaded(name: str, who: str, error: Exception) -> DenseModelError:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        rule = "needs code from its own repository, which is not run"
        return DenseModelError(who, rule, "give a model whose architecture is part of transformers")
    if "Unrecognized configuration class" in reason:
        rule = "is not a causal language model (transformers has no causal head for its type)"
        return DenseModelError(who, rule, "give a decoder-only model")
    if "CONVERSION" in reason:  # the text refers to a report that is not printed
        rule = "has experts whose weights do not fit together"
        return DenseModelError(who, rule, "check that its files are complete and that config.json belongs to them")
    if Path(name).is_dir():
        return DenseModelError(who, f"cannot be loaded: {reason}")
    if "couldn't connect" in reason or "offline" in reason.lower():
        rule = "is neither a folder here nor in the cache, and the Hugging Face hub cannot be reached"
        return DenseModelError(who, rule, "give a folder")
    if "Repo id must" in reason or "is not a local folder" in reason:
        rule = "is neither a folder here nor a model on the Hugging Face hub"
        return DenseModelError(who, rule, "give a folder or a hub id")
    return DenseModelError(who, f"cannot be loaded from the Hugging Face hub: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports: their content is checked here, and reported in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_parity(dense: DenseModel, who: str, tokens_bt: Tensor, logits_btv: Tensor) -> Parity:
    """Resume at every site from another row's residual, a few sites in one batch, whose first row starts from its tokens."""
    plain = dense.run(tokens_bt)
    eps = torch.finfo(logits_btv.dtype).eps
    tolerance = (
        PARITY_FP32 if eps < 1e-6 else 8 * eps * largest_magnitude(logits_btv)
    )  # half precision: a few roundings of a logit
    if not (error := largest_magnitude(plain.logits_btv - logits_btv)) <= tolerance:
        raise DenseModelError(who, f"gives different logits when its sites are recorded: off by up to {error:.2g}")
    errors: list[float] = []
    for first in range(0, dense.n_sites, PROBE_ROWS - 1):
        sites = [*range(first, min(first + PROBE_ROWS - 1, dense.n_sites))]
        site_b = torch.tensor([EMBEDDING, *sites, *[EMBEDDING] * (PROBE_ROWS - 1 - len(sites))])
        donor_b = torch.where(site_b == EMBEDDING, 0, -1) + torch.arange(PROBE_ROWS)  # the row whose logits each should give
        x_btd = torch.stack([plain.residuals[site][row] for site, row in zip(site_b.tolist(), donor_b.tolist(), strict=True)])
        error_btv = dense.run(tokens_bt, Enter(site_b, x_btd)).logits_btv - logits_btv[donor_b]
        bystander = largest_magnitude(error_btv[site_b == EMBEDDING])
        errors += [max(bystander, largest_magnitude(error_tv)) for error_tv in error_btv[site_b != EMBEDDING]]
    for site, error in enumerate(errors):
        if not error <= tolerance:
            reader = dense.sublayers[site] if site < len(dense.sublayers) else "unembedding"
            message = f"{who} fails the parity check at site {site} ({reader}): logits off by {error:.2g}"
            raise DenseModelError(
                f"{message} (tolerance {tolerance:.2g})",
                remedy="choose another model: in this one information also passes that site outside the residual",
            )
    return Parity(tuple(errors), tolerance)


def _can_skip_blocks(dense: DenseModel, tokens_bt: Tensor, tolerance: float) -> bool:
    """Return whether blocks can be skipped if every row enters after them; tested at the last site, and half way there."""
    plain = dense.run(tokens_bt)
    dense._skips_blocks = True
    for site in (dense.n_sites // 2, dense.n_sites - 1):
        try:
            logits_btv = dense.run(tokens_bt, Enter.at(site, plain.residuals[site])).logits_btv
        except (AttributeError, TypeError, IndexError, KeyError, RuntimeError):  # the model needs its blocks run
            return False
        if not largest_magnitude(logits_btv - plain.logits_btv) <= tolerance:
            return False
    return True
