"""AbsTopK, the magnitude projection, ablation, GELU and RMSNorm, one name each: in torch, compiled for a CPU, and for CUDA.

AbsTopK and the projection keep the k entries that are largest in magnitude; of entries that tie at the threshold, the first are
kept. So every device keeps the set of a stable sort, without sorting. NaN counts as infinite, so it is kept and seen, not hidden.
The torch reference runs if there is no other version: for types other than float32 and bfloat16, and on other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.kernels import cpu, cuda, projection

_FAST = (torch.float32, torch.bfloat16)
TOGETHER = 1 << 26  # entries that are projected at once on a GPU: fewer calls, and at most a gigabyte of extra memory


def abs_top_k(x: Tensor, k: int) -> Tensor:
    """Keep the k entries of the last axis that are largest in magnitude and zero the rest; differentiable in x (appendix A.1).

    Raises ValueError unless 1 <= k <= width.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"AbsTopK keeps {k} of {x.shape[-1]} values; k must lie between 1 and the width")
    if k == x.shape[-1]:
        return x
    return _AbsTopK.apply(x, k)  # type: ignore[no-any-return]


def gelu(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, the MLP's nonlinearity; differentiable."""
    dense_storage = x.is_contiguous() or x.transpose(-1, -2).is_contiguous() or x.movedim(-1, 0).is_contiguous()
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() > 1 and dense_storage:
        return _Gelu.apply(x)  # type: ignore[no-any-return]
    return F.gelu(x, approximate="tanh")


def apply_norm(x: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x scale(x), with scale(x) = 1 / sqrt(mean square of the last axis + a constant); differentiable in x."""
    return _Normed.apply(x, scale)  # type: ignore[no-any-return]


def choose(mask: Tensor, x_btn: Tensor, else_n: Tensor) -> Tensor:
    """Return x_btn where a mask (btn, or tn for all rows) is true, else_n of the channel elsewhere; differentiable in x."""
    without_gaps = x_btn.permute(2, 0, 1).is_contiguous() or x_btn.transpose(1, 2).is_contiguous()
    if x_btn.device.type == "cpu" and x_btn.dtype == torch.float32 and cpu.tokens_contiguous(x_btn) and without_gaps:
        return _Choose.apply(mask, x_btn, else_n)  # type: ignore[no-any-return]
    return torch.where(mask, x_btn, else_n.to(x_btn.dtype))


def project_(weights: Sequence[Tensor], k: int, hints: Sequence[float | None] | None = None) -> list[float | None]:
    """Zero all but the k entries of each weight that are largest in magnitude, in place and without gradient (appendix A.2).

    The weights share one size and one device. Returns the thresholds, None for each that was not searched for; passed as `hints`
    of the next call they save time and change nothing else.
    """
    thresholds: list[float | None] = [None] * len(weights)
    if not weights or k >= weights[0].numel():
        return thresholds
    with torch.no_grad():
        plain = all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in weights)
        if weights[0].device.type == "cpu" and plain:
            return [projection.project_(weight, k, hint) for weight, hint in zip(weights, hints or thresholds, strict=True)]
        if plain and cuda.serves(weights[0]):
            together = max(1, TOGETHER // weights[0].numel())
            for start in range(0, len(weights), together):
                cuda.project_(weights[start : start + together], k)
        else:
            for weight in weights:
                weight.masked_fill_(~top_k_mask(weight.reshape(1, -1), k).view_as(weight), 0)
    return thresholds


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """Return the boolean mask of the k entries largest in magnitude along the last axis, the first among ties: the reference."""
    magnitude = x.detach().abs()
    magnitude = torch.where(magnitude.isnan(), torch.inf, magnitude)
    threshold = magnitude.kthvalue(x.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, derivative = cpu.gelu(x)
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (derivative,) = ctx.saved_tensors
        return grad * derivative


class _Normed(torch.autograd.Function):
    """y = x scale and dx = scale (dy - y mean(y dy)): half the passes of the separate steps, in x's own layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        factor = scale(x)
        y = x * factor
        ctx.save_for_backward(y, factor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, factor = ctx.saved_tensors
        return (grad - y * (y * grad).mean(-1, keepdim=True)) * factor, None


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, x_btn: Tensor, else_n: Tensor) -> Tensor:
        kept_btn, mask_btn = cpu.choose(mask.expand(x_btn.shape), x_btn, else_n.float())
        ctx.save_for_backward(mask_btn)
        return kept_btn

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (mask_btn,) = ctx.saved_tensors
        return None, cpu.keep_where(mask_btn, grad), None


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        if x.device.type == "cpu" and x.dtype in _FAST and x.shape[-1] <= cpu.WIDEST:
            kept, mask = cpu.abs_top_k(x, k)
        elif cuda.serves(x) and x.dtype in _FAST:
            kept, mask = cuda.abs_top_k(x, k)
        else:
            mask = top_k_mask(x, k)
            kept = torch.where(mask, x, 0)
        ctx.save_for_backward(mask)
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        if grad.device.type == "cpu" and grad.dtype in _FAST:
            return cpu.keep_where(mask, grad), None
        return torch.where(mask, grad, 0), None
