"""The pass without autograd gives the logits, the residuals and the gradients that the model under its gates does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, planted_pairs, untrained
from torch import Tensor

from bridge.circuits.error_nodes import error_means, follow_dense
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.masked_pass import supports_model
from bridge.circuits.question import Question
from bridge.kernels.products import SparseMatrix
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import corpus_means
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.models.sparse import Location

WIDTHS = {"width": 64, "positions": "learned"}
SHAPES = [WIDTHS, {**WIDTHS, "sinks": False, "bigram": "none"}, {**WIDTHS, "keep": 1.0, "bigram": "full"}]


def masked_models(
    dense: DenseModel, shape: dict, *, several: bool, alter: Callable[[CoupledModels], None] = lambda _: None
) -> tuple[MaskedModel, MaskedModel]:
    """One and the same masked model, through the pass and through the gates."""
    coupling = untrained(dense, sparse=shape)
    sparse = coupling.sparse
    sparse.project(0.15)
    sparse.requires_grad_(False)
    alter(coupling)
    corpus_bt = torch.randint(2, VOCABULARY, (6, CONTEXT), generator=torch.Generator().manual_seed(5))
    pairs, prompt = Question.of_pairs(planted_pairs(5, (4, 6)).both_members()), Question.of_prompt(corpus_bt[0, :7].clone(), 3)
    question = pairs if several else prompt
    followed = follow_dense(coupling, question.prompt_bt, question.last_b)
    means = {**corpus_means(sparse, corpus_bt), **error_means(coupling, corpus_bt)}
    assert not supports_model(sparse)
    gates = MaskedModel(sparse, question, means, followed.errors, by_position=not several)
    for name, weight in sparse.packable().items():
        sparse.compact[name] = SparseMatrix.of(weight)
    assert supports_model(sparse)
    compiled = MaskedModel(sparse, question, means, followed.errors, by_position=not several)
    sparse.compact.clear()
    return compiled, gates


def masks(masked: MaskedModel, rows: int) -> list[Tensor]:
    """Masks of every density, and mixtures."""
    mix_rf = torch.rand(rows, masked.space.size, generator=torch.Generator().manual_seed(2))
    return [mix_rf < torch.linspace(0.02, 1.01, rows)[:, None], mix_rf]


def assert_same(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, atol=3e-5, rtol=1e-4)


def assert_same_logits_and_gradients(compiled: MaskedModel, gates: MaskedModel) -> None:
    row_r = torch.arange(70) % len(compiled.question)  # more than a tile, and more tiles than are kept for the way back
    for mask_rf in masks(compiled, len(row_r)):
        assert_same(compiled.logits(mask_rf, row_r), gates.logits(mask_rf, row_r))

        def loss(logits_rv: Tensor) -> Tensor:
            return compiled.question.difference(logits_rv, row_r[: len(logits_rv)]).square()

        for rows in (3, len(row_r)):
            made, wanted = (model.gradient(mask_rf[:rows], loss, row_r[:rows]) for model in (compiled, gates))
            scale = float(wanted[0].abs().max())
            assert scale > 0
            torch.testing.assert_close(made[0], wanted[0], atol=1e-4 * scale, rtol=1e-3)
            assert_same(made[1], wanted[1])
            node_k = torch.arange(0, compiled.space.size, 7)
            some_rk, _ = compiled.gradient(mask_rf[:rows], loss, row_r[:rows], node_k)
            assert torch.equal(some_rk, made[0][:, node_k])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("several", [False, True])
def test_logits_and_gradients_are_those_of_the_gates(dense: DenseModel, shape: dict, several: bool) -> None:
    assert_same_logits_and_gradients(*masked_models(dense, shape, several=several))


@torch.no_grad()
def left_idle(coupling: CoupledModels, *, encoded: bool) -> None:
    """Take their weights from channels, neurons and heads here and there, not their biases where nothing reads them.

    With `encoded` the bridges write on the channels all the same, and so do errors.
    """
    sparse, generator = coupling.sparse, torch.Generator().manual_seed(8)
    weight = sparse.get_parameter
    channel_s = torch.arange(sparse.width) % 3 == 1
    for name in ("embedding", "positions"):
        weight(name)[:, channel_s] = 0
    for layer in range(len(sparse.blocks)):
        block = f"blocks.{layer}"
        for write in ("o", "down"):
            weight(f"{block}.{write}.weight")[channel_s], weight(f"{block}.{write}.bias")[channel_s] = 0, 0
        neuron_n = torch.rand(sparse.neurons, generator=generator) < 0.7
        head_c = torch.arange(sparse.width) // sparse.channels == layer
        weight(f"{block}.down.weight")[:, neuron_n], weight(f"{block}.o.weight")[:, head_c] = 0, 0
        for unread_c, reads in ((neuron_n, ("up",)), (head_c, ("q", "k", "v"))):
            constant_c = unread_c & (torch.rand(len(unread_c), generator=generator) < 0.8)
            for read in reads:  # some are still written, most are constant, few of those large
                weight(f"{block}.{read}.weight")[constant_c] = 0
                weight(f"{block}.{read}.bias")[constant_c] = torch.randn(int(constant_c.sum()), generator=generator) ** 3
    for site in range(len(coupling.bridges)):
        for part in ("weight", "bias"):
            coupling.bridges[site].encoder.get_parameter(part)[channel_s] *= encoded


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_what_is_left_out_does_not_matter(dense: DenseModel, shape: dict, several: bool, encoded: bool) -> None:
    compiled, gates = masked_models(dense, shape, several=several, alter=partial(left_idle, encoded=encoded))
    assert compiled._compiled is not None
    live = compiled._compiled.live
    width = compiled.sparse.width
    assert len(live.stream_s) == (width if encoded else width - width // 3)
    assert all(len(live.nodes[Location(layer, "mlp_act")].channel_n) < 0.4 * 4 * width for layer in (0, 1))
    assert all(len(live.nodes[Location(layer, "q")].channel_n) == width - compiled.sparse.channels for layer in (0, 1))
    assert_same_logits_and_gradients(compiled, gates)


def test_rows_that_enter_on_channels_left_out_are_computed_all_the_same(dense: DenseModel) -> None:
    compiled, gates = masked_models(dense, WIDTHS, several=False, alter=partial(left_idle, encoded=False))
    mask_rf = masks(compiled, 4)[0]
    wanted = gates.run(mask_rf, narrow=True)
    for moved in (0.0, 0.3):
        enter = Enter.at(1, wanted.residuals[1] + moved)
        made, other = (model.run(mask_rf, None, enter, narrow=True) for model in (compiled, gates))
        assert_same(made.logits_btv, other.logits_btv)
        assert_same(made.residuals[-1], other.residuals[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_enter_at_sites_and_leave_residuals(dense: DenseModel, shape: dict) -> None:
    compiled, gates = masked_models(dense, shape, several=False)
    mask_rf = masks(compiled, 6)[0]
    wanted, late = gates.run(mask_rf, narrow=True), compiled.sparse.narrow_from
    made = compiled.run(mask_rf, narrow=True)
    for x_rts, y_rts in zip(made.residuals, wanted.residuals, strict=True):
        assert_same(x_rts, y_rts)
    for sites in ([-1, 0, 0, 1, late - 1, late - 1], [late] * 4 + [late + 1] * 2):
        x_rts = torch.stack([wanted.residuals[max(0, site)][row] + 0.1 for row, site in enumerate(sites)])
        made, other = (model.run(mask_rf, None, Enter(torch.tensor(sites), x_rts), narrow=True) for model in (compiled, gates))
        assert_same(made.logits_btv, other.logits_btv)
        for site in range(sites[-1], compiled.sparse.n_sites):
            assert_same(made.residuals[site], other.residuals[site])


def test_every_mask_kept_is_the_dense_model(dense: DenseModel) -> None:
    compiled, _ = masked_models(dense, WIDTHS, several=False)
    all_1f = torch.ones(1, compiled.space.size, dtype=torch.bool)
    dense_v = dense.run(compiled.question.prompt_bt).logits_btv[0, -1]
    assert_same(compiled.logits(all_1f)[0], dense_v)
