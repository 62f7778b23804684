"""The sampled objective against the literal one, and both against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, untrained

from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from bridge.models.residual import EMBEDDING, Enter
from bridge.models.sparse import Location
from bridge.recipe import Losses
from bridge.training.objective import STAYS, Objective, Splice, _Target, draw_splice, random_ablation

TOKENS_BT = torch.randint(0, VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(3))


def objective(coupling: CoupledModels, **losses: float) -> Objective:
    return Objective(coupling.dense, coupling.sparse, coupling.bridges, Losses(**losses))  # pyright: ignore[reportArgumentType]


def gradient(module: Objective, splice: Splice | None) -> torch.Tensor:
    module.zero_grad()
    module(TOKENS_BT, splice)["total"].backward()
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in module.parameters()])


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    p, q = torch.distributions.Categorical(logits=p_logits), torch.distributions.Categorical(logits=q_logits)
    return torch.distributions.kl_divergence(p, q)


def test_sampled_gradient_is_the_literal_one_in_expectation(dense: DenseModel) -> None:
    """With two transitions off, over many draws; the tolerance is the spread of the draws."""
    coupling = untrained(dense)
    weights = {
        "ce": 0.7,
        "kl": 1.1,
        "nmse_encoder": 0.4,
        "nmse_decoder": 0.6,
        "hybrid_in": 1.3,
        "hybrid_out": 0.9,
        "hybrid_both": 0,
    }
    module = objective(coupling, **weights)
    literal = gradient(module, None)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(literal.numel(), 24, generator=generator)  # the gradient seen along 24 fixed directions
    draws = torch.stack(
        [gradient(module, draw_splice(4, coupling.n_sites, module.losses, generator)) @ probes for _ in range(400)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - literal @ probes) / error
    # 24 normal deviates exceed 4 with probability 24 * 6e-5; the seed is fixed, so this is no flake
    assert z.abs().max() < 4, z
    assert z.square().mean() < 2.5, z
    # the test has the power to see a term that is wrong by a fifth
    wrong = gradient(objective(coupling, **{**weights, "hybrid_in": 1.3 * 1.2}), None)
    assert ((draws.mean(0) - wrong @ probes) / error).abs().max() > 4


def test_without_bridges_the_dense_models_answers_are_learnt_in_one_pass(coupling: CoupledModels) -> None:
    """KL and CE as the literal objective has them, and no term that a bridge has part in."""
    alone = Losses().without_bridges()
    assert not alone.coupled and alone.kl == 1
    terms = Objective(coupling.dense, coupling.sparse, coupling.bridges, alone)(TOKENS_BT, None)
    literal = objective(coupling)(TOKENS_BT, None)
    assert set(terms) == {"total", "ce", "kl"}
    torch.testing.assert_close(terms["kl"], literal["kl"])
    torch.testing.assert_close(terms["total"], literal["ce"] + literal["kl"])


def test_literal_terms_are_the_sums_of_the_paper(coupling: CoupledModels) -> None:
    terms = objective(coupling)(TOKENS_BT, None)
    dense, sparse = coupling.dense.run(TOKENS_BT), coupling.sparse.run(TOKENS_BT)
    sites = range(coupling.n_sites)
    into = [coupling.dense_to_sparse(TOKENS_BT, dense.residuals, site) for site in sites]
    out = [coupling.sparse_to_dense(TOKENS_BT, sparse.residuals, site) for site in sites]
    log_p = sparse.logits_btv[:, :-1].log_softmax(-1)
    by_hand = {
        "ce": -log_p.gather(-1, TOKENS_BT[:, 1:, None]).mean(),
        "kl": kl(dense.logits_btv, sparse.logits_btv).mean(),
        "hybrid_in": torch.stack([kl(dense.logits_btv, logits).mean() for logits in into]).mean(),
        "hybrid_out": torch.stack([kl(dense.logits_btv, logits).mean() for logits in out]).mean(),
    }
    for name, value in by_hand.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    errors = []
    for site in sites:
        for row in range(4):
            target = dense.residuals[site][row]
            guess = coupling.bridges[site].decode(sparse.residuals[site][row])
            spread = (target - target.mean(0)).square().sum(-1)
            errors.append(((guess - target).square().sum(-1) / spread).mean())
    torch.testing.assert_close(terms["nmse_decoder"], torch.stack(errors).mean(), rtol=1e-3, atol=1e-4)


def test_sampled_terms_are_those_of_the_rows_that_carry_them(coupling: CoupledModels) -> None:
    """Every row's splice, run on its own, gives what the one pass gives."""
    splice = Splice(enter=(3, EMBEDDING, 1, EMBEDDING), leave=(STAYS, 2, 4, 0))
    terms = objective(coupling)(TOKENS_BT, splice)
    dense, bridges = coupling.dense, coupling.bridges

    def row(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, enter, leave = TOKENS_BT[index : index + 1], splice.enter[index], splice.leave[index]
        truth = dense.run(tokens)
        entry = None if enter == EMBEDDING else Enter.at(enter, bridges[enter].encode(truth.residuals[enter]))
        trace = coupling.sparse.run(tokens, entry)
        left = torch.tensor(torch.nan)
        if leave != STAYS:
            entry = Enter.at(leave, bridges[leave].decode(trace.residuals[leave]))
            left = kl(truth.logits_btv, dense.run(tokens, entry).logits_btv).mean()
        return kl(truth.logits_btv, trace.logits_btv).mean(), left

    rows = [row(index) for index in range(4)]
    expected = {
        "kl": (rows[1][0] + rows[3][0]) / 2,
        "hybrid_in": (rows[0][0] + rows[2][0]) / 2,
        "hybrid_out": (rows[1][1] + rows[3][1]) / 2,
        "hybrid_both": rows[2][1],
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_carried_gives_the_other_rows_answers(coupling: CoupledModels) -> None:
    """Rows from the embedding in a circle: the next one's dense residual, moved by the difference of the sparse ones."""
    splice = Splice(enter=(EMBEDDING, 1, EMBEDDING, EMBEDDING), leave=(2, STAYS, 4, 0))
    terms = objective(coupling, carried=1)(TOKENS_BT, splice)
    dense, sparse = coupling.dense.run(TOKENS_BT), coupling.sparse.run(TOKENS_BT)
    expected = []
    for row, other, site in ((0, 2, 2), (2, 3, 4), (3, 0, 0)):
        decode = coupling.bridges[site].decode
        change = decode(sparse.residuals[site][row]) - decode(sparse.residuals[site][other])
        entry = Enter.at(site, (dense.residuals[site][other] + change)[None])
        moved = coupling.dense.run(TOKENS_BT[row : row + 1], entry).logits_btv
        expected.append(kl(dense.logits_btv[row : row + 1], moved).mean())
    torch.testing.assert_close(terms["carried"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    without = objective(coupling)(TOKENS_BT, splice)
    assert "carried" not in without
    for name in set(without) - {"total"}:
        torch.testing.assert_close(terms[name], without[name])


def test_ablated_rows_run_once_more_with_random_nodes_at_their_means(coupling: CoupledModels) -> None:
    """As masks and means written out give it; no node ablated is the plain KL."""
    splice = Splice(enter=(3, EMBEDDING, 1, EMBEDDING), leave=(STAYS, 2, 4, 0), ablation=(1, 2, 3, 4))
    terms = objective(coupling, ablated=1, ablated_most=0.8)(TOKENS_BT, splice)
    rows_bt, apply, ablated = TOKENS_BT[[1, 3]], random_ablation((2, 4), 0.8), list[float]()

    def by_hand(location: Location, x_btn: torch.Tensor) -> torch.Tensor:
        replaced_btn = apply(location, x_btn) != x_btn
        ablated.append(float(replaced_btn.float().mean()))
        return x_btn * ~replaced_btn + x_btn.mean((0, 1)) * replaced_btn

    logits_btv = coupling.sparse.run(rows_bt, gate=by_hand).logits_btv
    expected = kl(coupling.dense.run(rows_bt).logits_btv, logits_btv).mean()
    torch.testing.assert_close(terms["ablated"], expected, rtol=1e-4, atol=1e-5)
    assert min(ablated) > 0.05 and terms["ablated"] != terms["kl"]
    whole = objective(coupling, ablated=1, ablated_most=1e-9)(TOKENS_BT, splice)
    torch.testing.assert_close(whole["ablated"], whole["kl"])
    terms["ablated"].backward()
    assert all(p.grad is not None for p in coupling.sparse.blocks.parameters())
    coupling.sparse.zero_grad()


def test_random_ablation_follows_the_seed_of_each_row() -> None:
    """A row's nodes do not depend on the rows beside it, and at most the share asked for is ablated."""
    at, x_btn = Location(0, "mlp_act"), torch.randn(3, 50, 400)
    together = random_ablation((7, 8, 7), 0.3)(at, x_btn) != x_btn
    assert torch.equal(together[0], together[2]) and not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], random_ablation((8,), 0.3)(at, x_btn[1:2]) != x_btn[1:2])
    assert 0 < together.float().mean((1, 2)).max() < 0.32


def test_a_splice_draws_seeds_only_for_the_loss_that_uses_them() -> None:
    plain, ablated = (draw_splice(8, 5, Losses(ablated=weight), torch.Generator().manual_seed(0)) for weight in (0, 1))
    assert (plain.enter, plain.leave, plain.ablation) == (ablated.enter, ablated.leave, ())
    assert len(set(ablated.ablation)) == 8
    assert ablated.rows(2, 4).ablation == ablated.ablation[2:4]


def test_a_temperature_is_that_of_both_answers_in_hybrid_terms_alone(coupling: CoupledModels) -> None:
    splice = Splice(enter=(3, EMBEDDING, 1, EMBEDDING), leave=(STAYS, 2, 4, 0))
    for cut in (splice, None):
        cold, warm = (objective(coupling, temperature=t)(TOKENS_BT, cut) for t in (1.0, 3.0))
        for name in ("ce", "kl", "nmse_encoder", "nmse_decoder"):
            torch.testing.assert_close(warm[name], cold[name])
    warm = objective(coupling, temperature=3.0)(TOKENS_BT, splice)
    dense, sparse = coupling.dense.run(TOKENS_BT), coupling.sparse.run(TOKENS_BT)
    entered = [
        9 * kl(dense.logits_btv[row] / 3, coupling.dense_to_sparse(TOKENS_BT, dense.residuals, site)[row] / 3).mean()
        for row, site in ((0, 3), (2, 1))
    ]
    left = [
        9 * kl(dense.logits_btv[row] / 3, coupling.sparse_to_dense(TOKENS_BT, sparse.residuals, site)[row] / 3).mean()
        for row, site in ((1, 2), (3, 0))
    ]
    torch.testing.assert_close(warm["hybrid_in"], torch.stack(entered).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(warm["hybrid_out"], torch.stack(left).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_of_a_batch_average_to_the_whole(processes: int, coupling: CoupledModels) -> None:
    """Processes with a share of the rows each, and the whole batch's counts, compute what one would: values and gradients.

    Of four processes every one has a row that enters, or one that begins at its tokens, and none has both.
    """
    module = objective(coupling)
    splice = draw_splice(4, coupling.n_sites, module.losses, torch.Generator().manual_seed(5))
    whole = module(TOKENS_BT, splice)
    expected = gradient(module, splice)
    counts = [count / processes for count in splice.counts()]
    rows = 4 // processes
    shares = [module(TOKENS_BT[start : start + rows], splice.rows(start, start + rows), counts) for start in range(0, 4, rows)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(share[name] for share in shares if name in share) / processes, value, rtol=1e-4, atol=1e-5)
    module.zero_grad()
    torch.stack([share["total"] for share in shares]).mean().backward()
    found = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in module.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_sites_are_drawn_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    enters, leaves = torch.zeros(5), torch.zeros(5)
    for _ in range(500):
        splice = draw_splice(8, 5, Losses(), generator)
        assert splice.counts()[0] == 4
        for enter, leave in zip(splice.enter, splice.leave, strict=True):
            if enter != EMBEDDING:
                enters[enter] += 1
                assert leave == STAYS if enter == 4 else leave > enter
            else:
                leaves[leave] += 1
    assert (enters / enters.sum() - 0.2).abs().max() < 0.02
    assert (leaves / leaves.sum() - 0.2).abs().max() < 0.02


def test_encoder_error_trains_the_encoder_alone(coupling: CoupledModels) -> None:
    for splice in (None, draw_splice(4, coupling.n_sites, Losses(), torch.Generator().manual_seed(0))):
        module = objective(coupling, ce=0, kl=0, nmse_decoder=0, hybrid_in=0, hybrid_out=0, hybrid_both=0)
        module.zero_grad()
        module(TOKENS_BT, splice)["total"].backward()
        touched = {name for name, p in module.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert touched and all("encoder" in name for name in touched)


def test_uncoupled_is_text_alone(coupling: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every bridge term at zero the dense model is not run, and no bridge gets a gradient."""
    module = Objective(coupling.dense, coupling.sparse, coupling.bridges, Losses().uncoupled())
    monkeypatch.setattr(DenseModel, "run", lambda *_: pytest.fail("the dense model was run"))
    terms = module(TOKENS_BT, None)
    assert set(terms) == {"total", "ce"}
    terms["total"].backward()
    assert all(p.grad is None for p in coupling.bridges.parameters())


@pytest.mark.parametrize("piece", [7, 1 << 22])
@pytest.mark.parametrize("inside", [False, True])
def test_losses_in_pieces_are_torchs_in_one(piece: int, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.training.objective.PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    target_btv, tokens_bt = 3 * torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    logits_btv = 3 * torch.randn(3, 5, 11, generator=generator)
    logits_btv = (logits_btv.transpose(1, 2).contiguous().transpose(1, 2) if inside else logits_btv).requires_grad_()
    weight_b = torch.tensor([0.3, -1.0, 2.0])
    kl_b, ce_b = _Target(target_btv).losses(logits_btv, tokens_bt)
    log_q, log_p = logits_btv.log_softmax(-1), target_btv.log_softmax(-1)
    expected_kl_b = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    expected_ce_b = -log_q[:, :-1].gather(-1, tokens_bt[:, 1:, None]).squeeze(-1).mean(-1)
    assert torch.allclose(kl_b, expected_kl_b, atol=1e-5) and torch.allclose(ce_b, expected_ce_b, atol=1e-5)
    (found,) = torch.autograd.grad(((kl_b + 0.7 * ce_b) * weight_b).sum(), logits_btv)
    (expected,) = torch.autograd.grad(((expected_kl_b + 0.7 * expected_ce_b) * weight_b).sum(), logits_btv)
    assert torch.allclose(found, expected, atol=1e-5)
    rows = torch.tensor([2, 0])
    some_b = _Target(target_btv).divergence(logits_btv[:2], rows)
    again = target_btv[rows].log_softmax(-1)
    assert torch.allclose(some_b, (again.exp() * (again - log_q[:2])).sum(-1).mean(-1), atol=1e-5)
