"""AbsTopK and the magnitude projection on CUDA, in Triton; they keep the same sets as `cpu`, without sorting.

AbsTopK holds a row in registers and bisects the bit pattern of the threshold: 31 counts, then one cumulative sum for ties. The
projection finds the threshold of every matrix by three histograms of 11, 10 and 10 bits; each counts the entries that share the
digits found so far. Matrices of one size are processed together, and the host never waits for the device.

Triton comes with CUDA builds of torch. If it is missing, `serves` returns False and the torch reference runs.

Shape legend: n rows, w width or entries of a matrix, m matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
with suppress(ImportError):
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

WIDEST = 1 << 15  # a row must fit in a program's registers
DIGITS = (11, 10, 10)  # bits per histogram of a magnitude's 31, highest first
_BLOCK = 4096


def serves(x: Tensor) -> bool:
    """Return whether these kernels run for x: it is on a CUDA device, Triton is installed, and its rows are not too wide."""
    return triton is not None and x.is_cuda and x.shape[-1] <= WIDEST


def abs_top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return x with all but the k largest magnitudes of the last axis zeroed, and the mask; float32 or bfloat16."""
    x = x.contiguous()
    kept, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool, device=x.device)
    width = x.shape[-1]
    block = 1 << (width - 1).bit_length()
    warps = min(16, max(1, block // 512))
    _kernels()["rows"][(x.numel() // width,)](x.detach(), kept, mask, width, k, BLOCK=block, num_warps=warps)
    return kept, mask


def project_(weights: Sequence[Tensor], k: int) -> None:
    """Zero, in each of several float32 tensors of one size, all but the k entries largest in magnitude, in place."""
    flat_mw = torch.stack([weight.detach().view(-1) for weight in weights])
    count, size = flat_mw.shape
    prefix_m1 = torch.zeros(count, 1, dtype=torch.int32, device=flat_mw.device)
    room_m1 = torch.full((count, 1), k, dtype=torch.int64, device=flat_mw.device)
    left = sum(DIGITS)
    for digits in DIGITS:
        left -= digits
        counts = torch.zeros(count, 1 << digits, dtype=torch.int32, device=flat_mw.device)
        _kernels()["histogram"][(-(-size // _BLOCK), count)](flat_mw, counts, prefix_m1, size, left, DIGITS=digits, BLOCK=_BLOCK)
        descending = counts.long().flip(1)
        at_least = descending.cumsum(1)  # from the top
        place_m1 = torch.searchsorted(at_least, room_m1)  # the first bucket, from the top, at which the count reaches room
        room_m1 = room_m1 - at_least.gather(1, place_m1) + descending.gather(1, place_m1)
        prefix_m1 = (prefix_m1 << digits) | ((1 << digits) - 1 - place_m1).int()
    bits_mw = flat_mw.view(torch.int32).bitwise_and(0x7FFFFFFF).clamp_(max=0x7F800000)
    tied_mw = bits_mw == prefix_m1
    flat_mw.masked_fill_(~((bits_mw > prefix_m1) | (tied_mw & (tied_mw.cumsum(1) <= room_m1))), 0)
    torch._foreach_copy_([weight.view(-1) for weight in weights], list(flat_mw))  # pyright: ignore[reportPrivateImportUsage]


@cache
def _kernels() -> dict[str, Any]:
    return {"rows": triton.jit(_rows), "histogram": triton.jit(_histogram)}


def _rows(x, kept, mask, width, k, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row + at, mask=inside, other=0)
    bits = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(inside, tl.minimum(bits, 0x7F800000), -1)
    low = 0
    for bit in range(30, -1, -1):
        probe = low | (1 << bit)
        count = tl.sum((bits >= probe).to(tl.int32), 0)
        low = tl.where(count >= k, probe, low)
    tied = bits == low
    room = k - tl.sum((bits > low).to(tl.int32), 0)
    keep = (bits > low) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    tl.store(kept + row + at, tl.where(keep, value, 0), mask=inside)
    tl.store(mask + row + at, keep, mask=inside)


def _histogram(flat, counts, prefix, size, left, DIGITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1).to(tl.int64)
    bits = tl.load(flat + which * size + at, mask=at < size, other=0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.minimum(bits, 0x7F800000)
    place = bits >> left
    counted = (at < size) & ((place >> DIGITS) == tl.load(prefix + which))
    # entries that are not counted go to a second half of the histogram, which is never read
    bucket = tl.where(counted, place & ((1 << DIGITS) - 1), 1 << DIGITS)
    histogram = tl.histogram(bucket, 2 << DIGITS)
    bins = tl.arange(0, 2 << DIGITS)
    tl.atomic_add(counts + which * (1 << DIGITS) + bins, histogram, mask=bins < (1 << DIGITS))
