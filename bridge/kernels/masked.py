"""A frozen sparse model's nodes under masks, compiled for a CPU: the kernels of `circuits/masked_pass`.

Activations are lanes (n x l): a channel's tokens of all rows follow one another, padded to whole vectors. The padding holds
finite numbers that are never read. mask_rf holds the masks of the rows; at_l is the index of each lane's token in the flat masks,
without the location's offset `first`: the mask of node j in lane l is at index at_l[l] + first + channel_n[j].

    a = AbsTopK(pre)        change = a - mean        y = mean + mask * change        through = d y / d pre
    dmask = dy * change     dpre = dy * through

Shape legend: n nodes of a location, l lane, s sparse width, b prompt, t token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bridge.kernels.cpu import top_k_lanes
from bridge.kernels.lanes import LANES, compiled, gelus, masks_backward, mix_lanes, transpose_masks
from bridge.kernels.products import SparseMatrix, multiply_lines

_CHANNELS = 16  # channels whose masks are transposed at a time


@compiled
def apply_masks(
    change: np.ndarray, kept: int, mask: np.ndarray, at: np.ndarray, first: int, channel: np.ndarray, mean: np.ndarray,
    active: np.ndarray, through: np.ndarray, y: np.ndarray, near: np.ndarray,
) -> None:  # fmt: skip
    """Compute change, through and y of nodes; on entry change holds pre, of which AbsTopK keeps `kept`. active is scratch.

    Rows of change after the nodes' are rivals, used by AbsTopK only. near holds guesses of its thresholds (`top_k_lanes`).
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
        for i in range(0, transposed, 16):  # in blocks, because the masks are stored transposed
            transpose_masks(mask, at, i, first + channel[block], shares, lanes)
        for i in range(transposed, len(at)):
            for c in range(width):
                share[c, i] = mask[at[i] + first + channel[block + c]]
        for c in range(width):
            place = (block + c) * lanes
            mix_lanes(changes, place, active, shares, c * lanes, mean[block + c], lanes // 16, throughs, ys)


@compiled
def apply_masks_backward(
    dy: np.ndarray, change: np.ndarray, through: np.ndarray, at: np.ndarray, first: int, channel: np.ndarray, dmask: np.ndarray
) -> None:
    """Add to dmask, and replace dy by dpre in place."""
    n, lanes = dy.shape
    dys, changes, throughs = dy.reshape(-1), change.reshape(-1), through.reshape(-1)
    for block in range(0, n, _CHANNELS):
        width = min(_CHANNELS, n - block)
        together = width == _CHANNELS and channel[block + width - 1] - channel[block] == width - 1
        transposed = len(at) // 16 * 16 if together else 0
        for i in range(0, transposed, 16):
            masks_backward(dys, changes, throughs, block * lanes, lanes, at, i, first + channel[block], dmask)
        for i in range(transposed, len(at)):
            for c in range(width):
                dmask[at[i] + first + channel[block + c]] += dy[block + c, i] * change[block + c, i]
                dy[block + c, i] *= through[block + c, i]


@compiled
def mask_gradients_of_nodes(
    dy: np.ndarray, change: np.ndarray, channel: np.ndarray, token: np.ndarray, everywhere: bool, lane_rt: np.ndarray,
    dmask_kr: np.ndarray,
) -> None:  # fmt: skip
    """Compute dmask of some nodes, each at its token, or over all tokens (everywhere); lane_rt is -1 for a token without lane."""
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
    """Write GELU of x to y, and its derivative to gradient; x is n x l with whole vectors of lanes."""
    gelus(x.reshape(-1), 0, x.size // 16, y.reshape(-1), gradient.reshape(-1))


@compiled
def norm(x: np.ndarray, scale: np.ndarray, y: np.ndarray, width: int, eps: float) -> None:
    """Apply RMSNorm without a gain: y = x scale; width also counts the channels that are always 0."""
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
    """Add to dx the gradient through RMSNorm: scale (dy - y mean(y dy)) with y = x scale."""
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
    """Add mean + mask * excess_bts[prompt, token] to each lane of the residual stream, or of the logits."""
    for j in range(len(mean)):
        for i in range(x.shape[1]):
            x[j, i] += mean[j]
    for i in range(len(at)):
        share = mask[at[i] + first] * np.float32(1)
        if share != 0:  # true for few tokens
            row = excess[prompt[i], token[i]]
            for j in range(len(mean)):
                x[j, i] += share * row[j]


@compiled
def add_error_back(
    dx: np.ndarray, at: np.ndarray, first: int, excess: np.ndarray, prompt: np.ndarray, token: np.ndarray, dmask: np.ndarray
) -> None:
    """Add to dmask the gradient of the errors' masks."""
    for i in range(len(at)):
        row, total = excess[prompt[i], token[i]], np.float32(0)
        for j in range(len(row)):
            total += dx[j, i] * row[j]
        dmask[at[i] + first] += total


class Lanes:
    """Rows, prompts and tokens of the lanes of some masked copies, row by row; padded is the number of lanes in whole vectors.

    lane_rt is the lane of each token, -1 if it has none. A row has `size` masks; with by_position, tokens have their own.
    """

    def __init__(self, prompt_r: np.ndarray, token_rt: np.ndarray, tokens: int, size: int, by_position: bool) -> None:
        rows, each = token_rt.shape
        self.row_l, self.prompt_l, self.token_l = np.arange(rows).repeat(each), prompt_r.repeat(each), token_rt.reshape(-1)
        self.padded = -(-rows * each // LANES) * LANES
        self.lane_rt = np.full((rows, tokens), -1)
        self.lane_rt[self.row_l, self.token_l] = np.arange(rows * each)
        self.size, self.by_position, self.known = size, by_position, dict[int, np.ndarray]()

    def mask_indices(self, n: int) -> np.ndarray:
        """Return the index of each lane's token in the flat masks of a location with n nodes, without the location's offset."""
        if n not in self.known:
            self.known[n] = self.row_l * self.size + (self.token_l * n if self.by_position else 0)
        return self.known[n]


class ArrayPool:
    """Memory for the arrays of a tile, handed out in the same order for every tile."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.used = 0

    def take(self, n: int, lanes: int) -> np.ndarray:
        """Return n x lanes floats of any finite value, with one more vector allocated, because attention reads beyond the end."""
        if self.used == len(self.parts):
            self.parts.append(np.zeros(0, np.float32))
        self.used += 1
        if self.parts[self.used - 1].size < n * lanes + LANES:
            self.parts[self.used - 1] = np.zeros(n * lanes + LANES, np.float32)
        return self.parts[self.used - 1][: n * lanes].reshape(n, lanes)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix and its bias as the kernels need them: by rows, and by columns for the backward pass."""

    by_row: tuple[np.ndarray, ...]
    by_column: tuple[np.ndarray, ...]

    @staticmethod
    def of(matrix: SparseMatrix, bias_m: Tensor, back: SparseMatrix) -> StoredMatrix:
        """Make one from a frozen matrix of nonzeros and its bias; the backward pass uses only its first rows, given as `back`."""
        start, index, _ = matrix.pattern.by_row
        start_back, index_back, none = back.pattern.by_column
        by_column = start_back, index_back, back.by_column_p.numpy(), none.numpy()
        return StoredMatrix((start, index, matrix.value_p.numpy(), bias_m.numpy()), by_column)

    def times(self, x: np.ndarray, room: ArrayPool) -> np.ndarray:
        """Return W x + b."""
        return self._product(self.by_row, x, room)

    def back(self, dy: np.ndarray, room: ArrayPool) -> np.ndarray:
        """Return W' dy."""
        return self._product(self.by_column, dy, room)

    @staticmethod
    def _product(arrays: tuple[np.ndarray, ...], x: np.ndarray, room: ArrayPool) -> np.ndarray:
        y = room.take(len(arrays[0]) - 1, x.shape[1])
        multiply_lines(*arrays, x[None], y[None], 0, 1, 0, len(y))
        return y
