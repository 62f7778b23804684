"""Masked copies by compiled kernels against the model's own run under a gate, and its gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY
from torch import Tensor

from bridge.circuit import Ablations, Question, ablation_gate, corpus_means
from bridge.copies import Copies
from bridge.recipe import SparseShape, Sparsity
from bridge.sparse import SparseTransformer

BOTH = ("attn", "mlp", "attn", "mlp")


def model(kinds: tuple[str, ...] = BOTH, **shape: Any) -> SparseTransformer:
    """A sparse model with a tenth of its weights, and biases and sinks that are not 0."""
    values = {"width": 48, "head_channels": 16, "mlp_ratio": 3, "positions": "learned", "bigram": "low-rank", "bigram_rank": 4}
    sparse = SparseTransformer(SparseShape(**{**values, **shape}), kinds, VOCABULARY, CONTEXT, seed=3).requires_grad_(False)
    generator = torch.Generator().manual_seed(4)
    for parameter in sparse.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0, 0.3, generator=generator)
    sparse.project(sparse.fractions(Sparsity(l0=0.1)))
    return sparse


def ablations(sparse: SparseTransformer, length: int) -> Ablations:
    generator = torch.Generator().manual_seed(length)
    means = corpus_means(sparse, torch.randint(0, VOCABULARY, (6, CONTEXT), generator=generator))
    return Ablations(sparse, Question(torch.randint(0, VOCABULARY, (length,), generator=generator), 4, 7), means)


def masks(of: Ablations, rows: int) -> Tensor:
    return torch.rand(rows, of.space.size, generator=torch.Generator().manual_seed(rows)) < 0.6


def by_autograd(of: Ablations, kept_rf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """logits_rv of the model under a gate that mixes, its loss_r, and the slopes of the mask's numbers."""
    mask_rf = kept_rf.float().clone().requires_grad_()
    parts = of.space.split(mask_rf)
    trace = of.sparse.run(
        of.tokens_1t.expand(len(kept_rf), -1),
        gate=lambda at, x_rtn: torch.lerp(of.means[at], x_rtn, parts[at]),
    )
    loss_r = loss(trace.logits_btv[:, -1])
    (slope_rf,) = torch.autograd.grad(loss_r.sum(), mask_rf)
    return trace.logits_btv[:, -1].detach(), loss_r.detach(), slope_rf


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("length", [1, 6, CONTEXT])
@pytest.mark.parametrize(
    ("kinds", "shape"),
    [
        (BOTH, {}),
        (("attn", "mlp", "attn"), {"sinks": False}),
        (("attn", "attn", "mlp"), {"positions": "none", "bigram": "none"}),
        (BOTH, {"keep": 1.0, "bigram": "full"}),
    ],
)
def test_they_are_the_gated_model_and_its_gradient(kinds: tuple[str, ...], shape: dict[str, Any], length: int, rows: int) -> None:
    of = ablations(model(kinds, **shape), length)
    copies, kept_rf = of.copies, masks(of, rows)
    assert copies is not None
    shares_rf = torch.rand(kept_rf.shape, generator=torch.Generator().manual_seed(1)) * kept_rf
    for mask_rf in (kept_rf, shares_rf, shares_rf.double()):
        expected_rv, expected_r, expected_rf = by_autograd(of, mask_rf, of.kl)
        torch.testing.assert_close(copies.logits(mask_rf), expected_rv, rtol=1e-4, atol=1e-5)
        slope_rf, loss_r = copies.slopes(mask_rf, of.kl)
        torch.testing.assert_close(loss_r, expected_r, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope_rf, expected_rf, rtol=1e-3, atol=1e-4 * float(expected_rf.abs().max()))


@pytest.mark.parametrize("length", [1, 6, CONTEXT])
@pytest.mark.parametrize("kinds", [BOTH, ("attn", "mlp", "attn"), ("attn", "attn", "mlp")])
def test_a_node_less_is_a_mask_of_its_own(kinds: tuple[str, ...], length: int) -> None:
    of = ablations(model(kinds), length)
    assert of.copies is not None
    kept_f = masks(of, 1)[0]
    node_r = torch.cat([kept_f.nonzero().flatten()[::7].flip(0), (~kept_f).nonzero().flatten()[::40]])
    kept_rf = kept_f.repeat(len(node_r), 1)
    kept_rf[torch.arange(len(node_r)), node_r] = False
    expected_rv = torch.cat([by_autograd(of, rows_rf, of.kl)[0] for rows_rf in kept_rf.split(16)])
    torch.testing.assert_close(of.logits_without(kept_f, node_r), expected_rv, rtol=1e-4, atol=1e-5)
    assert of.logits_without(kept_f, node_r[:0]).shape == (0, VOCABULARY)


def test_every_node_kept_is_the_model_itself() -> None:
    of = ablations(model(), 6)
    assert of.copies is not None
    whole_v = of.sparse(of.tokens_1t)[0, -1]
    torch.testing.assert_close(of.copies.logits(torch.ones(1, of.space.size, dtype=torch.bool))[0], whole_v)


def test_no_masks_have_no_logits() -> None:
    of = ablations(model(), 6)
    assert of.logits(masks(of, 2)[:0]).shape == (0, VOCABULARY)


def test_rows_do_not_depend_on_their_company_or_on_threads() -> None:
    """Bit for bit where they are divided alike; to rounding where not."""
    of = ablations(model(), CONTEXT)
    assert of.copies is not None
    kept_rf, found = masks(of, 12), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((of.copies.logits(kept_rf), *of.copies.slopes(kept_rf, of.kl)))
    torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    alone_rv = torch.cat([of.copies.logits(kept_f[None]) for kept_f in kept_rf])
    torch.testing.assert_close(found[0][0], alone_rv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "shape"),
    [(("parallel", "parallel"), {}), (("mlp", "attn"), {}), (("attn", "mlp", "mlp"), {}), (BOTH, {"positions": "rotary"})],
)
def test_what_is_not_served_is_run_by_the_model(kinds: tuple[str, ...], shape: dict[str, Any]) -> None:
    of = ablations(model(kinds, **shape), 6)
    assert of.copies is None
    kept_rf = masks(of, 3)
    gates = [ablation_gate(of.space.split(kept_f), of.means) for kept_f in kept_rf]
    expected_rv = torch.cat([of.sparse.run(of.tokens_1t, gate=gate).logits_btv[:, -1] for gate in gates])
    torch.testing.assert_close(of.logits(kept_rf), expected_rv, rtol=1e-4, atol=1e-5)


def test_a_dense_or_double_model_is_not_served() -> None:
    dense = model()
    dense.get_parameter("blocks.1.up.weight").fill_(0.1)
    for sparse in (dense, model().double()):
        of = ablations(sparse, 6)
        assert Copies.of(sparse, of.tokens_1t, of.means) is None
