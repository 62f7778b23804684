"""Products with matrices stored by their nonzeros: the cost follows the number of nonzeros (Gao et al. 2025, appendix B).

    y = W x + b          y[i, t] = b[i] + sum over p in row i of  W_p x[column_p, t]
    dx = W' dy           the same, by columns
    dW_p                 = sum over t of  dy[row_p, t] x[column_p, t]           at the nonzeros only

Activations are stored with their tokens innermost (b n t; the logical shape stays b t n), so a nonzero is one multiply-add on
whole vectors of tokens. The sums of 128 tokens stay in registers during the loop over a row's nonzeros, and a batch row's block
of n x 128 floats stays in the caches. Short rows are laid end to end (storage n b t), so that the vectors are full.

Only the CPU has these kernels. On other devices, and above the density at which the kernels stop paying, products are dense. For
inference a fixed rule decides (`pays`), so explanations are reproducible; for training a measurement (`is_faster_than_dense`).

Shape legend: b batch row, t token, n inputs, m outputs, p nonzeros, v vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.kernels.cpu import run_in_parallel
from bridge.kernels.lanes import (
    TOKENS,
    compiled,
    inner_products,
    inner_products_16,
    weighted_sum,
    weighted_sum_16,
    weighted_sum_32,
    weighted_sum_64,
)

SHORT = 64  # rows of fewer tokens are laid end to end
SMALLEST, DENSEST = 1 << 14, 0.4  # least weights and largest share of nonzeros that pay; at .375 they take 3/4 of dense time


@dataclass(frozen=True, eq=False)
class Pattern:
    """The positions of the nonzeros of an m x n matrix, in row order and in column order.

    start_m1 and column_p list them by rows, start_n1 and row_p by columns; order_p maps the column order to the row order.
    """

    shape: tuple[int, int]
    start_m1: Tensor
    column_p: Tensor
    start_n1: Tensor
    row_p: Tensor
    order_p: Tensor

    @staticmethod
    def at(index_p: Tensor, shape: tuple[int, int]) -> Pattern:
        """Make the pattern of nonzeros at flat, ascending indices into an m x n matrix."""
        m, n = shape
        row_p, column_p = index_p // n, index_p % n
        start_m1, start_n1 = (
            F.pad(torch.bincount(line_p, minlength=count).cumsum(0), (1, 0)) for line_p, count in ((row_p, m), (column_p, n))
        )
        order_p = torch.empty_like(index_p)
        _by_columns(column_p.numpy(), start_n1.clone().numpy(), order_p.numpy())
        return Pattern(shape, start_m1, column_p.int(), start_n1, row_p[order_p].int(), order_p)

    @cached_property
    def by_row(self) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """start_m1 and column_p for a kernel, and a bias_m of zeros."""
        return self.start_m1.numpy(), self.column_p.numpy(), torch.zeros(self.shape[0])

    @cached_property
    def by_column(self) -> tuple[np.ndarray, np.ndarray, Tensor]:
        """start_n1 and row_p for a kernel, and a bias_n of zeros."""
        return self.start_n1.numpy(), self.row_p.numpy(), torch.zeros(self.shape[1])

    @property
    def count(self) -> int:
        """Number of entries of the matrix, zero or not."""
        return self.shape[0] * self.shape[1]

    @property
    def index_p(self) -> Tensor:
        """Flat, ascending indices of the nonzeros."""
        row_p = torch.repeat_interleave(torch.arange(self.shape[0]), self.start_m1.diff())
        return row_p * self.shape[1] + self.column_p


@dataclass
class SparseMatrix:
    """A matrix stored as the pattern and values of its nonzeros.

    gradient_mn, if set, collects the dense gradient of a backward pass, which decides where an updated mask grows. source
    identifies the dense weight that the matrix was packed from, and the weight's state then.
    """

    pattern: Pattern
    value_p: Tensor
    gradient_mn: Tensor | None = None
    source: tuple[int, int] = (0, -1)
    _gathered: tuple[tuple[int, int], Tensor] | None = None

    @staticmethod
    def of(weight_mn: Tensor) -> SparseMatrix:
        """Make the compact form of a dense matrix."""
        index_p = weight_mn.detach().reshape(-1).nonzero().flatten()
        shape = (weight_mn.shape[0], weight_mn.shape[1])
        return SparseMatrix(
            Pattern.at(index_p, shape), weight_mn.detach().reshape(-1)[index_p].clone(), source=weight_version(weight_mn)
        )

    @property
    def by_column_p(self) -> Tensor:
        """The values in column order; gathered only once if they are not trained."""
        if self.value_p.requires_grad:
            return self.value_p.detach()[self.pattern.order_p]
        state = weight_version(self.value_p)
        if self._gathered is None or self._gathered[0] != state:
            self._gathered = (state, self.value_p[self.pattern.order_p])
        return self._gathered[1]

    def dense(self) -> Tensor:
        """Return weight_mn, the dense matrix."""
        weight_mn = torch.zeros(self.pattern.shape)
        weight_mn.view(-1)[self.pattern.index_p] = self.value_p.detach()
        return weight_mn


def weight_version(weight_mn: Tensor) -> tuple[int, int]:
    """Return a key that distinguishes a weight and its state from others during its lifetime: its storage and its version."""
    return weight_mn.data_ptr(), weight_mn._version


def tokens_innermost(x_btn: Tensor) -> Tensor:
    """Return activations in float32, stored with their tokens innermost; differentiable."""
    b, t, n = x_btn.shape
    if _concatenates_rows(b, t):  # as a transposed matrix, for which torch has a blocked copy
        return x_btn.float().reshape(b * t, n).t().contiguous().view(n, b, t).permute(1, 2, 0)
    return x_btn.float().transpose(1, 2).contiguous().transpose(1, 2)


def sparse_linear(x_btn: Tensor, matrix: SparseMatrix, bias_m: Tensor | None = None) -> Tensor:
    """Return y_btm = x W' + b in float32, differentiable in x, the nonzeros' values and the bias."""
    return _SparseLinear.apply(x_btn, matrix.value_p, bias_m, matrix)  # type: ignore[no-any-return]


def sparse_embedding(tokens_bt: Tensor, matrix: SparseMatrix) -> Tensor:
    """Return x_btn, the tokens' rows of a table that is stored by its nonzeros; differentiable in their values."""
    return _SparseEmbedding.apply(tokens_bt, matrix.value_p, matrix)  # type: ignore[no-any-return]


def pays(weight_mn: Tensor) -> bool:
    """Return whether a product without gradients uses the kernels: a fixed rule, so a model answers alike in every process."""
    return weight_mn.numel() >= SMALLEST and int(weight_mn.count_nonzero()) <= DENSEST * weight_mn.numel()


@cache
def is_faster_than_dense(m: int, n: int, density: float, tokens: int, dtype: torch.dtype) -> bool:
    """Return whether a sparse product of these sizes, forward and backward, takes less than .9 of a dense one's time in dtype."""
    if m * n < SMALLEST:
        return False
    rows, length = max(1, tokens // 128), min(tokens, 128)
    generator = torch.Generator().manual_seed(0)
    weight_mn = torch.rand(m, n, generator=generator)
    weight_mn = torch.where(weight_mn < density, weight_mn / density, 0)
    matrix, x_btn = SparseMatrix.of(weight_mn), torch.randn(rows, length, n, generator=generator).requires_grad_()
    matrix.value_p.requires_grad_()
    weight_mn.requires_grad_()
    inside_btn = tokens_innermost(x_btn.detach()).requires_grad_()
    times: list[list[float]] = [[], []]
    for turn in range(4):
        for contender, seconds in enumerate(times):
            began = time.perf_counter()
            with torch.enable_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y_btm = F.linear(x_btn, weight_mn) if contender else sparse_linear(inside_btn, matrix)
            y_btm.backward(y_btm.detach())
            if turn:
                seconds.append(time.perf_counter() - began)
    return min(times[0]) < 0.9 * min(times[1])


def _concatenates_rows(rows: int, tokens: int) -> bool:
    """Return whether rows are laid end to end."""
    return rows > 1 and tokens < SHORT


def _stored(x_btn: Tensor) -> Tensor:
    """Return activations in the kernels' layout: x_bnt, contiguous; rows laid end to end count as one row."""
    b, t, n = x_btn.shape
    inside_btn = tokens_innermost(x_btn.detach())
    return inside_btn.permute(2, 0, 1).reshape(1, n, b * t) if _concatenates_rows(b, t) else inside_btn.transpose(1, 2)


def _logical(x_bnt: Tensor, rows: int, tokens: int) -> Tensor:
    """Return the view, of shape b t n, of activations in the kernels' layout."""
    return x_bnt.view(-1, rows, tokens).permute(1, 2, 0) if _concatenates_rows(rows, tokens) else x_bnt.transpose(1, 2)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btn: Tensor, value_p: Tensor, bias_m: Tensor | None, matrix: SparseMatrix) -> Tensor:
        pattern = matrix.pattern
        x_bnt = _stored(x_btn)
        start, index, no_bias = pattern.by_row
        y_bmt = _multiplied(start, index, value_p.detach(), no_bias if bias_m is None else bias_m.detach(), x_bnt)
        ctx.save_for_backward(x_bnt, value_p)
        ctx.matrix, ctx.pattern = matrix, pattern
        return _logical(y_bmt, *x_btn.shape[:2])

    @staticmethod
    def backward(ctx: Any, dy_btm: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_bnt, value_p = ctx.saved_tensors
        pattern, dy_bmt = ctx.pattern, _stored(dy_btm)
        dx_btn = dvalue_p = dbias_m = None
        if ctx.needs_input_grad[0]:
            start, index, no_bias = pattern.by_column
            dx_btn = _logical(_multiplied(start, index, ctx.matrix.by_column_p, no_bias, dy_bmt), *dy_btm.shape[:2])
        if ctx.needs_input_grad[1]:
            dvalue_p = torch.zeros_like(value_p)
            arrays = [*pattern.by_row[:2], *(tensor.numpy() for tensor in (x_bnt, dy_bmt, dvalue_p))]
            work = len(dvalue_p) * x_bnt.shape[0] * x_bnt.shape[2] // 16
            run_in_parallel(lambda first, last: _add_value_gradients(*arrays, first, last), pattern.shape[0], work)
        if ctx.needs_input_grad[2]:
            dbias_m = dy_bmt.sum((0, 2))
        if ctx.matrix.gradient_mn is not None:
            dy_mt, x_nt = (inside.permute(1, 0, 2).flatten(1) for inside in (dy_bmt, x_bnt))
            ctx.matrix.gradient_mn.addmm_(dy_mt, x_nt.T)
        return dx_btn, dvalue_p, dbias_m, None


class _SparseEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_bt: Tensor, value_p: Tensor, matrix: SparseMatrix) -> Tensor:
        pattern = matrix.pattern
        b, t = tokens_bt.shape
        n = pattern.shape[1]
        x_bnt = torch.zeros(n, b, t).transpose(0, 1) if _concatenates_rows(b, t) else torch.zeros(b, n, t)
        _look_up(*pattern.by_row[:2], value_p.detach().numpy(), tokens_bt.numpy(), x_bnt.numpy())
        ctx.save_for_backward(tokens_bt, value_p)
        ctx.matrix, ctx.pattern = matrix, pattern
        return x_bnt.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dx_btn: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        tokens_bt, value_p = ctx.saved_tensors
        pattern = ctx.pattern
        dvalue_p = torch.zeros_like(value_p)
        dx_bnt = dx_btn.detach().float().transpose(1, 2)
        _look_back(*pattern.by_row[:2], dvalue_p.numpy(), tokens_bt.numpy(), dx_bnt.numpy())
        if ctx.matrix.gradient_mn is not None:
            ctx.matrix.gradient_mn.index_add_(0, tokens_bt.flatten(), dx_btn.detach().float().flatten(0, 1))
        return None, dvalue_p, None


def _multiplied(start: np.ndarray, index: np.ndarray, value_p: Tensor, bias_m: Tensor, x_bnt: Tensor) -> Tensor:
    """Return y_bmt = W x_bnt + bias."""
    y_bmt = torch.empty(x_bnt.shape[0], len(bias_m), x_bnt.shape[2])
    arrays = start, index, *(tensor.numpy() for tensor in (value_p, bias_m, x_bnt, y_bmt))
    blocks, lines = x_bnt.shape[0], y_bmt.shape[1]
    work = len(index) * x_bnt.shape[0] * x_bnt.shape[2] // 16
    if blocks >= torch.get_num_threads():
        run_in_parallel(lambda first, last: multiply_lines(*arrays, first, last, 0, lines), blocks, work)
    else:
        run_in_parallel(lambda first, last: multiply_lines(*arrays, 0, blocks, first, last), lines, work)
    return y_bmt


@compiled
def multiply_lines(
    start: np.ndarray, index: np.ndarray, value: np.ndarray, bias: np.ndarray, x: np.ndarray, y: np.ndarray, first_block: int,
    last_block: int, first: int, last: int,
) -> None:  # fmt: skip
    """Compute lines first to last of y_bmt = W x_bnt + bias for the blocks (rows b) first_block to last_block."""
    n, tokens, m = x.shape[1], x.shape[2], y.shape[1]
    for b in range(first_block, last_block):
        t = 0
        while t < tokens:
            rest = tokens - t
            step = TOKENS if rest >= TOKENS else 64 if rest >= 64 else 32 if rest >= 32 else 16 if tokens >= 16 else 1
            t = tokens - 16 if step == 16 and rest < 16 else t  # the last vector overlaps the one before it
            for i in range(first, last):
                x_at, y_at = b * n * tokens + t, (b * m + i) * tokens + t
                if step == TOKENS:
                    weighted_sum(x, x_at, tokens, index, value, start[i], start[i + 1], bias[i], y, y_at)
                elif step == 64:
                    weighted_sum_64(x, x_at, tokens, index, value, start[i], start[i + 1], bias[i], y, y_at)
                elif step == 32:
                    weighted_sum_32(x, x_at, tokens, index, value, start[i], start[i + 1], bias[i], y, y_at)
                elif step == 16:
                    weighted_sum_16(x, x_at, tokens, index, value, start[i], start[i + 1], bias[i], y, y_at)
                else:
                    total = bias[i]
                    for p in range(start[i], start[i + 1]):
                        total += value[p] * x[b, index[p], t]
                    y[b, i, t] = total
            t += step


@compiled
def _add_value_gradients(
    start: np.ndarray, index: np.ndarray, x: np.ndarray, y: np.ndarray, out: np.ndarray, first: int, last: int
) -> None:
    n, tokens, m = x.shape[1], x.shape[2], y.shape[1]
    for b in range(x.shape[0]):
        t = 0
        while t < tokens:
            step = TOKENS if t + TOKENS <= tokens else 16 if t + 16 <= tokens else 1
            for i in range(first, last):
                x_at, y_at = b * n * tokens + t, (b * m + i) * tokens + t
                if step == TOKENS:
                    inner_products(x, x_at, tokens, index, start[i], start[i + 1], y, y_at, out)
                elif step == 16:
                    inner_products_16(x, x_at, tokens, index, start[i], start[i + 1], y, y_at, out)
                else:
                    for p in range(start[i], start[i + 1]):
                        out[p] += x[b, index[p], t] * y[b, i, t]
            t += step


@compiled
def _by_columns(column: np.ndarray, place: np.ndarray, order: np.ndarray) -> None:
    for p in range(column.shape[0]):
        order[place[column[p]]] = p
        place[column[p]] += 1


@compiled
def _look_up(start: np.ndarray, column: np.ndarray, value: np.ndarray, tokens: np.ndarray, x: np.ndarray) -> None:
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            for p in range(start[tokens[b, t]], start[tokens[b, t] + 1]):
                x[b, column[p], t] = value[p]


@compiled
def _look_back(start: np.ndarray, column: np.ndarray, out: np.ndarray, tokens: np.ndarray, dx: np.ndarray) -> None:
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            for p in range(start[tokens[b, t]], start[tokens[b, t] + 1]):
                out[p] += dx[b, column[p], t]
