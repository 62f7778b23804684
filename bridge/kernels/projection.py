"""The magnitude projection of a weight matrix on a CPU, compiled by numba: its threshold is found by search, without sorting.

Millions of entries need one threshold. One pass counts entries against a bracket around the threshold of the last step (or of a
sample) and collects those inside; the threshold is selected among these. A second pass sets the smaller entries to zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridge.kernels.cpu import INFINITY_BITS, run_in_parallel
from bridge.kernels.lanes import compiled, count_words

CHUNK = 256  # words of a weight matrix counted at a time
SAMPLE = 1 << 14


def project_(weight: Tensor, k: int, hint: float | None = None) -> float:
    """Zero all but the k entries of a contiguous float32 tensor that are largest in magnitude; return the threshold.

    `hint`, a threshold that may be near (such as the last step's), changes only the time this takes.
    """
    bits = weight.detach().view(-1).view(torch.int32).numpy()
    threshold, room = _threshold(bits, k, hint)
    limit = np.array([threshold], np.int32).view(np.float32)[0]
    if room < 0:
        flat = weight.detach().view(-1).numpy()
        run_in_parallel(lambda start, stop: _zero_below(flat[start:stop], limit), len(flat), len(flat))
    else:
        _zero_below_ties(bits, threshold, room)
    return float(limit)


def _threshold(bits: np.ndarray, k: int, hint: float | None) -> tuple[int, int]:
    """Return the bit pattern of the k-th largest magnitude, and how many entries equal to it to keep (-1: all of them)."""
    size = len(bits)
    brackets: list[tuple[int, int]] = []
    if hint is not None and 0 < hint < float("inf"):
        at = int(np.array([hint], np.float32).view(np.int32)[0])
        brackets += [(at - (1 << 15), at + (1 << 15)), (at - (1 << 18), at + (1 << 18))]  # within .4 %, within 3 %
    elif size > 8 * SAMPLE:
        seen = np.sort(np.minimum(bits[:: size // SAMPLE] & 0x7FFFFFFF, INFINITY_BITS))[::-1]
        middle, margin = k * len(seen) / size, 4 * (k * len(seen) / size) ** 0.5 + 8
        above, below = int(middle - margin), int(middle + margin)
        brackets.append((int(seen[min(below, len(seen) - 1)]), int(seen[above]) + 1 if above >= 0 else INFINITY_BITS + 1))
    for low, high in brackets:
        low, high = max(low, 1), min(high, INFINITY_BITS + 1)
        found = _select(bits, k, low, high)
        if found is not None:
            return found
    return _by_histogram(bits, k)


def _select(bits: np.ndarray, k: int, low: int, high: int) -> tuple[int, int] | None:
    """Return the result of `_threshold` if the threshold lies in [low, high), otherwise None."""
    parts: list[tuple[np.ndarray, int]] = []  # magnitudes in the bracket, and how many are above it

    def collect(start: int, stop: int) -> None:
        inside, counts = np.empty(stop - start, np.int32), np.zeros(2, np.int64)
        _collect(bits[start:stop], low, high, inside, counts)
        parts.append((inside[: counts[0] - counts[1]], int(counts[1])))

    run_in_parallel(collect, len(bits), len(bits))
    above, within = sum(over for _, over in parts), sum(len(inside) for inside, _ in parts)
    if not above < k <= above + within:
        return None
    found = np.concatenate([inside for inside, _ in parts])
    rank = within - (k - above)
    threshold = int(np.partition(found, rank)[rank])
    larger, equal = int((found > threshold).sum()), int((found == threshold).sum())
    room = k - above - larger
    return threshold, -1 if room == equal else room


@compiled
def _collect(bits: np.ndarray, low: int, high: int, inside: np.ndarray, counts: np.ndarray) -> None:
    """Set counts to how many magnitudes are at least low, and at least high, and inside to those between, in order."""
    found, both = 0, np.zeros(2, np.int64)
    counts[:] = 0
    size = bits.shape[0]
    for at in range(0, size, CHUNK):
        stop = min(at + CHUNK, size)
        if stop - at == CHUNK:
            count_words(bits, at, CHUNK // 16, low, high, both)
            counts[0] += both[0]
            counts[1] += both[1]
            if both[0] == both[1]:
                continue
            for j in range(at, stop):
                word = bits[j] & 0x7FFFFFFF
                if low <= word:
                    word = min(word, INFINITY_BITS)
                    if word < high:
                        inside[found] = word
                        found += 1
        else:
            for j in range(at, stop):
                word = min(bits[j] & 0x7FFFFFFF, INFINITY_BITS)
                counts[0] += word >= low
                counts[1] += word >= high
                if low <= word < high:
                    inside[found] = word
                    found += 1
    if high > INFINITY_BITS:  # a NaN counts as infinite, which is below this bound
        counts[1] = 0


@compiled
def _by_histogram(bits: np.ndarray, k: int) -> tuple[int, int]:
    """Return the result of `_threshold` by two passes, over the upper and the lower halves of magnitudes, without a bracket."""
    histogram = np.zeros(1 << 16, np.int64)
    for j in range(bits.shape[0]):
        histogram[min(bits[j] & 0x7FFFFFFF, INFINITY_BITS) >> 16] += 1
    room, upper = k, (1 << 16) - 1
    while histogram[upper] < room:
        room -= histogram[upper]
        upper -= 1
    histogram[:] = 0
    for j in range(bits.shape[0]):
        magnitude = min(bits[j] & 0x7FFFFFFF, INFINITY_BITS)
        if magnitude >> 16 == upper:
            histogram[magnitude & 0xFFFF] += 1
    lower = (1 << 16) - 1
    while histogram[lower] < room:
        room -= histogram[lower]
        lower -= 1
    return (upper << 16) | lower, -1 if histogram[lower] == room else room


@compiled
def _zero_below(flat: np.ndarray, limit: np.float32) -> None:
    for j in range(flat.shape[0]):
        flat[j] = np.float32(0) if abs(flat[j]) < limit else flat[j]


@compiled
def _zero_below_ties(bits: np.ndarray, threshold: int, room: int) -> None:
    for j in range(bits.shape[0]):
        magnitude = min(bits[j] & 0x7FFFFFFF, INFINITY_BITS)
        if magnitude < threshold:
            bits[j] = 0
        elif magnitude == threshold:
            if room == 0:
                bits[j] = 0
            else:
                room -= 1
