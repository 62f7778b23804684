"""AbsTopK and the projection against a literal stable sort."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bridge.kernels.products import tokens_innermost
from bridge.kernels.top_k import abs_top_k, apply_norm, choose, gelu, project_, top_k_mask
from bridge.models.sparse_blocks import norm_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40)
quick = settings(deadline=None, max_examples=150, derandomize=True, database=None)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Few rows of few values, most of them from a short list, so that ties, zeros, infinities and NaN are common."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    value = st.one_of(st.sampled_from(SPECIAL), st.floats(-1e4, 1e4, width=16))
    values = draw(st.lists(value, min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float64).view(rows, width)


def kept_by_sorting(x: Tensor, k: int) -> Tensor:
    """Mask of each row's first k entries in a stable sort by falling magnitude, NaN counted as infinite."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i, row in enumerate(x.tolist()):
        magnitude = [math.inf if math.isnan(value) else abs(value) for value in row]
        for j in sorted(range(len(row)), key=lambda j: -magnitude[j])[:k]:
            mask[i, j] = True
    return mask


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@quick
@given(x=matrices(), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_abs_top_k_keeps_what_a_stable_sort_keeps(x: Tensor, share: float, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    k = 1 + round(share * (x.shape[1] - 1))
    expected = kept_by_sorting(x, k)
    assert same_bits(abs_top_k(x, k), torch.where(expected, x, torch.zeros_like(x)))
    assert torch.equal(top_k_mask(x, k), expected)


@quick
@given(x=matrices(), share=st.floats(0, 1), dtype=st.sampled_from(DTYPES))
def test_abs_top_k_passes_gradient_where_it_kept(x: Tensor, share: float, dtype: torch.dtype) -> None:
    x = x.to(dtype).requires_grad_()
    k = 1 + round(share * (x.shape[1] - 1))
    gradient = torch.arange(1, x.numel() + 1, dtype=dtype).view_as(x)
    abs_top_k(x, k).backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(kept_by_sorting(x.detach(), k), gradient, torch.zeros_like(gradient)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        operator.methodcaller("t"),
        lambda x: x[:, ::2],
        lambda x: x[::3, 1:],
        lambda x: x[:1].expand(5, -1),
        lambda x: x[0],
        lambda x: x.view(3, 4, -1).transpose(0, 1),
    ],
    ids=["transposed", "strided", "offset", "expanded", "one row", "three axes"],
)
def test_abs_top_k_takes_any_layout(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seen = view(x)
    kept = abs_top_k(seen, 3)
    rows = seen.detach().reshape(-1, seen.shape[-1])
    expected = kept_by_sorting(rows, 3).view(seen.shape)
    assert torch.equal(kept, torch.where(expected, seen, 0))
    (gradient,) = torch.autograd.grad(kept.float().sum(), x)
    (expected_gradient,) = torch.autograd.grad((seen * expected).float().sum(), x)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("k", [1, 7, 20_000, 65_535])
def test_abs_top_k_orders_every_bfloat16(k: int) -> None:
    bits = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0)) - (1 << 15)
    x = bits.to(torch.int16).view(torch.bfloat16).view(1, -1)
    assert same_bits(abs_top_k(x, k), torch.where(kept_by_sorting(x, k), x, 0))


def test_abs_top_k_is_the_same_with_several_threads() -> None:
    x = torch.randn(301, 512, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kept = abs_top_k(x, 128)
    finally:
        torch.set_num_threads(threads)
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[:, :128]
    assert torch.equal(kept, torch.zeros_like(x).scatter(1, order, x.gather(1, order)))


def test_abs_top_k_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: abs_top_k(x, 3) ** 2, x)


def test_abs_top_k_of_no_rows() -> None:
    assert abs_top_k(torch.empty(0, 5), 2).shape == (0, 5)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_abs_top_k_refuses_a_k_beyond_the_width(k: int) -> None:
    with pytest.raises(ValueError, match=f"keeps {k} of 4 values; k must lie between 1 and the width"):
        abs_top_k(torch.ones(2, 4), k)


def layouts(weight: Tensor) -> Iterator[Tensor]:
    """A matrix as torch may hold it: contiguous (the compiled path), transposed, and in other types."""
    yield weight.float().clone()
    yield weight.float().t().contiguous().t()
    yield weight.to(torch.bfloat16)
    yield weight.clone()


@quick
@given(weight=matrices(), share=st.floats(0, 1))
def test_projection_keeps_what_a_stable_sort_of_the_whole_matrix_keeps(weight: Tensor, share: float) -> None:
    k = 1 + round(share * (weight.numel() - 1))
    for held in layouts(weight):
        before = held.clone()
        project_([held], k)
        expected = kept_by_sorting(before.reshape(1, -1), k).view(before.shape)
        assert same_bits(held, torch.where(expected, before, torch.zeros_like(before)))


@pytest.mark.parametrize("k", [1, 17, 5_000, 24_999, 25_000])
def test_projection_of_a_larger_matrix_in_place(k: int) -> None:
    weight = torch.nn.Parameter(torch.randn(250, 100, generator=torch.Generator().manual_seed(0)))
    before, memory = weight.detach().clone(), weight.data_ptr()
    project_([weight], k)
    smallest = before.abs().flatten().sort(descending=True).values[k - 1]
    assert torch.equal(weight, torch.where(before.abs() >= smallest, before, 0))
    assert (weight.count_nonzero(), weight.data_ptr(), weight.requires_grad) == (k, memory, True)


# -- tokens innermost, as the sparse products store them ----------------------------------------------------------------


@quick
@given(
    b=st.integers(1, 3), t=st.sampled_from([2, 9, 31, 32, 33, 64, 100]), n=st.integers(2, 40), share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), rounded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_abs_top_k_is_the_same_with_tokens_innermost(b, t, n, share, dtype, rounded, seed) -> None:
    x_btn = torch.randn(b, t, n, generator=torch.Generator().manual_seed(seed))
    x_btn = (x_btn.round() if rounded else x_btn).to(dtype)  # rounded: ties and zeros everywhere
    x_btn.view(-1)[seed % x_btn.numel()] = math.nan
    x_btn.view(-1)[(3 * seed) % x_btn.numel()] = -math.inf
    k = 1 + round(share * (n - 1))
    expected = abs_top_k(x_btn, k)
    given = torch.arange(x_btn.numel(), dtype=dtype).view_as(x_btn)
    rows = x_btn.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(abs_top_k(rows, k), rows, given)
    for inside_btn in (x_btn.transpose(1, 2).contiguous().transpose(1, 2), x_btn.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        inside_btn.requires_grad_()
        kept_btn = abs_top_k(inside_btn, k)
        assert same_bits(kept_btn.detach(), expected)
        (gradient,) = torch.autograd.grad(kept_btn, inside_btn, given)
        assert torch.equal(gradient, expected_gradient)


@quick
@given(
    size=st.sampled_from([5, 1000, 300_000]), share=st.floats(0, 1), near=st.sampled_from([0.0, 0.5, 0.999, 1.0, 1.002, 1e30]),
    rounded=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_hint_changes_nothing(size: int, share: float, near: float, rounded: bool, seed: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    weight = (4 * weight).round() if rounded else weight
    k = min(size - 1, 1 + round(share * (size - 1)))
    expected = weight.clone()
    (threshold,) = project_([expected], k)
    order = weight.abs().sort(descending=True, stable=True).indices[:k]
    assert torch.equal(expected, torch.zeros_like(weight).index_copy(0, order, weight[order]))
    assert threshold is not None
    hinted = weight.clone()
    assert project_([hinted], k, [threshold * near]) == [threshold]
    assert torch.equal(hinted, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_gelu_is_torchs(inside: bool) -> None:
    x = torch.cat([torch.linspace(-30, 30, 600), torch.randn(211)]).view(1, -1).repeat(3, 1)[None]
    x = (x.transpose(1, 2).contiguous().transpose(1, 2) if inside else x).requires_grad_()
    expected, given = torch.nn.functional.gelu(x.double(), approximate="tanh"), torch.randn_like(x)
    assert torch.allclose(gelu(x).double(), expected, rtol=1e-5, atol=1e-6)
    (found,), (reference,) = torch.autograd.grad(gelu(x), x, given), torch.autograd.grad(expected, x, given.double())
    assert torch.allclose(found, reference, rtol=1e-5, atol=1e-5)
    assert gelu(torch.tensor([[math.nan, 0.0]])).isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_norm_s_slopes_are_those_of_finite_differences(size: float) -> None:
    x = (size * torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_norm(x, norm_scale), x, eps=1e-6 * size)
    assert torch.allclose(apply_norm(x, norm_scale).square().mean(-1), x.square().mean(-1) / (x.square().mean(-1) + 1e-6))


@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 9, 4), (3, 70, 5), (6, 1, 8), (1, 1, 3)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("stored", ["inside", "outside"])
def test_a_choice_is_torch_s_own(shape: tuple[int, int, int], shared: bool, stored: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_btn, else_n = torch.randn(shape, generator=generator), torch.randn(shape[2], generator=generator)
    mask = torch.rand(shape[1:] if shared else shape, generator=generator) < 0.5
    x_btn = (tokens_innermost(x_btn) if stored == "inside" else x_btn).requires_grad_()
    found, expected = choose(mask, x_btn, else_n), torch.where(mask, x_btn, else_n)
    assert torch.equal(found, expected)
    given_btn = torch.randn(shape, generator=generator)
    assert torch.equal(*(torch.autograd.grad(each, x_btn, given_btn)[0] for each in (found, expected)))
