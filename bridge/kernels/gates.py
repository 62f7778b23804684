"""Gates of nodes on a CPU, compiled by numba: values replaced by means where a mask says so.

Two layouts, as in `cpu`: rows, with the channels contiguous; and lanes, with the tokens contiguous (storage b n t, or n b t for
short rows, laid end to end).

Shape legend: b row, t token, n nodes of a location.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridge.kernels.cpu import in_parallel, numbers
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


@compiled
def _choose(x: np.ndarray, mask: np.ndarray, other: np.ndarray, kept: np.ndarray, length: int, start: int, stop: int) -> None:
    for line in range(start, stop):
        otherwise, here = other[line % other.shape[0]], slice(line * length, (line + 1) * length)
        x_line, mask_line, kept_line = x[here], mask[here], kept[here]
        for i in range(length):
            kept_line[i] = x_line[i] if mask_line[i] else otherwise
