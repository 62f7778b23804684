"""A frozen sparse model's nodes under masks, compiled for a CPU: what `circuits/masked_pass` is made of.

Activations are lanes: n x l, a channel's tokens of all rows one behind the other, padded to whole vectors. What is padded holds
finite numbers that nobody reads. mask_rf are the masks of the rows, at_l the place of each lane's token in them, less that of the
location: node j of lane l has the mask at at_l[l] + first + channel_n[j] of the flat masks, first being where the location's are.

    a = AbsTopK(pre)        change = a - mean        y = mean + mask * change        through = d y / d pre
    dmask = dy * change     dpre = dy * through

Shape legend: n nodes of a location, l lane, s sparse width, b prompt, t token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bridge.kernels.cpu import top_k_lanes
from bridge.kernels.lanes import LANES, back_masks, compiled, gelus, mix_lanes, transpose_masks
from bridge.kernels.products import Compact, multiply_lines

_CHANNELS = 16  # whose masks are transposed at a time


@compiled
def nodes(
    change: np.ndarray, kept: int, mask: np.ndarray, at: np.ndarray, first: int, channel: np.ndarray, mean: np.ndarray,
    active: np.ndarray, through: np.ndarray, y: np.ndarray, near: np.ndarray,
) -> None:  # fmt: skip
    """The change, through and y of nodes; change is what they are before AbsTopK, which keeps so many. active is scratch.

    What change has behind them are rivals, for AbsTopK alone. near says about where its thresholds are (`top_k_lanes`).
    """
    n, (rows, lanes) = len(mean), change.shape
    if kept < rows:
        words = change.reshape(-1).view(np.int32)
        top_k_lanes(words, words, active, rows, lanes, kept, True, 0, (lanes + LANES - 1) // LANES, near)
    else:
        active[: n * lanes] = True
    share = np.zeros((_CHANNELS, lanes), np.float32)
    changes, throughs, ys, shares = change.reshape(-1), through.reshape(-1), y.reshape(-1), share.reshape(-1)
    for block in range(0, n, _CHANNELS):
        width = min(_CHANNELS, n - block)
        together = width == _CHANNELS and channel[block + width - 1] - channel[block] == width - 1
        transposed = len(at) // 16 * 16 if together else 0
        for i in range(0, transposed, 16):  # in blocks, since the masks lie the other way round
            transpose_masks(mask, at, i, first + channel[block], shares, lanes)
        for i in range(transposed, len(at)):
            for c in range(width):
                share[c, i] = mask[at[i] + first + channel[block + c]]
        for c in range(width):
            place = (block + c) * lanes
            mix_lanes(changes, place, active, shares, c * lanes, mean[block + c], lanes // 16, throughs, ys)


@compiled
def nodes_back(
    dy: np.ndarray, change: np.ndarray, through: np.ndarray, at: np.ndarray, first: int, channel: np.ndarray, dmask: np.ndarray
) -> None:
    """Adds to dmask, and turns dy into dpre."""
    n, lanes = dy.shape
    dys, changes, throughs = dy.reshape(-1), change.reshape(-1), through.reshape(-1)
    for block in range(0, n, _CHANNELS):
        width = min(_CHANNELS, n - block)
        together = width == _CHANNELS and channel[block + width - 1] - channel[block] == width - 1
        transposed = len(at) // 16 * 16 if together else 0
        for i in range(0, transposed, 16):
            back_masks(dys, changes, throughs, block * lanes, lanes, at, i, first + channel[block], dmask)
        for i in range(transposed, len(at)):
            for c in range(width):
                dmask[at[i] + first + channel[block + c]] += dy[block + c, i] * change[block + c, i]
                dy[block + c, i] *= through[block + c, i]


@compiled
def some_nodes(
    dy: np.ndarray, change: np.ndarray, channel: np.ndarray, token: np.ndarray, everywhere: bool, lane_rt: np.ndarray,
    dmask_kr: np.ndarray,
) -> None:  # fmt: skip
    """Dmask of some nodes, each at its token, or at every one; lane_rt is -1 where a token has no lane."""
    rows, tokens = lane_rt.shape
    for k in range(len(channel)):
        j, begin, end = channel[k], token[k], token[k] + 1
        if everywhere:
            begin, end = 0, tokens
        for r in range(rows):
            total = np.float32(0)
            for t in range(begin, end):
                i = lane_rt[r, t]
                if i >= 0:
                    total += dy[j, i] * change[j, i]
            dmask_kr[k, r] = total


@compiled
def gelu(x: np.ndarray, y: np.ndarray, gradient: np.ndarray) -> None:
    """GELU and its derivative; of n x l with whole vectors of lanes."""
    gelus(x.reshape(-1), 0, x.size // 16, y.reshape(-1), gradient.reshape(-1))


@compiled
def norm(x: np.ndarray, scale: np.ndarray, y: np.ndarray, width: int, eps: float) -> None:
    """RMSNorm without a gain: y = x scale; width counts the channels that are always 0 as well."""
    n, lanes = x.shape
    scale[:] = 0
    for j in range(n):
        for i in range(lanes):
            scale[i] += x[j, i] * x[j, i]
    for i in range(lanes):
        scale[i] = np.float32(1) / np.sqrt(scale[i] / np.float32(width) + np.float32(eps))
    for j in range(n):
        for i in range(lanes):
            y[j, i] = x[j, i] * scale[i]


@compiled
def norm_back(dy: np.ndarray, x: np.ndarray, scale: np.ndarray, width: int, dx: np.ndarray) -> None:
    """Adds to dx the gradient through RMSNorm: scale (dy - y mean(y dy)) with y = x scale."""
    n, lanes = x.shape
    mean = np.zeros(lanes, np.float32)
    for j in range(n):
        for i in range(lanes):
            mean[i] += x[j, i] * dy[j, i]
    for i in range(lanes):
        mean[i] *= scale[i] * scale[i] / np.float32(width)
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


class Lanes:
    """Rows, prompts and tokens of the lanes of some masked copies, row by row; padded counts those that fill vectors.

    lane_rt is the lane of each token, -1 where it has none. A row has `size` masks, by position where tokens have their own.
    """

    def __init__(self, prompt_r: np.ndarray, token_rt: np.ndarray, tokens: int, size: int, by_position: bool) -> None:
        rows, each = token_rt.shape
        self.row_l, self.prompt_l, self.token_l = np.arange(rows).repeat(each), prompt_r.repeat(each), token_rt.reshape(-1)
        self.padded = -(-rows * each // LANES) * LANES
        self.lane_rt = np.full((rows, tokens), -1)
        self.lane_rt[self.row_l, self.token_l] = np.arange(rows * each)
        self.size, self.by_position, self.known = size, by_position, dict[int, np.ndarray]()

    def places(self, n: int) -> np.ndarray:
        """The place of each lane's token in flat masks, less that of a location of n nodes."""
        if n not in self.known:
            self.known[n] = self.row_l * self.size + (self.token_l * n if self.by_position else 0)
        return self.known[n]


class Room:
    """Memory for the arrays of a tile, handed out in the same order every time."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.used = 0

    def take(self, n: int, lanes: int) -> np.ndarray:
        """N x lanes floats, of any finite value, and room for a vector more behind them, to which attention reads on."""
        if self.used == len(self.parts):
            self.parts.append(np.zeros(0, np.float32))
        self.used += 1
        if self.parts[self.used - 1].size < n * lanes + LANES:
            self.parts[self.used - 1] = np.zeros(n * lanes + LANES, np.float32)
        return self.parts[self.used - 1][: n * lanes].reshape(n, lanes)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix and its bias to the kernels: by rows, and by columns for the way back."""

    by_row: tuple[np.ndarray, ...]
    by_column: tuple[np.ndarray, ...]

    @staticmethod
    def of(matrix: Compact, bias_m: Tensor, back: Compact) -> StoredMatrix:
        """A frozen matrix of nonzeros, with its bias; the way back goes through its first rows, `back`."""
        start, index, _ = matrix.pattern.by_row
        start_back, index_back, none = back.pattern.by_column
        by_column = start_back, index_back, back.by_column_p.numpy(), none.numpy()
        return StoredMatrix((start, index, matrix.value_p.numpy(), bias_m.numpy()), by_column)

    def times(self, x: np.ndarray, room: Room) -> np.ndarray:
        """W x + b."""
        return self._product(self.by_row, x, room)

    def back(self, dy: np.ndarray, room: Room) -> np.ndarray:
        """W' dy."""
        return self._product(self.by_column, dy, room)

    @staticmethod
    def _product(arrays: tuple[np.ndarray, ...], x: np.ndarray, room: Room) -> np.ndarray:
        y = room.take(len(arrays[0]) - 1, x.shape[1])
        multiply_lines(*arrays, x[None], y[None], 0, 1, 0, len(y))
        return y
