"""Find the sites at which a foreign model's residual stream can be read and resumed, without knowing any architecture by name.

1. Blocks: the ModuleList of `num_hidden_layers` modules, each of which the model calls once, in order, on a residual x_btd.
   Changing later tokens must not change earlier logits, because transformers also loads an encoder as a causal model.
2. The point between two sublayers: each block is called alone on its recorded input, with hooks on its submodules, to find a
   `reader`, whose input is the residual at that point, and a `writer`, whose output the block has just added to the residual,
       reader's input = x_btd + c * writer's output       (almost all models; c is 1, or Granite's multiplier), or
       reader's input = writer's output                   (BLOOM: the writer adds the residual itself).
   A pair counts only if resuming there reproduces the block's output: the block's input is set to the reader's input, and the
   writer's output to zero (BLOOM: the reader's input). A block without a pair must be parallel: it adds two independent outputs.

`models.dense` checks that these sites are right for the whole model, by resuming at each.

Shape legend: b batch row, t token, d width of the residual stream, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import combinations, count
from typing import Any

import torch
from torch import Tensor, nn

from bridge.errors import UserError, reraise_as

PROBE_ROWS, PROBE_TOKENS = 4, 8
PARITY_FP32 = 1e-4  # largest absolute logit error of a resumed fp32 model; resuming is exact, so errors seen are 0 to 1e-6


class DenseModelError(UserError):
    """Error for a dense model that cannot be loaded or read as sites: one line that says why and what to do."""


@dataclass(frozen=True)
class Middle:
    """The point between two sublayers of a block; `sums` if the writer itself adds the residual to its output."""

    reader: nn.Module
    writer: nn.Module
    writer_adds_residual: bool


@dataclass(frozen=True)
class DenseBlock:
    """A block and its middle, None if parallel; `returns` is the number of values that it returns, None if it is the residual."""

    module: nn.Module
    middle: Middle | None
    returns: int | None

    def skipped_output(self, args: tuple, kwargs: dict) -> Any:
        """Return the output of a block that does nothing: its input residual, and None for each further value."""
        x = first_tensor(args, kwargs)
        return x if self.returns is None else (x, *[None] * (self.returns - 1))


# --- 1: blocks


@dataclass(frozen=True)
class _WatchedCall:
    """One call of a submodule while its block was watched; input and output are None unless of the residual's size."""

    path: str
    module: nn.Module
    start: int
    end: int
    input_btd: Tensor | None
    output_btd: Tensor | None

    @property
    def depth(self) -> int:
        return self.path.count(".")


@dataclass(frozen=True)
class _BlockCall:
    """One block's input and output; `returns` is the number of values returned, None if the output is the residual."""

    block: nn.Module
    args: tuple
    kwargs: dict
    x_btd: Tensor
    output_btd: Tensor
    returns: int | None

    def rerun(self, x_btd: Tensor, replaced: Mapping[nn.Module, Tensor] | None = None) -> tuple[Tensor, list[_WatchedCall]]:
        """Return the block's output for a residual, with some submodules' outputs replaced, and all submodules called once.

        Recorded tensors are cloned, because some models add in place (Falcon).
        """
        seen: dict[str, list[_WatchedCall]] = {}
        starts: dict[str, tuple[int, Tensor | None]] = {}
        ticks = count()

        def residual(x: Any) -> Tensor | None:
            alike = isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1:] == x_btd.shape[-1:]
            return x.clone().reshape(x_btd.shape) if alike and x.numel() == x_btd.numel() else None

        def begins(path: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
            starts[path] = next(ticks), residual(first_tensor(args, kwargs))

        def ends(path: str, module: nn.Module, _args: tuple, output: Any) -> Any:
            if replaced and module in replaced:
                old = output_tensor(output)
                output = with_output_tensor(output, replaced[module].clone().reshape(old.shape))
            start, input_btd = starts[path]
            seen.setdefault(path, []).append(
                _WatchedCall(path, module, start, next(ticks), input_btd, residual(output_tensor(output)))
            )
            return output

        with ExitStack() as hooks:
            for path, module in self.block.named_modules():
                if path:
                    hooks.enter_context(module.register_forward_pre_hook(partial(begins, path), with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(partial(ends, path)))
            args, kwargs = with_first_tensor(self.args, self.kwargs, x_btd.clone())
            output_btd = output_tensor(self.block(*args, **kwargs)).clone()
        return output_btd, [calls[0] for calls in seen.values() if len(calls) == 1]

    def matches_output(self, output_btd: Tensor) -> bool:
        """Return whether an output equals the block's, to 1/1000 of what the block adds (may be tiny beside the residual)."""
        return largest_magnitude(output_btd - self.output_btd) <= 1e-3 * largest_magnitude(self.output_btd - self.x_btd)


def context_of(model: Any) -> int | None:
    """Return the number of positions of a model; None if its config gives no limit."""
    config = model.config.get_text_config()
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return next((limit for limit in limits if isinstance(limit, int)), None)


def probe_tokens(model: Any, who: str, context: int | None) -> Tensor:
    """Return a few rows of random tokens, none of them special. Raises DenseModelError if the model has no vocabulary."""
    config = model.config.get_text_config()
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise DenseModelError(who, "has no vocabulary, so it is not a language model", "give a decoder-only causal model")
    special = [value for key, value in config.to_dict().items() if key.endswith("token_id")]
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    shape = (PROBE_ROWS, min(PROBE_TOKENS, context or PROBE_TOKENS))
    picked_bt = torch.randint(len(ordinary), shape, generator=torch.Generator().manual_seed(0))
    return ordinary[picked_bt].to(next(model.parameters()).device)


def forward(model: Any, tokens_bt: Tensor, *, last_only: bool = False) -> Tensor:
    """Return logits_btv of the whole causal LM; with `last_only`, those of the last position, as b1v."""
    some = {"logits_to_keep": 1} if last_only and "logits_to_keep" in signature(model.forward).parameters else {}
    logits_btv = model(input_ids=tokens_bt, use_cache=False, return_dict=True, **some).logits
    return logits_btv[:, -1:] if last_only else logits_btv


def watch_blocks(model: Any, who: str, tokens_bt: Tensor) -> tuple[list[_BlockCall], Tensor]:
    """Return each block's call on the probe, and the logits. Raises DenseModelError unless it is a causal LM of one stack."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {path: blocks for path, blocks in model.named_modules() if isinstance(blocks, nn.ModuleList) and len(blocks) == depth}
    calls: dict[nn.Module, list[_BlockCall]] = {block: [] for blocks in lists.values() for block in blocks}

    def watch(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, out = given.pop(block, None), output_tensor(output)
        if x is not None and isinstance(out, Tensor) and out.shape == x.shape and x.shape[:-1] == tokens_bt.shape:
            returns = None if out is output else len(output)
            calls[block].append(_BlockCall(block, args, kwargs, x, out.clone(), returns))

    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:  # runs before the block, which may add in place
        x = first_tensor(args, kwargs)
        if isinstance(x, Tensor):
            given[block] = x.clone()

    given: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for block in calls:
            hooks.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(watch, with_kwargs=True))
        with reraise_as(DenseModelError, who, "does not run on tokens alone", "give a decoder-only causal model"):
            try:
                logits_btv = forward(model, tokens_bt)
            except AttributeError as error:
                raise DenseModelError(who, "gives no logits", "load it with its language-model head (...ForCausalLM)") from error
    if logits_btv.shape[:2] != tokens_bt.shape:
        rule = f"gives logits of shape {tuple(logits_btv.shape)} instead of one row per token"
        raise DenseModelError(who, rule, "give a decoder-only causal model")

    half = tokens_bt.shape[1] // 2
    later_changed_bt = torch.cat([tokens_bt[:, :half], tokens_bt[:, half:].roll(1, 0)], 1)
    effect = largest_magnitude((forward(model, later_changed_bt) - logits_btv)[:, :half])
    if not effect <= 16 * torch.finfo(logits_btv.dtype).eps * largest_magnitude(logits_btv):
        message = f"{who} is not causal: changing later tokens changes earlier logits by up to {effect:.2g}"
        raise DenseModelError(f"{message} (an encoder, such as BERT?)", remedy="give a decoder-only model")

    stacks = [path for path, blocks in lists.items() if all(len(calls[block]) == 1 for block in blocks)]
    stacks = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        found = f"{len(stacks)} such lists ({', '.join(stacks)})" if stacks else "no such list"
        wanted = f"a list of its {depth} blocks, each called once on the residual"
        raise DenseModelError(who, f"cannot be read at site 0: it needs {wanted}, but has {found}")
    return [calls[block][0] for block in lists[stacks[0]]], logits_btv


# --- 2: the point between the sublayers of a block


def find_middles(who: str, calls: Sequence[_BlockCall]) -> tuple[DenseBlock, ...]:
    """Return the blocks with their middles, found from their calls on the probe. Raises DenseModelError at one without a site."""
    blocks: list[DenseBlock] = []
    site, remedy = 0, "give a model of another architecture"
    for index, call in enumerate(calls):
        block = f"cannot be read at site {site}: block {index}"
        with reraise_as(DenseModelError, who, f"{block} does not run alone", remedy):
            output_btd, seen = call.rerun(call.x_btd)
        if not call.matches_output(output_btd):
            raise DenseModelError(who, f"{block} depends on more than its arguments", remedy)
        middle = _find_middle(call, seen)
        if middle is None and not _is_parallel(call, seen):
            what = f"no module of block {index} reads the residual between two sublayers, and these are not in parallel"
            raise DenseModelError(who, f"cannot be read at site {site + 1}: {what}")
        blocks.append(DenseBlock(call.block, middle, call.returns))
        site += 1 if middle is None else 2
    return tuple(blocks)


def _find_middle(call: _BlockCall, seen: Sequence[_WatchedCall]) -> Middle | None:
    """Return the outermost, earliest reader that has a writer with which the block resumes exactly; None if there is none."""
    half = call.x_btd.shape[1] // 2
    earlier_changed_btd = torch.cat([call.x_btd[:, :half].roll(1, 0), call.x_btd[:, half:]], 1)
    changed = {one.path: one.input_btd for one in call.rerun(earlier_changed_btd)[1]}
    for reader in sorted(seen, key=lambda one: (one.depth, one.start)):
        r_btd, changed_btd = reader.input_btd, changed.get(reader.path)
        # a first sublayer mixes tokens; without this check the residual after a norm alone can pass for a site (MiniMax)
        if r_btd is None or changed_btd is None or torch.equal(r_btd[:, half:], changed_btd[:, half:]):
            continue
        for writer in sorted(seen, key=lambda one: (one.depth, -one.end)):
            w_btd = writer.output_btd
            if w_btd is None or writer.end > reader.start:
                continue
            if _is_multiple(r_btd - call.x_btd, w_btd, r_btd):
                written_btd, sums = torch.zeros_like(w_btd), False
            elif torch.equal(r_btd, w_btd):
                written_btd, sums = r_btd, True
            else:
                continue
            if call.matches_output(call.rerun(r_btd, {writer.module: written_btd})[0]):
                return Middle(reader.module, writer.module, sums)
    return None


def _is_parallel(call: _BlockCall, seen: Sequence[_WatchedCall]) -> bool:
    """Return whether the block adds the outputs of two submodules, neither of which changes when the other's is set to zero.

    The sum alone is not enough: outputs of sequential sublayers add up as well if no module is at the point between them.
    """
    wrote = {one.path: one.output_btd for one in sorted(seen, key=lambda one: one.depth) if one.output_btd is not None}
    modules = {one.path: one.module for one in seen}

    def unmoved(path: str, zeroed: str) -> bool:
        _, now = call.rerun(call.x_btd, {modules[zeroed]: torch.zeros_like(wrote[zeroed])})
        return any(one.path == path and one.output_btd is not None and torch.equal(one.output_btd, wrote[path]) for one in now)

    return any(
        _is_multiple(call.output_btd - call.x_btd, wrote[a] + wrote[b], call.output_btd) and unmoved(a, b) and unmoved(b, a)
        for a, b in combinations(wrote, 2)
        if wrote[a].any() and wrote[b].any()
    )


def _is_multiple(difference_btd: Tensor, w_btd: Tensor, sum_btd: Tensor) -> bool:
    """Return whether difference = c * w for some c other than 0, up to the rounding of the sum that it was computed from."""
    difference, w = difference_btd.double(), w_btd.double()
    c = (difference * w).sum() / (w * w).sum()
    rounding = 4 * torch.finfo(sum_btd.dtype).eps * largest_magnitude(sum_btd)
    return bool(c != 0) and largest_magnitude(difference - c * w) <= 1e-3 * largest_magnitude(difference) + rounding


def largest_magnitude(x: Tensor) -> float:
    """Return the largest absolute value; infinity if a value is nan."""
    return x.abs().nan_to_num(torch.inf, torch.inf).max().item()


# --- access for hooks: the first tensor of a module's input or output


def first_tensor(args: tuple, kwargs: dict) -> Any:
    """Return the residual among a module's arguments."""
    return args[0] if args else kwargs.get("hidden_states")


def with_first_tensor(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """Return the arguments with another residual."""
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})


def output_tensor(output: Any) -> Any:
    """Return the residual, or the change to it, in a module's output: the output itself, or the first of several values."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_output_tensor(output: Any, x: Tensor) -> Any:
    """Return an output of the same type in which another tensor replaces the one from `output_tensor`."""
    if isinstance(output, list):
        return [x, *output[1:]]
    return (x, *output[1:]) if isinstance(output, tuple) else x
