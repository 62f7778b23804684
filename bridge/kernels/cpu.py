"""AbsTopK, gates and GELU on a CPU, compiled by numba: thresholds are found by search, without sorting.

A float's bit pattern without its sign orders like its magnitude. AbsTopK first searches the upper half of that pattern, 32
entries per instruction: it starts at the neighbour's threshold, takes growing steps until the k-th largest is enclosed, and then
bisects. Entries that tie in the upper half (a few) are decided by the lower half; if they tie there too, the first are kept.

There are two layouts. Rows: the width is contiguous, and one row is counted at a time. Lanes: the tokens are contiguous (storage
b n t, as the sparse products need it), and 32 tokens are counted at a time, each in its own lane.

Shape legend: b batch row, t token, n channels, l lane.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.kernels.lanes import (
    LANES,
    compiled,
    count_lanes,
    count_row,
    equal_lanes,
    gelus,
    keep_words,
    lowest_bit,
    upper_halves,
    write_kept,
)

TOP = 0x7F80  # upper half of infinity, the largest magnitude
INFINITY_BITS = 0x7F800000
WIDEST = 32767  # because a lane's count is a half word


def run_in_parallel(task: Callable[[int, int], None], count: int, elements: int) -> None:
    """Run task(start, stop) over `count` items, on at most torch's number of threads, each with at least 65,536 `elements`."""
    threads = max(1, min(torch.get_num_threads(), count, elements // 65536))
    if threads == 1:
        task(0, count)
        return
    edges = [count * i // threads for i in range(threads + 1)]
    waiting = [_threads().submit(task, start, stop) for start, stop in zip(edges[1:-1], edges[2:], strict=True)]
    task(edges[0], edges[1])
    for each in waiting:
        each.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="bridge-kernels")


@cache
def reuse_memory() -> bool:
    """Make glibc, if it allocates, keep freed memory for the next tensor; return whether that took effect.

    By default every tensor of a few megabytes is mapped anew, and the page faults take longer than the arithmetic.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    threshold, trim = -3, -1
    return bool(mallopt(threshold, 1 << 30)) and bool(mallopt(trim, 2**31 - 1))


def tokens_contiguous(x: Tensor) -> bool:
    """Return whether x_btn is stored with tokens innermost, as the sparse products store it."""
    if x.dim() != 3 or x.shape[2] <= 1:
        return False
    if x.shape[1] == 1:  # rows of one token are laid end to end
        return x.shape[0] > 1 and x.stride(0) == 1 and x.stride(2) >= x.shape[0]
    return x.stride(1) == 1 and x.stride(2) >= x.shape[1]


def abs_top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return x with all but the k largest magnitudes of the last axis zeroed, and the mask: float32 or bfloat16, x's layout."""
    if tokens_contiguous(x):
        b, t, n = x.shape
        end_to_end = x.permute(2, 0, 1).is_contiguous()  # as `tokens_innermost` stores short rows
        stored = x.permute(2, 0, 1) if end_to_end else x.transpose(1, 2).contiguous()
        rows, tokens, back = (1, b * t, (1, 2, 0)) if end_to_end else (b, t, (0, 2, 1))
        kept, mask = torch.empty_like(stored), torch.empty(stored.shape, dtype=torch.bool)
        args, wide = _flat(stored, kept, mask, words=True), x.dtype == torch.float32

        def some(start: int, stop: int) -> None:
            top_k_lanes(*args, n, tokens, k, wide, start, stop, np.zeros(LANES, np.int16))

        run_in_parallel(some, rows * -(-tokens // LANES), x.numel())
        return kept.permute(back), mask.permute(back)
    x = x.contiguous()
    kept, mask = torch.empty_like(x), torch.empty(x.shape, dtype=torch.bool)
    args, width = _flat(x, kept, mask, words=True), x.shape[-1]
    kernel = _top_k_rows32 if x.dtype == torch.float32 else _top_k_rows16
    run_in_parallel(lambda start, stop: kernel(*args, width, k, start, stop), x.numel() // width, x.numel())
    return kept, mask


def keep_where(mask: Tensor, x: Tensor) -> Tensor:
    """Return x where the mask is true and zero elsewhere, in the mask's layout: the backward pass of AbsTopK."""
    if mask.stride() != x.stride():
        x = torch.empty_strided(mask.shape, mask.stride(), dtype=x.dtype).copy_(x)
    kept = torch.empty_strided(mask.shape, mask.stride(), dtype=x.dtype)
    words, out, mask_words = _flat(x, kept, mask, words=True)
    run_in_parallel(lambda start, stop: _keep_where(words, out, mask_words, start, stop), len(words), len(words))
    return kept


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU (tanh form) of a float32 tensor without gaps, and its derivative, both in x's layout."""
    y, derivative = (torch.empty_strided(x.shape, x.stride()) for _ in range(2))
    values, out, derivatives = _flat(x, y, derivative)
    run_in_parallel(lambda start, stop: _gelu(values, out, derivatives, start, stop), x.numel(), 4 * x.numel())
    return y, derivative


def choose(mask_btn: Tensor, x_btn: Tensor, else_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return x where the mask is true, else_n elsewhere, and the mask, both in x's layout; x is float32, without gaps."""
    b, t, n = x_btn.shape
    if x_btn.permute(2, 0, 1).is_contiguous():  # short rows, end to end
        inside = mask_btn.reshape(b * t, n).t()
        lines, length = n, b * t
    else:
        inside = mask_btn.transpose(1, 2)
        lines, length = b * n, t
    mask = inside.contiguous().view(-1)
    kept = torch.empty_strided(x_btn.shape, x_btn.stride())
    values, out = _flat(x_btn, kept)
    others = else_n.detach().contiguous().numpy()
    words = mask.numpy()
    run_in_parallel(lambda start, stop: _choose(values, words, others, out, length, start, stop), lines, x_btn.numel())
    return kept, mask.as_strided(x_btn.shape, x_btn.stride())


def _flat(*tensors: Tensor, words: bool = False) -> tuple[Any, ...]:
    """Return the values of tensors without gaps as flat arrays in storage order; with words, floats as integers of their size."""
    types = {torch.float32: torch.int32, torch.bfloat16: torch.int16} if words else {}
    flat = (tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors)
    return tuple(each.view(types.get(each.dtype, each.dtype)).numpy() for each in flat)


# -- rows ---------------------------------------------------------------------------------------------------------------


@compiled
def _search_row(half: np.ndarray, vectors: int, width: int, k: int, near: int) -> tuple[int, int, int]:
    """Return (u, above, least): the largest u for which least = count(>= u) is at least k, and above = count(>= u + 1), below k.

    If a count(>= p) is exactly k, the search ends there with u = p - 1, above = k and least = width.
    """
    low, at_low = 0, width
    high, at_high = TOP + 1, 0
    step, probe = 8, near
    while high - low > 1:
        if not low < probe < high:
            probe = low + (high - low) // 2
        count = count_row(half, 0, vectors, probe)
        if count == k:
            return probe - 1, k, width
        if count > k:
            low, at_low = probe, count
            probe = probe + step if high == TOP + 1 else low + (high - low) // 2
        else:
            high, at_high = probe, count
            probe = probe - step if low == 0 else low + (high - low) // 2
        step *= 4
    return low, at_high, at_low


@compiled
def _decide(lower: np.ndarray, count: int, need: int) -> tuple[int, int]:
    """Return the need-th largest of `count` lower halves, and how many entries equal to it to keep (-1: all)."""
    low, high, at_low, at_high = 0, 1 << 16, count, 0
    while high - low > 1:
        middle = (low + high) // 2
        hits = 0
        for i in range(count):
            hits += lower[i] >= middle
        if hits >= need:
            low, at_low = middle, hits
        else:
            high, at_high = middle, hits
    return low, -1 if at_low == need else need - at_high


@compiled
def _top_k_rows32(x: np.ndarray, kept: np.ndarray, mask: np.ndarray, width: int, k: int, start: int, stop: int) -> None:
    vectors = (width + LANES - 1) // LANES
    half = np.zeros(vectors * LANES, np.int16)
    lower, limits = np.empty(width, np.int32), np.empty(LANES, np.int32)
    wanted = np.empty(LANES, np.int16)
    near = 0
    for row in range(start * width, stop * width, width):
        upper_halves(x, row, half, 0, width // LANES)
        for j in range(width // LANES * LANES, width):
            half[j] = min(x[row + j] & 0x7FFFFFFF, INFINITY_BITS) >> 16
        u, above, least = _search_row(half, vectors, width, k, near)
        near = u
        threshold, room = (u + 1) << 16, -1
        if above < k and least == k:
            threshold = u << 16
        elif above < k:
            wanted[:] = u
            count = 0
            for block in range(vectors):
                bits = equal_lanes(half, block * LANES, wanted)
                while bits:
                    j = block * LANES + lowest_bit(bits)
                    bits &= bits - 1
                    if j < width:
                        lower[count] = min(x[row + j] & 0x7FFFFFFF, INFINITY_BITS) & 0xFFFF
                        count += 1
            v, room = _decide(lower, count, k - above)
            threshold = (u << 16) | v
        done = row
        if room < 0:
            limits[:] = threshold
            while done + LANES <= row + width:
                write_kept(x, done, limits, kept, mask)
                done += LANES
        for j in range(done, row + width):
            word = min(x[j] & 0x7FFFFFFF, INFINITY_BITS)
            keep = word >= threshold
            if word == threshold and room >= 0:
                keep = room > 0
                room -= keep
            mask[j] = keep
            kept[j] = x[j] if keep else 0


@compiled
def _top_k_rows16(x: np.ndarray, kept: np.ndarray, mask: np.ndarray, width: int, k: int, start: int, stop: int) -> None:
    vectors = (width + LANES - 1) // LANES
    half, limits = np.zeros(vectors * LANES, np.int16), np.empty(LANES, np.int16)
    near = 0
    for row in range(start * width, stop * width, width):
        upper_halves(x, row, half, 0, width // LANES)
        for j in range(width // LANES * LANES, width):
            half[j] = min(x[row + j] & 0x7FFF, TOP)
        u, above, least = _search_row(half, vectors, width, k, near)
        near = u
        threshold, room = (u + 1, -1) if above == k else (u, -1) if least == k else (u, k - above)
        limits[:] = threshold
        done = row
        while done + LANES <= row + width:
            write_kept(x, done, limits, kept, mask)
            done += LANES
        for j in range(done, row + width):
            mask[j] = half[j - row] >= threshold
            kept[j] = x[j] if mask[j] else 0
        block = vectors if room < 0 else 0
        while block < vectors:  # of the entries that tie at the threshold, keep the first `room`
            bits = equal_lanes(half, block * LANES, limits)
            while bits:
                j = block * LANES + lowest_bit(bits)
                bits &= bits - 1
                if room == 0 and j < width:
                    mask[row + j], kept[row + j] = False, 0
                room -= room > 0
            block += 1


@compiled
def _keep_where(x: np.ndarray, kept: np.ndarray, mask: np.ndarray, start: int, stop: int) -> None:
    done = start
    while done + LANES <= stop:
        keep_words(x, done, mask, kept)
        done += LANES
    for i in range(done, stop):
        kept[i] = x[i] if mask[i] else 0


@compiled
def _choose(x: np.ndarray, mask: np.ndarray, other: np.ndarray, kept: np.ndarray, length: int, start: int, stop: int) -> None:
    for line in range(start, stop):
        otherwise, here = other[line % other.shape[0]], slice(line * length, (line + 1) * length)
        x_line, mask_line, kept_line = x[here], mask[here], kept[here]
        for i in range(length):
            kept_line[i] = x_line[i] if mask_line[i] else otherwise


@compiled
def _gelu(x: np.ndarray, y: np.ndarray, derivative: np.ndarray, start: int, stop: int) -> None:
    whole = (stop - start) // 16
    gelus(x, start, whole, y, derivative)
    rest = stop - start - 16 * whole
    if rest:
        last = np.zeros((3, 16), np.float32)
        last[0, :rest] = x[stop - rest : stop]
        gelus(last[0], 0, 1, last[1], last[2])
        y[stop - rest : stop] = last[1, :rest]
        derivative[stop - rest : stop] = last[2, :rest]


# -- lanes --------------------------------------------------------------------------------------------------------------


@compiled
def _search_lanes(half: np.ndarray, width: int, k: int, low: np.ndarray, above: np.ndarray, least: np.ndarray) -> None:
    """Run `_search_row` for every lane, giving u as low[l], above[l] and least[l]; on entry `low` holds the neighbour's u."""
    probe, count = np.empty(LANES, np.int16), np.empty(LANES, np.int16)
    high = np.empty(LANES, np.int16)
    step = 8
    for lane in range(LANES):
        probe[lane] = max(1, low[lane])
        low[lane], least[lane] = 0, width
        high[lane], above[lane] = TOP + 1, 0
    while True:
        count_lanes(half, 0, width, probe, count)
        open_lanes = 0
        for lane in range(LANES):
            if high[lane] - low[lane] <= 1:
                continue
            if count[lane] == k:  # done: every entry from probe on is kept
                low[lane], high[lane] = probe[lane] - 1, probe[lane]
                above[lane], least[lane] = k, width
                continue
            if count[lane] > k:
                low[lane], least[lane] = probe[lane], count[lane]
            else:
                high[lane], above[lane] = probe[lane], count[lane]
            if high[lane] == TOP + 1:
                target = low[lane] + step
            elif low[lane] == 0:
                target = high[lane] - step
            else:
                target = 0
            if not low[lane] < target < high[lane]:
                target = low[lane] + (high[lane] - low[lane]) // 2
            probe[lane] = target
            open_lanes += high[lane] - low[lane] > 1
        step *= 4
        if not open_lanes:
            return


@compiled
def top_k_lanes(
    x: np.ndarray, kept: np.ndarray, mask: np.ndarray, width: int, tokens: int, k: int, wide: bool, start: int, stop: int,
    low: np.ndarray,
) -> None:  # fmt: skip
    """Apply AbsTopK to tiles start to stop, of 32 tokens each; bit patterns are stored n x tokens, row by row; kept may be x.

    On entry, low holds where each lane's search begins; on return, u (`_search_row`) of each lane in the last tile.
    """
    per_row = (tokens + LANES - 1) // LANES
    half = np.zeros(width * LANES, np.int16)
    above, least = np.empty(LANES, np.int16), np.empty(LANES, np.int16)
    limit, room, narrow = np.empty(LANES, np.int32), np.empty(LANES, np.int32), np.empty(LANES, np.int16)
    lower, found = np.empty((LANES, width), np.int32), np.empty(LANES, np.int32)
    for tile in range(start, stop):
        b, t = tile // per_row, tile % per_row * LANES
        lanes = min(LANES, tokens - t)
        for j in range(width):
            if lanes == LANES:
                upper_halves(x, (b * width + j) * tokens + t, half, j * LANES, 1)
            else:
                for lane in range(lanes):
                    word = x[(b * width + j) * tokens + t + lane]
                    half[j * LANES + lane] = min(word & 0x7FFFFFFF, INFINITY_BITS) >> 16 if wide else min(word & 0x7FFF, TOP)
        _search_lanes(half, width, k, low, above, least)
        undecided = 0
        for lane in range(LANES):
            room[lane], found[lane] = -1, 0
            limit[lane] = low[lane] + 1
            if above[lane] < k and least[lane] == k:
                limit[lane] = low[lane]
            elif above[lane] < k:
                limit[lane], room[lane] = low[lane], k - above[lane]
                undecided += lane < lanes
        if not wide:
            for lane in range(LANES):
                narrow[lane] = limit[lane]
            for j in range(width):
                at = (b * width + j) * tokens + t
                if lanes == LANES:
                    write_kept(x, at, narrow, kept, mask)
                else:
                    for lane in range(lanes):
                        mask[at + lane] = half[j * LANES + lane] >= narrow[lane]
                        kept[at + lane] = x[at + lane] if mask[at + lane] else 0
                bits = equal_lanes(half, j * LANES, narrow) if undecided else 0
                while bits:
                    lane = lowest_bit(bits)
                    bits &= bits - 1
                    if room[lane] == 0 and lane < lanes:
                        mask[at + lane], kept[at + lane] = False, 0
                    room[lane] -= room[lane] > 0
            continue
        if undecided:
            for j in range(width):
                bits = equal_lanes(half, j * LANES, low)
                while bits:
                    lane = lowest_bit(bits)
                    bits &= bits - 1
                    if room[lane] >= 0 and lane < lanes:
                        lower[lane, found[lane]] = (
                            min(x[(b * width + j) * tokens + t + lane] & 0x7FFFFFFF, INFINITY_BITS) & 0xFFFF
                        )
                        found[lane] += 1
        ties = False
        for lane in range(LANES):
            limit[lane] <<= 16
            if room[lane] >= 0 and lane < lanes:
                v, room[lane] = _decide(lower[lane], found[lane], room[lane])
                limit[lane] |= v
                ties |= room[lane] >= 0
        for j in range(width):
            at = (b * width + j) * tokens + t
            if lanes == LANES and not ties:
                write_kept(x, at, limit, kept, mask)
                continue
            for lane in range(lanes):
                word = min(x[at + lane] & 0x7FFFFFFF, INFINITY_BITS)
                keep = word >= limit[lane]
                if word == limit[lane] and room[lane] >= 0:
                    keep = room[lane] > 0
                    room[lane] -= keep
                mask[at + lane] = keep
                kept[at + lane] = x[at + lane] if keep else 0
