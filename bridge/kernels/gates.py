"""Gates of nodes on a CPU, compiled by numba: values replaced by means where a mask says so, whole or in part.

Two layouts, as in `cpu`: rows, with the channels contiguous; and lanes, with the tokens contiguous (storage b n t, or n b t for
short rows, laid end to end).

Shape legend: b row, t token, n nodes of a location.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridge.kernels.cpu import in_parallel, numbers, tokens_contiguous
from bridge.kernels.lanes import compiled


def choose(mask_btn: Tensor, x_btn: Tensor, else_n: Tensor) -> tuple[Tensor, Tensor]:
    """X where the mask holds, else a value per channel; and the mask, both laid out as x is: float32, without gaps."""
    b, t, n = x_btn.shape
    if x_btn.permute(2, 0, 1).is_contiguous():  # short rows, end to end
        inside = mask_btn.reshape(b * t, n).t()
        lines, length = n, b * t
    else:
        inside = mask_btn.transpose(1, 2)
        lines, length = b * n, t
    mask = inside.contiguous().view(-1)
    kept = torch.empty_strided(x_btn.shape, x_btn.stride())
    values, out = numbers(x_btn, kept)
    others = else_n.detach().contiguous().numpy()
    words = mask.numpy()
    in_parallel(lambda start, stop: _choose(values, words, others, out, length, start, stop), lines, x_btn.numel())
    return kept, mask.as_strided(x_btn.shape, x_btn.stride())


def mix(mask_bn: Tensor, x_btn: Tensor, else_n: Tensor) -> Tensor:
    """X where the mask is 1, a value per channel where it is 0, and between them what lies between: float32, laid out as x is."""
    (b, t, n), y_btn = x_btn.shape, torch.empty_strided(x_btn.shape, x_btn.stride())
    x, y, mask, other = numbers(x_btn, y_btn, mask_bn, else_n)
    if tokens_contiguous(x_btn):
        by_channel = x_btn.permute(2, 0, 1).is_contiguous()
        in_parallel(lambda start, stop: _mix_lanes(x, mask, other, y, b, t, n, by_channel, start, stop), b * n, x.size)
    else:
        in_parallel(lambda start, stop: _mix_rows(x, mask, other, y, t, n, start, stop), b, x.size)
    return y_btn


def mix_slopes(mask_bn: Tensor, x_btn: Tensor, else_n: Tensor, dy_btn: Tensor) -> tuple[Tensor, Tensor]:
    """(dmask_bn, dx_btn) of `mix` from the slopes dy_btn of what it gave."""
    (b, t, n), dx_btn, dmask_bn = x_btn.shape, torch.empty_strided(x_btn.shape, x_btn.stride()), torch.empty_like(mask_bn)
    if dy_btn.stride() != x_btn.stride():
        dy_btn = torch.empty_strided(x_btn.shape, x_btn.stride()).copy_(dy_btn)
    args = numbers(x_btn, mask_bn, else_n, dy_btn, dx_btn, dmask_bn)
    if tokens_contiguous(x_btn):
        by_channel = x_btn.permute(2, 0, 1).is_contiguous()
        in_parallel(lambda start, stop: _mix_lanes_slopes(*args, b, t, n, by_channel, start, stop), b * n, 2 * x_btn.numel())
    else:
        in_parallel(lambda start, stop: _mix_rows_slopes(*args, t, n, start, stop), b, 2 * x_btn.numel())
    return dmask_bn, dx_btn


@compiled
def _choose(x: np.ndarray, mask: np.ndarray, other: np.ndarray, kept: np.ndarray, length: int, start: int, stop: int) -> None:
    for line in range(start, stop):
        otherwise, here = other[line % other.shape[0]], slice(line * length, (line + 1) * length)
        x_line, mask_line, kept_line = x[here], mask[here], kept[here]
        for i in range(length):
            kept_line[i] = x_line[i] if mask_line[i] else otherwise


@compiled
def _mix_lanes(
    x: np.ndarray, mask: np.ndarray, other: np.ndarray, y: np.ndarray, b: int, t: int, n: int, by_channel: bool, start: int,
    stop: int,
) -> None:  # fmt: skip
    for line in range(start, stop):
        row, channel = (line % b, line // b) if by_channel else (line // n, line % n)
        share, otherwise, here = mask[row * n + channel], other[channel], slice(line * t, (line + 1) * t)
        x_line, y_line = x[here], y[here]
        if share == 1:
            y_line[:] = x_line
        elif share == 0:
            y_line[:] = otherwise
        else:
            for i in range(t):
                y_line[i] = otherwise + share * (x_line[i] - otherwise)


@compiled
def _mix_lanes_slopes(
    x: np.ndarray, mask: np.ndarray, other: np.ndarray, dy: np.ndarray, dx: np.ndarray, dmask: np.ndarray, b: int, t: int, n: int,
    by_channel: bool, start: int, stop: int,
) -> None:  # fmt: skip
    for line in range(start, stop):
        row, channel = (line % b, line // b) if by_channel else (line // n, line % n)
        share, otherwise, here = mask[row * n + channel], other[channel], slice(line * t, (line + 1) * t)
        x_line, dy_line, dx_line = x[here], dy[here], dx[here]
        total = np.float32(0)
        for i in range(t):
            total += dy_line[i] * (x_line[i] - otherwise)
            dx_line[i] = share * dy_line[i]
        dmask[row * n + channel] = total


@compiled
def _mix_rows(
    x: np.ndarray, mask: np.ndarray, other: np.ndarray, y: np.ndarray, t: int, n: int, start: int, stop: int
) -> None:  # fmt: skip
    for line in range(start * t, stop * t):
        here = slice(line * n, (line + 1) * n)
        x_line, y_line, mask_line = x[here], y[here], mask[line // t * n : (line // t + 1) * n]
        for i in range(n):
            between = other[i] + mask_line[i] * (x_line[i] - other[i])
            y_line[i] = x_line[i] if mask_line[i] == 1 else between


@compiled
def _mix_rows_slopes(
    x: np.ndarray, mask: np.ndarray, other: np.ndarray, dy: np.ndarray, dx: np.ndarray, dmask: np.ndarray, t: int, n: int,
    start: int, stop: int,
) -> None:  # fmt: skip
    for row in range(start, stop):
        mask_row, dmask_row = mask[row * n : (row + 1) * n], dmask[row * n : (row + 1) * n]
        dmask_row[:] = 0
        for line in range(row * t, (row + 1) * t):
            here = slice(line * n, (line + 1) * n)
            x_line, dy_line, dx_line = x[here], dy[here], dx[here]
            for i in range(n):
                dmask_row[i] += dy_line[i] * (x_line[i] - other[i])
                dx_line[i] = mask_row[i] * dy_line[i]
