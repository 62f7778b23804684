"""Sites where a foreign model's residual stream can be read and resumed, found without knowing any architecture by name.

1. Blocks. The ModuleList of `num_hidden_layers` modules that the model calls once each, in order, on a residual x_btd. Changing
   later tokens must not change earlier logits (an encoder loads as a causal model without complaint).
2. Each block is called alone, on what it was given, with its submodules watched, to find the point between its sublayers:
   a `reader`, whose input is the residual there, and a `writer`, whose output the block has just added to it,
       reader's input = x_btd + c * writer's output       (almost everyone; c is 1, or Granite's multiplier), or
       reader's input = writer's output                   (BLOOM: the writer adds the residual itself).
   A pair counts only if resuming there reproduces the block's output: x_btd becomes the reader's input, the writer's output zero
   (or the reader's input). A block without one must be parallel: it adds two outputs, neither of which reads the other.

Whether the sites so found are right for the whole model is checked in `dense`, by resuming at each.

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

from bridge.errors import UserError, foreign_errors_as

PROBE_ROWS, PROBE_TOKENS = 4, 8
PARITY_FP32 = 1e-4  # largest absolute logit error of a resumed fp32 model; entries are exact, so what is seen is 0 to 1e-6


class DenseModelError(UserError):
    """A dense model that cannot be loaded or read as sites, in one line that says why and what to do."""


@dataclass(frozen=True)
class Middle:
    """The point between two sublayers of a block; `sums` where the writer adds the residual to its output itself."""

    reader: nn.Module
    writer: nn.Module
    sums: bool


@dataclass(frozen=True)
class DenseBlock:
    """A block and the point between its sublayers, None where they are parallel; things it returns, None: the residual itself."""

    module: nn.Module
    middle: Middle | None
    returns: int | None

    def handing_on(self, args: tuple, kwargs: dict) -> Any:
        """The output of a block that does nothing: what it is given, beside nothing."""
        x = first_tensor(args, kwargs)
        return x if self.returns is None else (x, *[None] * (self.returns - 1))


# --- 1: blocks


@dataclass(frozen=True)
class _Seen:
    """One call of a submodule while its block was watched: input and output where they have the residual's size."""

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
class _Call:
    """Input of one block, and its output, one of so many things (None: the output itself)."""

    block: nn.Module
    args: tuple
    kwargs: dict
    x_btd: Tensor
    output_btd: Tensor
    returns: int | None

    def again(self, x_btd: Tensor, replaced: Mapping[nn.Module, Tensor] | None = None) -> tuple[Tensor, list[_Seen]]:
        """The block's output for a residual, some submodules' outputs replaced, and every submodule that was called once.

        What is seen is cloned: some models add in place (Falcon).
        """
        seen: dict[str, list[_Seen]] = {}
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
            seen.setdefault(path, []).append(_Seen(path, module, start, next(ticks), input_btd, residual(output_tensor(output))))
            return output

        with ExitStack() as hooks:
            for path, module in self.block.named_modules():
                if path:
                    hooks.enter_context(module.register_forward_pre_hook(partial(begins, path), with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(partial(ends, path)))
            args, kwargs = with_first_tensor(self.args, self.kwargs, x_btd.clone())
            output_btd = output_tensor(self.block(*args, **kwargs)).clone()
        return output_btd, [calls[0] for calls in seen.values() if len(calls) == 1]

    def gives(self, output_btd: Tensor) -> bool:
        """Whether an output is the block's own, to a thousandth of what the block adds (it may be tiny beside the residual)."""
        return largest(output_btd - self.output_btd) <= 1e-3 * largest(self.output_btd - self.x_btd)


def context_of(model: Any) -> int | None:
    """Number of positions a model has; None where its config gives no limit."""
    config = model.config.get_text_config()
    limits = (getattr(config, key, None) for key in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return next((limit for limit in limits if isinstance(limit, int)), None)


def probe_tokens(model: Any, who: str, context: int | None) -> Tensor:
    """A few rows of random tokens, none of them special."""
    config = model.config.get_text_config()
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise DenseModelError(who, "has no vocabulary, so it is not a language model", "give a decoder-only causal one")
    special = [value for key, value in config.to_dict().items() if key.endswith("token_id")]
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    shape = (PROBE_ROWS, min(PROBE_TOKENS, context or PROBE_TOKENS))
    picked_bt = torch.randint(len(ordinary), shape, generator=torch.Generator().manual_seed(0))
    return ordinary[picked_bt].to(next(model.parameters()).device)


def forward(model: Any, tokens_bt: Tensor, *, last_only: bool = False) -> Tensor:
    """logits_btv of the whole causal LM; with last_only those of the last position, as b1v."""
    some = {"logits_to_keep": 1} if last_only and "logits_to_keep" in signature(model.forward).parameters else {}
    logits_btv = model(input_ids=tokens_bt, use_cache=False, return_dict=True, **some).logits
    return logits_btv[:, -1:] if last_only else logits_btv


def watch_blocks(model: Any, who: str, tokens_bt: Tensor) -> tuple[list[_Call], Tensor]:
    """Every block's call on the probe, and the logits; refuses what is not a causal language model of one stack of blocks."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {path: blocks for path, blocks in model.named_modules() if isinstance(blocks, nn.ModuleList) and len(blocks) == depth}
    calls: dict[nn.Module, list[_Call]] = {block: [] for blocks in lists.values() for block in blocks}

    def watch(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, out = given.pop(block, None), output_tensor(output)
        if x is not None and isinstance(out, Tensor) and out.shape == x.shape and x.shape[:-1] == tokens_bt.shape:
            returns = None if out is output else len(output)
            calls[block].append(_Call(block, args, kwargs, x, out.clone(), returns))

    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:  # before the block, which may add in place
        x = first_tensor(args, kwargs)
        if isinstance(x, Tensor):
            given[block] = x.clone()

    given: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for block in calls:
            hooks.enter_context(block.register_forward_pre_hook(keep, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(watch, with_kwargs=True))
        with foreign_errors_as(DenseModelError, who, "does not run on tokens alone", "give a decoder-only causal model"):
            try:
                logits_btv = forward(model, tokens_bt)
            except AttributeError as error:
                raise DenseModelError(who, "gives no logits", "load it with its language-model head (...ForCausalLM)") from error
    if logits_btv.shape[:2] != tokens_bt.shape:
        raise DenseModelError(who, f"gives logits of shape {tuple(logits_btv.shape)}, not one row per token: not a causal LM")

    half = tokens_bt.shape[1] // 2
    later_changed_bt = torch.cat([tokens_bt[:, :half], tokens_bt[:, half:].roll(1, 0)], 1)
    effect = largest((forward(model, later_changed_bt) - logits_btv)[:, :half])
    if not effect <= 16 * torch.finfo(logits_btv.dtype).eps * largest(logits_btv):
        message = f"{who} is not causal: changing later tokens changes earlier logits by up to {effect:.2g}"
        raise DenseModelError(f"{message} (an encoder, such as BERT?)", remedy="give a decoder-only model")

    stacks = [path for path, blocks in lists.items() if all(len(calls[block]) == 1 for block in blocks)]
    stacks = [path for path in stacks if not any(path.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        found = f"{len(stacks)} such lists ({', '.join(stacks)})" if stacks else "no such list"
        wanted = f"a list of its {depth} blocks, each called once on the residual"
        raise DenseModelError(who, f"cannot be read at site 0: that takes {wanted}; found {found}")
    return [calls[block][0] for block in lists[stacks[0]]], logits_btv


# --- 2: the point between the sublayers of a block


def wire(who: str, calls: Sequence[_Call]) -> tuple[DenseBlock, ...]:
    """The blocks with their middle points, of their calls on the probe. Raises DenseModelError at the first that has no site."""
    blocks: list[DenseBlock] = []
    site, remedy = 0, "this architecture is not supported"
    for index, call in enumerate(calls):
        block = f"cannot be read at site {site}: block {index}"
        with foreign_errors_as(DenseModelError, who, f"{block} does not run alone", remedy):
            output_btd, seen = call.again(call.x_btd)
        if not call.gives(output_btd):
            raise DenseModelError(who, f"{block} depends on more than its arguments", remedy)
        middle = _find_middle(call, seen)
        if middle is None and not _is_parallel(call, seen):
            what = f"no module of block {index} reads the residual between two sublayers, and it is not two sublayers in parallel"
            raise DenseModelError(who, f"cannot be read at site {site + 1}: {what}")
        blocks.append(DenseBlock(call.block, middle, call.returns))
        site += 1 if middle is None else 2
    return tuple(blocks)


def _find_middle(call: _Call, seen: Sequence[_Seen]) -> Middle | None:
    """The outermost, earliest reader that has a writer with which the block resumes exactly."""
    half = call.x_btd.shape[1] // 2
    earlier_changed_btd = torch.cat([call.x_btd[:, :half].roll(1, 0), call.x_btd[:, half:]], 1)
    changed = {one.path: one.input_btd for one in call.again(earlier_changed_btd)[1]}
    for reader in sorted(seen, key=lambda one: (one.depth, one.start)):
        r_btd, changed_btd = reader.input_btd, changed.get(reader.path)
        # a first sublayer mixes tokens: the residual after a norm alone can pass for a site of its own (MiniMax)
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
            if call.gives(call.again(r_btd, {writer.module: written_btd})[0]):
                return Middle(reader.module, writer.module, sums)
    return None


def _is_parallel(call: _Call, seen: Sequence[_Seen]) -> bool:
    """Whether the block adds the outputs of two submodules of which neither changes when the other's is zero.

    That the outputs add up is not enough: so do those of sequential sublayers with no module at the point between them.
    """
    wrote = {one.path: one.output_btd for one in sorted(seen, key=lambda one: one.depth) if one.output_btd is not None}
    modules = {one.path: one.module for one in seen}

    def unmoved(path: str, zeroed: str) -> bool:
        _, now = call.again(call.x_btd, {modules[zeroed]: torch.zeros_like(wrote[zeroed])})
        return any(one.path == path and one.output_btd is not None and torch.equal(one.output_btd, wrote[path]) for one in now)

    return any(
        _is_multiple(call.output_btd - call.x_btd, wrote[a] + wrote[b], call.output_btd) and unmoved(a, b) and unmoved(b, a)
        for a, b in combinations(wrote, 2)
        if wrote[a].any() and wrote[b].any()
    )


def _is_multiple(difference_btd: Tensor, w_btd: Tensor, sum_btd: Tensor) -> bool:
    """Whether difference = c * w for some c, up to the rounding of the sum that the difference was taken from."""
    difference, w = difference_btd.double(), w_btd.double()
    c = (difference * w).sum() / (w * w).sum()
    rounding = 4 * torch.finfo(sum_btd.dtype).eps * largest(sum_btd)
    return bool(c != 0) and largest(difference - c * w) <= 1e-3 * largest(difference) + rounding


def largest(x: Tensor) -> float:
    """Largest absolute value; infinite where a value is not a number."""
    return x.abs().nan_to_num(torch.inf, torch.inf).max().item()


# --- what hooks see: a module's first tensor, in or out


def first_tensor(args: tuple, kwargs: dict) -> Any:
    """The residual among a module's arguments."""
    return args[0] if args else kwargs.get("hidden_states")


def with_first_tensor(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """The arguments with another residual."""
    return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})


def output_tensor(output: Any) -> Any:
    """The residual, or what is written to it, in a module's output: that itself, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_output_tensor(output: Any, x: Tensor) -> Any:
    """The output, of the same kind, with another tensor in that place."""
    if isinstance(output, list):
        return [x, *output[1:]]
    return (x, *output[1:]) if isinstance(output, tuple) else x
