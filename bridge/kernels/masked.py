"""A frozen sparse model's nodes under masks, compiled for a CPU: what `circuits/masked_pass` is made of.

Activations are lanes: n x l, a channel's tokens of all rows one behind the other, padded to whole vectors. What is padded holds
finite numbers that nobody reads. mask_rf are the masks of the rows, at_l the place of each lane's token in them, less that of the
location: node j of lane l has the mask at at_l[l] + first + j of the flat masks, first being where its location begins.

    a = AbsTopK(pre)        change = a - mean        y = mean + mask * change        through = d y / d pre
    dmask = dy * change     dpre = dy * through

Shape legend: n nodes of a location, l lane, s sparse width, b prompt, t token.
"""

from __future__ import annotations

import numpy as np

from bridge.kernels.cpu import top_k_lanes
from bridge.kernels.lanes import LANES, compiled, gelus, mix_lanes

_CHANNELS = 16  # whose masks are turned at a time


@compiled
def nodes(
    change: np.ndarray, kept: int, mask: np.ndarray, at: np.ndarray, first: int, mean: np.ndarray, active: np.ndarray,
    through: np.ndarray, y: np.ndarray,
) -> None:  # fmt: skip
    """The change, through and y of nodes; change is what they are before AbsTopK, which keeps so many. active is scratch."""
    n, lanes = change.shape
    if kept < n:
        words = change.reshape(-1).view(np.int32)
        top_k_lanes(words, words, active, n, lanes, kept, True, 0, (lanes + LANES - 1) // LANES)
    else:
        active[: n * lanes] = True
    share = np.zeros((_CHANNELS, lanes), np.float32)
    changes, throughs, ys, shares = change.reshape(-1), through.reshape(-1), y.reshape(-1), share.reshape(-1)
    for block in range(0, n, _CHANNELS):
        width = min(_CHANNELS, n - block)
        for i in range(len(at)):  # in blocks, since the masks lie the other way round
            place = at[i] + first + block
            for c in range(width):
                share[c, i] = mask[place + c]
        for c in range(width):
            place = (block + c) * lanes
            mix_lanes(changes, place, active, shares, c * lanes, mean[block + c], lanes // 16, throughs, ys)


@compiled
def nodes_back(dy: np.ndarray, change: np.ndarray, through: np.ndarray, at: np.ndarray, first: int, dmask: np.ndarray) -> None:
    """Adds to dmask, and turns dy into dpre."""
    n, lanes = dy.shape
    gradient = np.empty((_CHANNELS, lanes), np.float32)
    for block in range(0, n, _CHANNELS):
        width = min(_CHANNELS, n - block)
        for c in range(width):
            j = block + c
            for i in range(lanes):
                gradient[c, i] = dy[j, i] * change[j, i]
                dy[j, i] *= through[j, i]
        for i in range(len(at)):
            place = at[i] + first + block
            for c in range(width):
                dmask[place + c] += gradient[c, i]


@compiled
def gelu(x: np.ndarray, y: np.ndarray, gradient: np.ndarray) -> None:
    """GELU and its derivative; of n x l with whole vectors of lanes."""
    gelus(x.reshape(-1), 0, x.size // 16, y.reshape(-1), gradient.reshape(-1))


@compiled
def norm(x: np.ndarray, scale: np.ndarray, y: np.ndarray, eps: float) -> None:
    """RMSNorm without a gain: y = x scale."""
    n, lanes = x.shape
    scale[:] = 0
    for j in range(n):
        for i in range(lanes):
            scale[i] += x[j, i] * x[j, i]
    for i in range(lanes):
        scale[i] = np.float32(1) / np.sqrt(scale[i] / np.float32(n) + np.float32(eps))
    for j in range(n):
        for i in range(lanes):
            y[j, i] = x[j, i] * scale[i]


@compiled
def norm_back(dy: np.ndarray, x: np.ndarray, scale: np.ndarray, dx: np.ndarray) -> None:
    """Adds to dx the gradient through RMSNorm: scale (dy - y mean(y dy)) with y = x scale."""
    n, lanes = x.shape
    mean = np.zeros(lanes, np.float32)
    for j in range(n):
        for i in range(lanes):
            mean[i] += x[j, i] * dy[j, i]
    for i in range(lanes):
        mean[i] *= scale[i] * scale[i] / np.float32(n)
    for j in range(n):
        for i in range(lanes):
            dx[j, i] += scale[i] * (dy[j, i] - mean[i] * x[j, i])


@compiled
def add_error(
    x: np.ndarray, mask: np.ndarray, at: np.ndarray, first: int, mean: np.ndarray, excess: np.ndarray, prompt: np.ndarray,
    token: np.ndarray,
) -> None:  # fmt: skip
    """Adds mean + mask * excess_bts[prompt, token] to each lane of the stream, or of the logits."""
    for j in range(len(mean)):
        for i in range(x.shape[1]):
            x[j, i] += mean[j]
    for i in range(len(at)):
        share = mask[at[i] + first] * np.float32(1)
        if share != 0:  # of few tokens
            row = excess[prompt[i], token[i]]
            for j in range(len(mean)):
                x[j, i] += share * row[j]


@compiled
def add_error_back(
    dx: np.ndarray, at: np.ndarray, first: int, excess: np.ndarray, prompt: np.ndarray, token: np.ndarray, dmask: np.ndarray
) -> None:
    """Adds to the gradient of the errors' masks."""
    for i in range(len(at)):
        row, total = excess[prompt[i], token[i]], np.float32(0)
        for j in range(len(row)):
            total += dx[j, i] * row[j]
        dmask[at[i] + first] += total
