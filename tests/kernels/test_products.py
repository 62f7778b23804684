"""Sparse products against torch's dense ones: forward and every gradient, over shapes and layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge.kernels.products import Pattern, SparseMatrix, is_faster_than_dense, sparse_embedding, sparse_linear, tokens_innermost

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def random_matrix(m: int, n: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_mn = torch.randn(m, n, generator=generator)
    return torch.where(torch.rand(m, n, generator=generator) < density, weight_mn, 0)


def close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the largest value, or of rounding where all are zero."""
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= 1e-5 * float(b.detach().abs().max()) + 1e-12


@quick
@given(
    b=st.integers(1, 4), t=st.sampled_from([1, 2, 9, 15, 16, 63, 64, 100, 128, 150, 200]), n=st.integers(1, 40),
    m=st.integers(1, 40), density=st.sampled_from([0.0, 0.05, 0.3, 1.0]), biased=st.booleans(), inside=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_sparse_product_is_the_dense_one(b, t, n, m, density, biased, inside, seed) -> None:
    weight_mn = random_matrix(m, n, density, seed).requires_grad_()
    generator = torch.Generator().manual_seed(seed + 1)
    x_btn = torch.randn(b, t, n, generator=generator)
    given_btm = torch.randn(b, t, m, generator=generator)
    bias_m = torch.randn(m, generator=generator).requires_grad_() if biased else None
    matrix = SparseMatrix.of(weight_mn)
    matrix.value_p.requires_grad_()
    matrix.gradient_mn = torch.zeros(m, n)
    x_btn = (tokens_innermost(x_btn) if inside else x_btn).requires_grad_()
    biases = [] if bias_m is None else [bias_m]
    found = sparse_linear(x_btn, matrix, bias_m)
    expected = F.linear(x_btn, weight_mn, bias_m)
    assert close(found, expected)
    dx, dvalue_p, *dbias = torch.autograd.grad(found, [x_btn, matrix.value_p, *biases], given_btm)
    rx, rweight_mn, *rbias = torch.autograd.grad(expected, [x_btn, weight_mn, *biases], given_btm)
    assert close(dx, rx)
    assert close(dvalue_p, rweight_mn.reshape(-1)[matrix.pattern.index_p]) if len(dvalue_p) else True
    assert all(close(a, r) for a, r in zip(dbias, rbias, strict=True))
    assert close(matrix.gradient_mn, rweight_mn), "what is looked at is the dense gradient"


@quick
@given(b=st.integers(1, 3), t=st.integers(1, 20), n=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_sparse_table_is_looked_up_as_a_dense_one(b: int, t: int, n: int, seed: int) -> None:
    weight_vn = random_matrix(12, n, 0.3, seed).requires_grad_()
    tokens_bt = torch.randint(0, 12, (b, t), generator=torch.Generator().manual_seed(seed))
    given_btn = torch.randn(b, t, n, generator=torch.Generator().manual_seed(seed + 1))
    matrix = SparseMatrix.of(weight_vn)
    matrix.value_p.requires_grad_()
    matrix.gradient_mn = torch.zeros(12, n)
    found, expected = sparse_embedding(tokens_bt, matrix), F.embedding(tokens_bt, weight_vn)
    assert torch.equal(found, expected)
    (dvalue_p,) = torch.autograd.grad(found, matrix.value_p, given_btn)
    (rweight_vn,) = torch.autograd.grad(expected, weight_vn, given_btn)
    assert close(matrix.gradient_mn, rweight_vn)
    assert not len(dvalue_p) or close(dvalue_p, rweight_vn.reshape(-1)[matrix.pattern.index_p])


def test_gradients_are_those_of_finite_differences() -> None:
    matrix = SparseMatrix.of(random_matrix(6, 5, 0.4, 0))
    matrix.value_p.requires_grad_()
    x_btn = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    towards = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        return (sparse_linear(x_btn, matrix) * towards).sum().double()

    gradients = torch.autograd.grad(loss(), [x_btn, matrix.value_p])
    for tensor, gradient in zip((x_btn, matrix.value_p), gradients, strict=True):
        for index in range(0, tensor.numel(), 7):
            with torch.no_grad():  # linear in each: a whole unit is as good a step as a small one
                tensor.view(-1)[index] += 1
                above = loss()
                tensor.view(-1)[index] -= 2
                below = loss()
                tensor.view(-1)[index] += 1
            assert float((above - below) / 2) == pytest.approx(float(gradient.reshape(-1)[index]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shape", [(3, 9, 5), (1, 9, 5), (2, 100, 5), (4, 64, 1), (2, 1, 7)])
def test_tokens_inside_is_another_storage_of_the_same(shape: tuple[int, int, int]) -> None:
    x_btn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inside_btn = tokens_innermost(x_btn)
    assert torch.equal(inside_btn, x_btn)
    assert torch.equal(tokens_innermost(inside_btn), x_btn)
    x_btn.requires_grad_()
    (gradient,) = torch.autograd.grad((tokens_innermost(x_btn) ** 2).sum(), x_btn)
    assert torch.equal(gradient, 2 * x_btn.detach())


def test_a_pattern_lists_rows_and_columns() -> None:
    weight_mn = random_matrix(7, 4, 0.4, 3)
    pattern = SparseMatrix.of(weight_mn).pattern
    assert torch.equal(pattern.index_p, weight_mn.view(-1).nonzero().flatten())
    by_columns = weight_mn.T.nonzero()
    assert torch.equal(pattern.row_p.long(), by_columns[:, 1])
    assert torch.equal(weight_mn.view(-1)[pattern.index_p][pattern.order_p], weight_mn.T[by_columns[:, 0], by_columns[:, 1]])
    assert torch.equal(SparseMatrix.of(weight_mn).dense(), weight_mn)
    assert Pattern.at(pattern.index_p, (7, 4)).count == 28


def test_the_number_of_threads_changes_nothing() -> None:
    matrix, x_btn = SparseMatrix.of(random_matrix(256, 256, 0.2, 0)), torch.randn(3, 128, 256)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            matrix.value_p = matrix.value_p.detach().requires_grad_()
            y_btm = sparse_linear(x_btn, matrix)
            results.append((y_btm.detach(), *torch.autograd.grad(y_btm.sum(), matrix.value_p)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_it_is_not_worth_it_where_matrices_are_small_or_full() -> None:
    assert not is_faster_than_dense(16, 16, 0.01, 1024, torch.float32)
    assert not is_faster_than_dense(256, 256, 1.0, 512, torch.float32)
