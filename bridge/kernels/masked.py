"""Steps of a pass over masked copies of a prompt on a CPU, on arrays: what `copies` is made of.

The kernels of `cpu`, `products` and `attention`, called on what is stored, and what is elsewhere torch's: the norm, and masks.

Shape legend: r masked copy, t token, n nodes of a location (x any channels), c columns: the tokens of all rows, row by row;
h heads, l lanes: a head of a row each; q queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bridge.kernels import attention, cpu, products
from bridge.kernels.cpu import LANES
from bridge.kernels.lanes import compiled

Array = np.ndarray[Any, Any]
BLOCK = 64  # channels whose masks are turned at a time: what a line of a cache holds of them


def product(start: Array, index: Array, value: Array, bias: Array, x_xc: Array) -> Array:
    """y_xc of a matrix by its nonzeros."""
    y_xc = np.empty((len(bias), x_xc.shape[1]), np.float32)
    products._multiply_lines(start, index, value, bias, x_xc[None], y_xc[None], 0, 1, 0, len(bias))
    return y_xc


def normed(x_xc: Array) -> tuple[Array, Array]:
    """RMSNorm of every column, and by what it was multiplied."""
    y_xc, scale_c = np.empty_like(x_xc), np.empty(x_xc.shape[1], np.float32)
    _normed(x_xc, y_xc, scale_c)
    return y_xc, scale_c


def normed_slopes(dy_xc: Array, y_xc: Array, scale_c: Array, dx_xc: Array) -> Array:
    """dx_xc of `normed`, added to slopes that there are."""
    out_xc = np.empty_like(dx_xc)
    _normed_slopes(dy_xc, y_xc, scale_c, dx_xc, out_xc)
    return out_xc


def gelu(x_xc: Array) -> tuple[Array, Array]:
    """GELU and its derivative."""
    y_xc, slope_xc = np.empty_like(x_xc), np.empty_like(x_xc)
    cpu._gelu(x_xc.reshape(-1), y_xc.reshape(-1), slope_xc.reshape(-1), 0, x_xc.size)
    return y_xc, slope_xc


def node(x_nc: Array, k: int, kept_rf: Array, offset: int, mean_n: Array) -> tuple[Array, Array, Array]:
    """What AbsTopK leaves of a location, which of it the masks let through, and the nodes: that, or their means.

    The masks of a row begin at `offset` within it, position by position, as many positions as there are columns for. Of masks
    that are numbers, what they let through is a share, and nodes lie that far from their means.
    """
    n, columns = x_nc.shape
    left_nc, through_nc, y_nc = np.empty_like(x_nc), np.empty(x_nc.shape, np.bool_), np.empty_like(x_nc)
    if k < n:
        words = (array.reshape(-1).view(np.int32) for array in (x_nc, left_nc))
        cpu._top_k_lanes(*words, through_nc.reshape(-1), n, columns, k, True, 0, -(-columns // LANES))
    else:
        left_nc, through_nc = x_nc, np.ones_like(through_nc)
    if kept_rf.dtype == np.bool_:
        _choose(left_nc, through_nc, kept_rf, offset, mean_n, y_nc)
        return left_nc, through_nc, y_nc
    share_nc = np.empty_like(x_nc)
    _mix(left_nc, through_nc, kept_rf, offset, mean_n, share_nc, y_nc)
    return left_nc, share_nc, y_nc


def node_slopes(dy_nc: Array, left_nc: Array, through_nc: Array, mean_n: Array, slope_rf: Array, offset: int) -> Array:
    """Slopes of every mask into slope_rf, and dx_nc of what AbsTopK was given."""
    dx_nc = np.empty_like(dy_nc)
    back = _choose_slopes if through_nc.dtype == np.bool_ else _mix_slopes
    back(dy_nc, left_nc, through_nc, mean_n, slope_rf, offset, dx_nc)
    return dx_nc


def from_position(x_xc: Array, rows: int, first: int) -> Array:
    """The columns of every row from a position on."""
    if not first:
        return x_xc
    return np.ascontiguousarray(x_xc.reshape(len(x_xc), rows, -1)[:, :, first:]).reshape(len(x_xc), -1)


def add_from_position(into_xc: Array, x_xc: Array, rows: int, first: int) -> Array:
    """The first with the second added to the columns of every row from a position on, in place."""
    into_xc.reshape(len(x_xc), rows, -1)[:, :, first:] += x_xc.reshape(len(x_xc), rows, -1)
    return into_xc


class Heads:
    """What heads make of q, of the last positions alone or of all, k and v: z_xc, and the way back.

    A lane of a vector is a head of a row: stored by channel of a head and position, there are enough of them for any rows.
    """

    def __init__(self, q_xc: Array, k_xc: Array, v_xc: Array, sink_h: Array, rows: int, channels: int) -> None:
        self.rows, self.channels, self.heads = rows, channels, len(sink_h)
        self.q, self.k, self.v = (self._inside(x_xc) for x_xc in (q_xc, k_xc, v_xc))
        lanes = self.q.shape[2]
        sink_1l = np.full((1, lanes), np.float32(attention.NEVER))
        sink_1l[0, : rows * len(sink_h)] = np.tile(sink_h, rows)
        self.z, log_sum_1ql = np.empty_like(self.q), np.empty((1, *self.q.shape[1:]), np.float32)
        self.told = self.q, self.k, self.v, sink_1l, self.z, log_sum_1ql
        attention._forward_many(*self.told, channels, 0, 1)
        self.z_xc = self._outside(self.z)

    def slopes(self, dz_xc: Array) -> tuple[Array, Array, Array]:
        """dq_xc, dk_xc and dv_xc."""
        dq, dk, dv = np.empty_like(self.q), np.zeros_like(self.k), np.zeros_like(self.v)
        dsink_1l = np.zeros((1, self.q.shape[2]), np.float32)
        attention._backward_many(*self.told, self._inside(dz_xc), dq, dk, dv, dsink_1l, self.channels, 0, 1)
        return self._outside(dq), self._outside(dk), self._outside(dv)

    def _inside(self, x_xc: Array) -> Array:
        """By channel of a head, position, and row and head, padded to whole vectors of these."""
        lanes, positions = -(-self.rows * self.heads // LANES) * LANES, x_xc.shape[1] // self.rows
        x_ctl = np.zeros((self.channels, positions, lanes), np.float32)
        _heads_inside(x_xc, self.rows, self.heads, x_ctl)
        return x_ctl

    def _outside(self, x_ctl: Array) -> Array:
        x_xc = np.empty((self.heads * self.channels, self.rows * x_ctl.shape[1]), np.float32)
        _heads_outside(x_ctl, self.rows, self.heads, x_xc)
        return x_xc


@compiled
def _normed(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> None:
    width, columns = x.shape
    scale[:] = 0
    for i in range(width):
        for c in range(columns):
            scale[c] += x[i, c] * x[i, c]
    for c in range(columns):
        scale[c] = np.float32(1) / np.sqrt(scale[c] / np.float32(width) + np.float32(1e-6))
    for i in range(width):
        for c in range(columns):
            y[i, c] = x[i, c] * scale[c]


@compiled
def _normed_slopes(dy: np.ndarray, y: np.ndarray, scale: np.ndarray, dx: np.ndarray, out: np.ndarray) -> None:
    width, columns = y.shape
    mean = np.zeros(columns, np.float32)
    for i in range(width):
        for c in range(columns):
            mean[c] += y[i, c] * dy[i, c]
    for c in range(columns):
        mean[c] /= np.float32(width)
    for i in range(width):
        for c in range(columns):
            out[i, c] = dx[i, c] + (dy[i, c] - y[i, c] * mean[c]) * scale[c]


@compiled
def _turn(kept: np.ndarray, offset: int, n: int, start: int, stop: int, held: np.ndarray) -> None:
    """What the masks hold of a block of channels, turned to lie as activations do."""
    positions = held.shape[1] // kept.shape[0]
    for c in range(held.shape[1]):
        row, at = c // positions, offset + c % positions * n
        for i in range(start, stop):
            held[i - start, c] = kept[row, at + i]


@compiled
def _turn_back(worth: np.ndarray, offset: int, n: int, start: int, stop: int, slope: np.ndarray) -> None:
    """The way back: what a block of channels has of slopes, turned to lie as masks do."""
    positions = worth.shape[1] // slope.shape[0]
    for c in range(worth.shape[1]):
        row, at = c // positions, offset + c % positions * n
        for i in range(start, stop):
            slope[row, at + i] = worth[i - start, c]


@compiled
def _choose(
    left: np.ndarray, through: np.ndarray, kept: np.ndarray, offset: int, mean: np.ndarray, y: np.ndarray
) -> None:  # fmt: skip
    """Both `through`, in place, and y = left where the masks keep a node, its mean elsewhere."""
    n, columns = left.shape
    held = np.empty((BLOCK, columns), np.bool_)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _turn(kept, offset, n, start, stop, held)
        for i in range(start, stop):
            for c in range(columns):
                y[i, c] = left[i, c] if held[i - start, c] else mean[i]
                through[i, c] &= held[i - start, c]


@compiled
def _choose_slopes(
    dy: np.ndarray, left: np.ndarray, through: np.ndarray, mean: np.ndarray, slope: np.ndarray, offset: int, dx: np.ndarray
) -> None:  # fmt: skip
    n, columns = left.shape
    worth = np.empty((BLOCK, columns), np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        for i in range(start, stop):
            for c in range(columns):
                worth[i - start, c] = dy[i, c] * (left[i, c] - mean[i])
                dx[i, c] = dy[i, c] if through[i, c] else np.float32(0)
        _turn_back(worth, offset, n, start, stop, slope)


@compiled
def _mix(
    left: np.ndarray, through: np.ndarray, kept: np.ndarray, offset: int, mean: np.ndarray, share: np.ndarray, y: np.ndarray
) -> None:  # fmt: skip
    """Y = left where the masks are 1, its mean where they are 0, and what lies between; share = masks where `through`."""
    n, columns = left.shape
    held = np.empty((BLOCK, columns), np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _turn(kept, offset, n, start, stop, held)
        for i in range(start, stop):
            for c in range(columns):
                of, change = held[i - start, c], left[i, c] - mean[i]
                y[i, c] = mean[i] + of * change if of < np.float32(0.5) else left[i, c] - (np.float32(1) - of) * change
                share[i, c] = of if through[i, c] else np.float32(0)


@compiled
def _mix_slopes(
    dy: np.ndarray, left: np.ndarray, share: np.ndarray, mean: np.ndarray, slope: np.ndarray, offset: int, dx: np.ndarray
) -> None:  # fmt: skip
    n, columns = left.shape
    worth = np.empty((BLOCK, columns), np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        for i in range(start, stop):
            for c in range(columns):
                worth[i - start, c] = dy[i, c] * (left[i, c] - mean[i])
                dx[i, c] = dy[i, c] * share[i, c]
        _turn_back(worth, offset, n, start, stop, slope)


@compiled
def _heads_inside(x: np.ndarray, rows: int, heads: int, out: np.ndarray) -> None:
    channels, positions = out.shape[0], out.shape[1]
    for c in range(channels):
        for head in range(heads):
            for row in range(rows):
                for t in range(positions):
                    out[c, t, row * heads + head] = x[head * channels + c, row * positions + t]


@compiled
def _heads_outside(x: np.ndarray, rows: int, heads: int, out: np.ndarray) -> None:
    channels, positions = x.shape[0], x.shape[1]
    for c in range(channels):
        for head in range(heads):
            for row in range(rows):
                for t in range(positions):
                    out[head * channels + c, row * positions + t] = x[c, t, row * heads + head]
