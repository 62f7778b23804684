"""Every number of an evaluation against the same number written out token by token."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, untrained
from torch import Tensor

from bridge.models.bridges import Bridges, CoupledModels
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.training.evaluate import Evaluation, evaluate

module = importlib.import_module("bridge.training.evaluate")
TOKENS_BT = torch.randint(0, VOCABULARY, (5, CONTEXT), generator=torch.Generator().manual_seed(11))
SITES = range(5)


def rows_of(tokens_bt: Tensor) -> list[Tensor]:
    return [row[None] for row in tokens_bt]


def cross_entropy(logits: list[Tensor]) -> float:
    """Mean over all tokens that have a next one, row by row."""
    costs = [
        -float(row[0, place].softmax(-1)[TOKENS_BT[number, place + 1]].log())
        for number, row in enumerate(logits)
        for place in range(CONTEXT - 1)
    ]
    return sum(costs) / len(costs)


def divergence(truth: list[Tensor], guess: list[Tensor]) -> float:
    p, q = torch.cat(truth).double().softmax(-1), torch.cat(guess).double().softmax(-1)
    return float((p * (p.log() - q.log())).sum(-1).mean())


def agreement(truth: list[Tensor], guess: list[Tensor]) -> float:
    return float((torch.cat(truth).argmax(-1) == torch.cat(guess).argmax(-1)).double().mean())


def explained(guess: Tensor, target: Tensor, first: int) -> float:
    """1 - residual sum of squares over total sum of squares, from position `first` on."""
    guess, target = guess.double()[:, first:], target.double()[:, first:]
    return 1 - float(((guess - target) ** 2).sum() / ((target - target.mean((0, 1))) ** 2).sum())


@pytest.fixture(scope="module")
def sparsified(dense: DenseModel) -> CoupledModels:
    """A sparse coupling with two neurons that are certainly dead."""
    coupling = untrained(dense)
    coupling.sparse.project(0.2)
    coupling.bridges.calibrate(dense.run(TOKENS_BT).residuals)
    block = coupling.sparse._block(0)
    with torch.no_grad():
        block.up.weight[:2] = 0
        block.up.bias[:2] = 0
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return coupling


@pytest.fixture(scope="module")
def result(sparsified: CoupledModels) -> Evaluation:
    return evaluate(sparsified, TOKENS_BT)


@pytest.fixture(scope="module")
def truth(sparsified: CoupledModels) -> list[Tensor]:
    return [sparsified.dense.run(row).logits_btv for row in rows_of(TOKENS_BT)]


def close(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_models_on_their_own(sparsified: CoupledModels, result: Evaluation, truth: list[Tensor]) -> None:
    sparse = [sparsified.sparse.run(row).logits_btv for row in rows_of(TOKENS_BT)]
    close(result.ce_dense, cross_entropy(truth))
    close(result.ce_sparse, cross_entropy(sparse))
    close(result.kl_sparse, divergence(truth, sparse))
    close(result.top1_sparse, agreement(truth, sparse))
    assert result.tokens == TOKENS_BT.numel()


@pytest.mark.parametrize("site", SITES)
def test_the_hybrids_of_a_site(sparsified: CoupledModels, result: Evaluation, truth: list[Tensor], site: int) -> None:
    dense, sparse, one = sparsified.dense, sparsified.sparse, sparsified.bridges[site]
    into, out, ablated = [], [], []
    mean_d = dense.run(TOKENS_BT).residuals[site].mean((0, 1))
    for row in rows_of(TOKENS_BT):
        h_btd, x_bts = dense.run(row).residuals[site], sparse.run(row).residuals[site]
        into.append(sparse.run(row, Enter.at(site, one.encode(h_btd))).logits_btv)
        out.append(dense.run(row, Enter.at(site, one.decode(x_bts))).logits_btv)
        ablated.append(dense.run(row, Enter.at(site, mean_d.expand_as(h_btd))).logits_btv)
    row = result.sites[site]
    close(row.kl_in, divergence(truth, into))
    close(row.kl_out, divergence(truth, out))
    close(row.ce_in, cross_entropy(into))
    close(row.ce_out, cross_entropy(out))
    close(row.ce_mean, cross_entropy(ablated))
    worst, best = cross_entropy(ablated), cross_entropy(truth)
    assert row.recovered_in == pytest.approx((worst - cross_entropy(into)) / (worst - best), rel=1e-3)
    assert row.recovered_out == pytest.approx((worst - cross_entropy(out)) / (worst - best), rel=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_the_explained_variance_of_a_site(sparsified: CoupledModels, result: Evaluation, site: int) -> None:
    h_btd = sparsified.dense.run(TOKENS_BT).residuals[site]
    x_bts = sparsified.sparse.run(TOKENS_BT).residuals[site]
    encoded, decoded = sparsified.bridges[site].encode(h_btd), sparsified.bridges[site].decode(x_bts)
    row = result.sites[site]
    close(row.ev_encoder, explained(encoded, x_bts, 0))
    close(row.ev_encoder_later, explained(encoded, x_bts, 1))
    close(row.ev_decoder, explained(decoded, h_btd, 0))
    close(row.ev_decoder_later, explained(decoded, h_btd, 1))


def test_overall_numbers_are_means_over_sites(sparsified: CoupledModels, result: Evaluation, truth: list[Tensor]) -> None:
    for name in ("recovered_in", "recovered_out", "ev_encoder", "ev_decoder"):
        close(getattr(result, name), sum(getattr(row, name) for row in result.sites) / len(result.sites))
    dense, sparse = sparsified.dense.run(TOKENS_BT).residuals, sparsified.sparse.run(TOKENS_BT).residuals
    close(result.top1_in, sum(agreement(truth, [sparsified.dense_to_sparse(TOKENS_BT, dense, s)]) for s in SITES) / 5)
    close(result.top1_out, sum(agreement(truth, [sparsified.sparse_to_dense(TOKENS_BT, sparse, s)]) for s in SITES) / 5)
    assert [row.site for row in result.sites] == list(SITES)
    assert [row.read_by for row in result.sites] == ["attn", "mlp", "attn", "mlp", "unembed"]


def test_dead_neurons_and_nonzeros_are_counted(sparsified: CoupledModels, result: Evaluation) -> None:
    active = {}

    def watch(location, x_btn: Tensor) -> Tensor:
        if location.kind == "mlp_act":
            active[location] = x_btn.flatten(0, 1)
        return x_btn

    sparsified.sparse.run(TOKENS_BT, gate=watch)
    dead = sum(not any(bool(v != 0) for v in x_xn[:, neuron]) for x_xn in active.values() for neuron in range(x_xn.shape[1]))
    assert result.dead_neurons == dead >= 2
    assert result.neurons == 2 * 4 * 32
    weights = sparsified.sparse.sparse_weights().values()
    assert result.l0 == sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    blocks = [p for name, p in sparsified.sparse.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    assert result.l0_blocks == sum(int((w != 0).sum()) for w in blocks) / sum(w.numel() for w in blocks) != result.l0_embed


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_size_of_a_batch_changes_nothing(
    sparsified: CoupledModels, result: Evaluation, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Five rows by 2 or 3 leave a last batch that is not full."""
    monkeypatch.setattr(module, "ROWS", rows)
    split = evaluate(sparsified, TOKENS_BT)
    for field in dataclasses.fields(Evaluation):
        if field.name != "sites":
            close(getattr(split, field.name), getattr(result, field.name))
    for one, other in zip(split.sites, result.sites, strict=True):
        assert dataclasses.astuple(one)[2:] == pytest.approx(dataclasses.astuple(other)[2:], rel=1e-3, abs=1e-4)


def test_bridges_that_decode_perfectly_recover_everything(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With decoders that answer with the dense residual itself, nothing is lost on the way out."""
    coupling = untrained(dense)
    h = dense.run(TOKENS_BT).residuals
    answers = {id(coupling.bridges[site]): h[site] for site in SITES}
    monkeypatch.setattr(type(coupling.bridges[0]), "decode", lambda self, _: answers[id(self)])
    perfect = evaluate(coupling, TOKENS_BT)
    assert (perfect.recovered_out, perfect.top1_out, perfect.ev_decoder) == (pytest.approx(1), 1, 1)
    assert all(row.kl_out == pytest.approx(0, abs=1e-6) for row in perfect.sites)


def test_bridges_that_answer_with_the_mean_recover_nothing(dense: DenseModel) -> None:
    coupling = untrained(dense)
    constant = Bridges(5, dense.width, 32, 0.25)
    with torch.no_grad():
        for site, h_btd in enumerate(dense.run(TOKENS_BT).residuals):
            constant[site].decoder.weight.zero_()
            constant[site].mean_d.copy_(h_btd.mean((0, 1)))
    nothing = evaluate(dataclasses.replace(coupling, bridges=constant), TOKENS_BT)
    for row in nothing.sites:
        assert row.recovered_out == pytest.approx(0, abs=1e-4)
        assert row.ev_decoder == pytest.approx(0, abs=1e-4)


def test_an_evaluation_is_finite_json(result: Evaluation) -> None:
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert len(values["sites"]) == 5 and values["tokens"] == result.tokens
    numbers = [value for row in (values, *values["sites"]) for value in row.values() if isinstance(value, float)]
    assert numbers and all(math.isfinite(number) for number in numbers)


def test_progress_rises_to_one_and_no_text_is_refused(sparsified: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 2)
    seen: list[float] = []
    evaluate(sparsified, TOKENS_BT, on_progress=lambda phase: seen.append(phase.done / phase.total))
    assert len(seen) == 6 and seen == sorted(seen) and seen[-1] == pytest.approx(1)
    with pytest.raises(ValueError, match="no held-out text"):
        evaluate(sparsified, TOKENS_BT[:0])
