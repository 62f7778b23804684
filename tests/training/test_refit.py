"""The decoders' last fit: against gradients taken another way, and against its objective written out token by token."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import CONTEXT, VOCABULARY

from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter
from bridge.training.refit import FLOOR, KEEP, RIDGE, AnswerContrast, refit_decoders, residual_gradients

TOKENS_BT = torch.randint(0, VOCABULARY, (6, CONTEXT), generator=torch.Generator().manual_seed(11))


def question(coupling: CoupledModels, tokens_bt: torch.Tensor) -> AnswerContrast:
    return AnswerContrast.draw(coupling.dense.run(tokens_bt).logits_btv, torch.Generator().manual_seed(0))


def refitted(coupling: CoupledModels, weight: float, worst: float = math.inf) -> CoupledModels:
    other = replace(coupling, bridges=copy.deepcopy(coupling.bridges))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.training.refit.WORST", worst)
        refit_decoders(other, TOKENS_BT, TOKENS_BT, weight)
    return other


@pytest.mark.parametrize("which", ["dense", "sparse"])
def test_gradients_are_those_of_entering_at_the_site(coupling: CoupledModels, which: str) -> None:
    """By a run of its own from every site, and by a finite difference there."""
    model = coupling.dense if which == "dense" else coupling.sparse
    asked = question(coupling, TOKENS_BT)
    found, residuals = residual_gradients(model, TOKENS_BT, asked)
    for site in range(coupling.n_sites):
        x_btd = residuals[site].clone().requires_grad_(True)
        asked.difference(model.run(TOKENS_BT, Enter.at(site, x_btd)).logits_btv).backward()
        assert x_btd.grad is not None
        torch.testing.assert_close(found[site], x_btd.grad, rtol=1e-3, atol=1e-5)
    step_btd = 1e-2 * found[-1] / found[-1].norm()
    ends = [
        asked.difference(model.run(TOKENS_BT, Enter.at(coupling.n_sites - 1, residuals[-1] + sign * step_btd)).logits_btv)
        for sign in (1, -1)
    ]
    torch.testing.assert_close((ends[0] - ends[1]) / 2, (found[-1] * step_btd).sum(), rtol=0.05, atol=1e-4)


def test_a_question_asks_between_the_likeliest_answers(coupling: CoupledModels) -> None:
    logits_btv = coupling.dense.run(TOKENS_BT).logits_btv
    asked = question(coupling, TOKENS_BT)
    best_btk = logits_btv.topk(5).indices
    assert torch.equal(asked.answers_btk[..., 0], logits_btv.argmax(-1))
    assert (asked.answers_btk[..., 1:] == best_btk[..., 1:]).any(-1).all()
    assert set(asked.sign_bt.flatten().tolist()) == {-1, 1}
    by_hand = sum(
        float(sign) * float(logits_btv[b, t, one] - logits_btv[b, t, other])
        for b in range(len(TOKENS_BT))
        for t in range(CONTEXT)
        for sign, (one, other) in [(asked.sign_bt[b, t], asked.answers_btk[b, t].tolist())]
    )
    torch.testing.assert_close(asked.difference(logits_btv), torch.tensor(by_hand), rtol=1e-3, atol=1e-3)


def literal(coupling: CoupledModels, site: int, weight: float, start_ds: torch.Tensor, w_ds: torch.Tensor) -> torch.Tensor:
    """The objective at a site for a linear part w_ds, from lists of tokens."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (tokens_bt, AnswerContrast.draw(coupling.dense.run(tokens_bt).logits_btv, generator)) for tokens_bt in TOKENS_BT.split(8)
    ]
    dense = [residual_gradients(coupling.dense, *part) for part in parts]
    sparse = [residual_gradients(coupling.sparse, *part) for part in parts]
    g_nd = torch.cat([some[site] for some, _ in dense]).flatten(0, 1).double()
    g_ns = torch.cat([some[site] for some, _ in sparse]).flatten(0, 1).double()
    x_ns = torch.cat([x[site] for _, x in sparse]).flatten(0, 1).double()
    before_ns = torch.cat([x[max(0, site - 1)] for _, x in sparse]).flatten(0, 1).double()
    written_ns = x_ns - before_ns if site else x_ns
    x_ns, written_ns = x_ns - x_ns.mean(0), written_ns - written_ns.mean(0)
    # gradients that nothing has are told apart by the ridge: as many more tokens, one along every dense direction
    d = g_nd.shape[1]
    ridge = (RIDGE * g_nd.square().mean() * len(g_nd)).sqrt()
    g_nd, g_ns = torch.cat([g_nd, ridge * torch.eye(d).double()]), torch.cat([g_ns, torch.zeros(d, g_ns.shape[1]).double()])
    n = len(x_ns)
    regression_ds = torch.linalg.lstsq(g_nd, g_ns).solution
    longer = (g_nd @ start_ds).norm() / (g_nd @ regression_ds).norm()
    scale_s = written_ns.square().mean(0)
    effect_s = scale_s * g_ns.square().sum(0) / n
    count_s = scale_s / (effect_s + FLOOR * effect_s.mean())
    count_s = count_s / count_s.mean()
    change_ds = w_ds - start_ds
    patched_nn = (g_nd @ change_ds) @ x_ns.T  # every gradient with every residual: taken as independent
    kept = patched_nn.square().sum() / n / n / x_ns.square().mean() + KEEP * (g_nd @ change_ds).square().sum() / n
    gradients_off = ((g_nd @ (w_ds - longer * regression_ds)).square().sum(0) * count_s).sum() / n
    return kept + weight * gradients_off


@pytest.mark.parametrize("site", [0, 2, 4])
def test_the_closed_form_is_the_least_of_its_objective(coupling: CoupledModels, site: int) -> None:
    after = refitted(coupling, 0.7)
    linear = [(some.bridges[site].decoder.weight * some.bridges[site].scale).double() for some in (coupling, after)]
    least = literal(coupling, site, 0.7, linear[0], linear[1])
    assert least < 0.95 * literal(coupling, site, 0.7, linear[0], linear[0])
    generator = torch.Generator().manual_seed(site)
    for _ in range(8):
        step_ds = torch.randn(linear[0].shape, generator=generator).double()
        step_ds *= 1e-2 * linear[1].norm() / step_ds.norm()
        ends = [literal(coupling, site, 0.7, linear[0], linear[1] + sign * step_ds) for sign in (1, -1)]
        assert min(ends) > least
        assert abs(ends[0] - ends[1]) < 0.05 * (ends[0] + ends[1] - 2 * least)  # flat there


def test_what_stays(coupling: CoupledModels) -> None:
    """Encoders, the sparse model, where the mean goes; with next to no weight, everything."""
    after = refitted(coupling, 1.0)
    trace = coupling.sparse.run(TOKENS_BT)
    for site in range(coupling.n_sites):
        before, bridge = coupling.bridges[site], after.bridges[site]
        assert torch.equal(before.encoder.weight, bridge.encoder.weight)
        mean_s = trace.residuals[site].flatten(0, 1).mean(0)
        torch.testing.assert_close(before.decode(mean_s), bridge.decode(mean_s), rtol=1e-3, atol=1e-4)
        assert not torch.equal(before.decoder.weight, bridge.decoder.weight)
    hardly = refitted(coupling, 1e-9)
    for site in range(coupling.n_sites):
        torch.testing.assert_close(
            coupling.bridges[site].decoder.weight, hardly.bridges[site].decoder.weight, rtol=1e-3, atol=1e-4
        )


def test_a_site_that_nothing_depends_on_stays(coupling: CoupledModels) -> None:
    """A sparse model that answers the same whatever comes has gradients of 0: decoders stay finite."""
    sparse = copy.deepcopy(coupling.sparse)
    for parameter in sparse.parameters():
        parameter.data.zero_()
    other = refitted(replace(coupling, sparse=sparse), 1.0)
    for site in range(coupling.n_sites):
        assert torch.equal(other.bridges[site].decoder.weight, coupling.bridges[site].decoder.weight)


@torch.no_grad()
def test_a_decoder_that_would_answer_worse_stays(coupling: CoupledModels) -> None:
    """By the hybrid's KL, taken here from the models' own logits, on either side of the bound."""
    freely = refitted(coupling, 1.0)
    truth_btv = coupling.dense.run(TOKENS_BT).logits_btv.log_softmax(-1)
    plain = coupling.sparse.run(TOKENS_BT)

    def kl(logits_btv: torch.Tensor) -> float:
        return float(F.kl_div(logits_btv.log_softmax(-1), truth_btv, reduction="sum", log_target=True))

    def left(of: CoupledModels, site: int) -> float:
        return kl(of.dense.run(TOKENS_BT, Enter.at(site, of.bridges[site].decode(plain.residuals[site]))).logits_btv)

    rises = [(left(freely, site) - left(coupling, site)) / kl(plain.logits_btv) for site in range(coupling.n_sites)]
    bound = sum(sorted(rises)[1:3]) / 2  # two decoders are refitted
    guarded = refitted(coupling, 1.0, bound)
    assert sum(rise <= bound for rise in rises) == 2
    for site, rise in enumerate(rises):
        kept = freely if rise <= bound else coupling
        for one, other in zip(guarded.bridges[site].parameters(), kept.bridges[site].parameters(), strict=True):
            assert torch.equal(one, other), (site, rise)


def test_sites_may_be_taken_one_after_the_other(coupling: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a wide model, whose sums are large: the same decoders."""
    together = refitted(coupling, 1.0)
    monkeypatch.setattr("bridge.training.refit.MOST_BYTES", 1)
    for one, other in zip(together.bridges.parameters(), refitted(coupling, 1.0).bridges.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_on_a_gpu_the_decoders_are_those_of_the_cpu(coupling: CoupledModels) -> None:
    here = refitted(coupling, 1.0)
    there = replace(coupling, bridges=copy.deepcopy(coupling.bridges), sparse=copy.deepcopy(coupling.sparse))
    there = replace(there, dense=copy.deepcopy(coupling.dense))
    modules: tuple[Any, ...] = (there.dense.model, there.sparse, there.bridges)
    for part in modules:
        part.to("cuda")
    refit_decoders(there, TOKENS_BT, TOKENS_BT, 1.0)
    for one, other in zip(here.bridges.parameters(), there.bridges.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-2, atol=1e-3)
