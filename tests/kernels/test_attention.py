"""Fused attention against a literal softmax with a sink."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bridge.kernels.attention import attend


def literal(q_btn: Tensor, k_btn: Tensor, v_btn: Tensor, channels: int, sink_h: Tensor | None) -> Tensor:
    heads, length = q_btn.shape[-1] // channels, q_btn.shape[1]
    q, k, v = (x.unflatten(-1, (heads, channels)).transpose(1, 2) for x in (q_btn, k_btn, v_btn))
    score = (q @ k.transpose(-1, -2) / math.sqrt(channels)).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
    )
    if sink_h is None:
        pattern = score.softmax(-1)
    else:
        sink = sink_h.view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        pattern = torch.cat([sink, score], -1).softmax(-1)[..., 1:]
    return (pattern @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("channels", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 9, 16, 80, 128, 130])
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("size", [0.1, 2.0])
def test_attention_is_the_literal_one(channels: int, length: int, sinks: bool, size: float) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (size * torch.randn(2, length, 3 * channels, generator=generator) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sink_h = torch.randn(3, generator=generator).requires_grad_() if sinks else None
    trained = [*inputs, sink_h] if sink_h is not None else inputs
    towards = torch.randn(2, length, 3 * channels, generator=generator)
    found, expected = attend(q, k, v, channels, sink_h), literal(q, k, v, channels, sink_h)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * size)
    for a, r in zip(torch.autograd.grad(found, trained, towards), torch.autograd.grad(expected, trained, towards), strict=True):
        assert torch.allclose(a, r, rtol=1e-3, atol=2e-5 * float(r.abs().max()) + 1e-5 * size)


@pytest.mark.parametrize("rows", [2, 8, 17])
@pytest.mark.parametrize("length", [1, 9, 40])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("sinks", [True, False])
def test_the_last_queries_alone_of_few_rows_or_many(rows: int, length: int, queries: int, sinks: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    queries = min(queries, length)
    q, k, v = (torch.randn(rows, length, 24, generator=generator) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    sink_h = torch.randn(3, generator=generator).requires_grad_() if sinks else None
    trained = [*inputs, sink_h] if sink_h is not None else inputs
    towards = torch.randn(rows, queries, 24, generator=generator)
    found, expected = attend(q[:, -queries:], k, v, 8, sink_h), literal(q, k, v, 8, sink_h)[:, -queries:]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for a, r in zip(torch.autograd.grad(found, trained, towards), torch.autograd.grad(expected, trained, towards), strict=True):
        assert torch.allclose(a, r, rtol=1e-3, atol=2e-5 * float(r.abs().max()) + 1e-5)


def test_attention_takes_any_layout() -> None:
    x_bnt = torch.randn(3, 2, 32, 40, generator=torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in x_bnt)
    assert torch.equal(attend(q, k, v, 16), attend(q.contiguous(), k.contiguous(), v.contiguous(), 16))


def test_a_query_sees_nothing_later() -> None:
    q, k, v = torch.randn(3, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    whole = attend(q, k, v, 16)
    for x in (q, k, v):
        x[:, 12:] = 7.0
    assert torch.equal(attend(q, k, v, 16)[:, :12], whole[:, :12])


def test_not_a_number_is_not_hidden() -> None:
    q, k, v = torch.randn(3, 1, 20, 16, generator=torch.Generator().manual_seed(0))
    k[0, 3, 5] = torch.nan
    assert attend(q, k, v, 16)[0, 3:].isnan().any()
