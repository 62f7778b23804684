"""AbsTopK and the magnitude projection: each one name, a torch reference, and a compiled CPU version.

Both keep the k entries that are largest in magnitude, and of entries that tie at the threshold those that come first, so the
set is that of a stable sort. Neither sorts. Per row (AbsTopK) the threshold is bisected on the float's bit pattern, whose order
is the order of magnitudes, until k entries lie at or above it; for a whole matrix (projection) two histograms of 16 bits each
find it in two passes. NaN counts as infinite, so that it is kept and seen rather than hidden.

The compiled version is numba: it needs no compiler on the user's machine, and it is run on torch's own number of threads
without a second OpenMP runtime. On other devices, and for other types than float32 and bfloat16, the reference runs.

Shape legend: n rows, w width.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_FAST: Any = {"nnan", "nsz", "reassoc"}  # lets a count or a maximum be vectorised; NaN is replaced before
_INFINITE_BITS = 0x7F800000


def abs_top_k(x: Tensor, k: int) -> Tensor:
    """Keep the k entries of the last axis that are largest in magnitude and zero the rest; differentiable in x (appendix A.1).

    Raises ValueError unless 1 <= k <= width.
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"AbsTopK keeps {k} of {x.shape[-1]} values; k must lie between 1 and the width")
    if k == x.shape[-1]:
        return x
    return _AbsTopK.apply(x, k)  # type: ignore[no-any-return]


def project_(weight: Tensor, k: int) -> None:
    """Zero all but the k entries of weight that are largest in magnitude, in place and without gradient (appendix A.2)."""
    with torch.no_grad():
        if k >= weight.numel():
            return
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous():
            flat = weight.view(-1).numpy()
            _zero_below(flat, *_magnitude_threshold(flat, k))
        else:
            weight.masked_fill_(~top_k_mask(weight.reshape(1, -1), k).view_as(weight), 0)


def top_k_mask(x: Tensor, k: int) -> Tensor:
    """The reference: a boolean mask of the k entries largest in magnitude along the last axis, first ones first among ties."""
    magnitude = x.detach().abs()
    magnitude = torch.where(magnitude.isnan(), torch.inf, magnitude)
    threshold = magnitude.kthvalue(x.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above = magnitude > threshold
    tied = magnitude == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


class _AbsTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
            kept, mask = _rows_on_cpu(x.contiguous(), k)
        else:
            mask = top_k_mask(x, k)
            kept = torch.where(mask, x, 0)
        ctx.save_for_backward(mask)
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return grad * mask, None


def _rows_on_cpu(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kept, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    width = x.shape[-1]
    bits_type, rows = (torch.int32, _rows32) if x.dtype == torch.float32 else (torch.int16, _rows16)
    bits_nw, kept_nw = (t.view(bits_type).view(-1, width).numpy() for t in (x.detach(), kept))
    mask_nw = mask.view(-1, width).numpy()
    n_rows = bits_nw.shape[0]
    threads = min(torch.get_num_threads(), max(1, n_rows * width // 65536))
    edges = [n_rows * i // threads for i in range(threads + 1)]
    if threads == 1:
        rows(bits_nw, k, kept_nw, mask_nw, 0, n_rows)
    else:
        spans = zip(edges[:-1], edges[1:], strict=True)
        waiting = [_threads().submit(rows, bits_nw, k, kept_nw, mask_nw, start, stop) for start, stop in spans]
        for each in waiting:
            each.result()
    return kept, mask


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="bridge-kernels")


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _row_threshold(magnitude: np.ndarray, k: int) -> tuple[np.float32, int]:
    """The threshold and how many entries equal to it are kept (-1: all of them)."""
    width = magnitude.shape[0]
    largest = np.float32(0)
    for j in range(width):
        largest = max(largest, magnitude[j])
    probe = np.empty(1, np.float32)
    bits = probe.view(np.int32)
    probe[0] = largest
    low, high = np.int64(0), np.int64(bits[0]) + 1  # count(>= low) >= k > count(>= high), as bit patterns
    at_high = np.float32(0)
    while high - low > 1:
        middle = low + (high - low) // 2
        bits[0] = middle
        threshold = probe[0]
        count = np.float32(0)  # a float counter keeps every lane a float; exact below 2**24
        for j in range(width):
            count += np.float32(1) if magnitude[j] >= threshold else np.float32(0)
        if count == k:
            return threshold, -1
        if count > k:
            low = middle
        else:
            high, at_high = middle, count
    bits[0] = low
    return probe[0], k - int(at_high)


@numba.njit(nogil=True, cache=True)
def _keep_row(row: np.ndarray, magnitude: np.ndarray, k: int, kept: np.ndarray, mask: np.ndarray) -> None:
    threshold, room = _row_threshold(magnitude, k)
    if room < 0:
        for j in range(row.shape[0]):
            keep = magnitude[j] >= threshold
            mask[j] = keep
            kept[j] = row[j] if keep else 0
        return
    for j in range(row.shape[0]):
        keep = magnitude[j] > threshold
        if magnitude[j] == threshold and room > 0:
            keep = True
            room -= 1
        mask[j] = keep
        kept[j] = row[j] if keep else 0


@numba.njit(nogil=True, cache=True)
def _rows32(bits_nw: np.ndarray, k: int, kept_nw: np.ndarray, mask_nw: np.ndarray, start: int, stop: int) -> None:
    magnitude = np.empty(bits_nw.shape[1], np.float32)
    magnitude_bits = magnitude.view(np.int32)
    for i in range(start, stop):
        for j in range(magnitude.shape[0]):
            magnitude_bits[j] = min(bits_nw[i, j] & np.int32(0x7FFFFFFF), np.int32(_INFINITE_BITS))
        _keep_row(bits_nw[i], magnitude, k, kept_nw[i], mask_nw[i])


@numba.njit(nogil=True, cache=True)
def _rows16(bits_nw: np.ndarray, k: int, kept_nw: np.ndarray, mask_nw: np.ndarray, start: int, stop: int) -> None:
    magnitude = np.empty(bits_nw.shape[1], np.float32)
    magnitude_bits = magnitude.view(np.int32)  # a bfloat16 is the upper half of a float32
    for i in range(start, stop):
        for j in range(magnitude.shape[0]):
            magnitude_bits[j] = min((np.int32(bits_nw[i, j]) & np.int32(0x7FFF)) << np.int32(16), np.int32(_INFINITE_BITS))
        _keep_row(bits_nw[i], magnitude, k, kept_nw[i], mask_nw[i])


@numba.njit(nogil=True, cache=True)
def _magnitude_threshold(flat: np.ndarray, k: int) -> tuple[int, int]:
    """Bit pattern of the k-th largest magnitude, and how many entries equal to it are kept."""
    bits = flat.view(np.int32)
    histogram = np.zeros(1 << 16, np.int64)
    for j in range(bits.shape[0]):
        histogram[min(bits[j] & 0x7FFFFFFF, _INFINITE_BITS) >> 16] += 1
    room = k
    upper = (1 << 16) - 1
    while histogram[upper] < room:
        room -= histogram[upper]
        upper -= 1
    histogram[:] = 0
    for j in range(bits.shape[0]):
        magnitude = min(bits[j] & 0x7FFFFFFF, _INFINITE_BITS)
        if magnitude >> 16 == upper:
            histogram[magnitude & 0xFFFF] += 1
    lower = (1 << 16) - 1
    while histogram[lower] < room:
        room -= histogram[lower]
        lower -= 1
    return (upper << 16) | lower, room


@numba.njit(nogil=True, cache=True)
def _zero_below(flat: np.ndarray, threshold: int, room: int) -> None:
    bits = flat.view(np.int32)
    for j in range(bits.shape[0]):
        magnitude = min(bits[j] & 0x7FFFFFFF, _INFINITE_BITS)
        if magnitude < threshold:
            flat[j] = 0
        elif magnitude == threshold:
            if room == 0:
                flat[j] = 0
            else:
                room -= 1
