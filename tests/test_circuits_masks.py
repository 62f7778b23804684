"""Masks: their gradient is the literal one, they find what was planted, and the order of the prompts does not matter."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCABULARY, planted_pairs, planted_sparse, untrained
from torch import Tensor

from bridge.circuit import kl
from bridge.circuits.masks import Aim, Goal, MaskError, NodeLessons, divided, drawn, find_nodes, masked_loss, spread
from bridge.circuits.subject import SparseSubject, masked_gate
from bridge.dense import DenseModel
from bridge.sparse import Location

WORK = 3e9


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def planted(dense: DenseModel) -> SparseSubject:
    return SparseSubject.over(planted_sparse(dense, decoys=4), corpus())


@pytest.fixture
def random(dense: DenseModel) -> SparseSubject:
    return SparseSubject.over(untrained(dense).sparse.requires_grad_(False), corpus())


def wanted(subject: SparseSubject) -> set[str]:
    return {"L0.mlp_in[0]", "L0.mlp_in[1]", "L0.mlp_act[0]", "L0.mlp_act[1]", "L0.mlp_out[2]", "L0.mlp_out[3]"}


def names(subject: SparseSubject, kept_f: Tensor) -> set[str]:
    return {subject.space.node(place).name for place in kept_f.nonzero().flatten().tolist()}


def test_a_masks_gradient_is_what_the_loss_says_of_value_minus_mean(random: SparseSubject) -> None:
    goal = Goal(random, planted_pairs(), Aim("paper"))
    every_f = torch.ones(random.space.size, dtype=torch.bool)
    taken: dict[Location, Tensor] = {}

    def keep(location: Location, x_btn: Tensor) -> Tensor:
        taken[location] = x_btn if x_btn.requires_grad else x_btn.requires_grad_()
        taken[location].retain_grad()
        return taken[location]

    with torch.enable_grad():
        goal.pairs.loss(random.logits(goal.pairs, keep)).mean().backward()
    parts = {}
    for location, x_btn in taken.items():
        gradient = torch.zeros_like(x_btn) if x_btn.grad is None else x_btn.grad
        parts[location] = (gradient * (x_btn.detach() - random.means[location])).sum((0, 1))[None]
    torch.testing.assert_close(goal.slopes(every_f), random.space.join(parts), atol=1e-5, rtol=1e-4)


def test_company_hides_a_nodes_own_mask(random: SparseSubject) -> None:
    goal = Goal(random, planted_pairs(), Aim())
    mask_f = torch.rand(random.space.size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    everyone_bf = torch.ones_like(goal.company_bf)
    with torch.enable_grad():
        masked_loss(goal, mask_f, torch.arange(len(goal.pairs)), everyone_bf).backward()
    in_company = mask_f.grad
    mask_f = mask_f.detach().requires_grad_()
    with torch.enable_grad():
        logits_bv = random.logits(goal.pairs, masked_gate(random, mask_f))
        off = (goal.pairs.difference(logits_bv).mean() - goal.pairs.difference(goal.whole_bv).mean()) / max(
            1.0, abs(float(goal.pairs.difference(goal.whole_bv).mean()))
        )
        (kl(goal.whole_bv, logits_bv).mean() / 2 + goal.bound / 2 * (off / 0.05) ** 2).backward()
    assert in_company is not None and mask_f.grad is not None
    torch.testing.assert_close(in_company, mask_f.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", ["superset", "paper"])
def test_a_circuits_loss_is_its_definition(random: SparseSubject, objective: str) -> None:
    pairs = planted_pairs(lengths=(4, 6))
    goal = Goal(random, pairs, Aim(objective, 1.0))  # pyright: ignore[reportArgumentType]
    kept_cf = torch.rand(3, random.space.size, generator=torch.Generator().manual_seed(1)) < 0.5
    for kept_f, loss in zip(kept_cf, goal.loss(kept_cf), strict=True):
        alone = company = lost = 0.0
        for row in range(len(pairs)):
            one = goal.pairs.rows(torch.tensor([row]))
            whole_1v = random.logits(one)
            alone_1v = random.logits(one, masked_gate(random, kept_f))
            company_1v = random.logits(one, masked_gate(random, kept_f | goal.company_bf[row]))
            if objective == "paper":
                alone += float(one.loss(alone_1v)) / len(pairs)
                company = alone
            else:
                alone += float(kl(whole_1v, alone_1v)) / len(pairs)
                company += float(kl(whole_1v, company_1v)) / len(pairs)
                lost += float(one.difference(whole_1v) - one.difference(alone_1v)) / len(pairs)
        whole = float(pairs.difference(random.logits(pairs)).mean())
        off = abs(lost) / max(1, abs(whole))
        assert float(loss) == pytest.approx(max(alone, (alone + company) / 2, off / 0.05), abs=1e-4)


def test_deleting_a_node_alone_costs_what_it_costs(planted: SparseSubject) -> None:
    goal = Goal(planted, planted_pairs(), Aim())
    kept_f = torch.ones(planted.space.size, dtype=torch.bool)
    node_k = torch.randperm(planted.space.size, generator=torch.Generator().manual_seed(0))[:6]
    without_cf = kept_f.repeat(6, 1)
    without_cf[torch.arange(6), node_k] = False
    torch.testing.assert_close(goal.without(kept_f, node_k), goal.loss(without_cf), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", ["superset", "paper"])
def test_what_was_planted_is_found(planted: SparseSubject, objective: str) -> None:
    train, validation = planted_pairs(32).both(), planted_pairs(16, seed=1).both()
    aim = Aim(objective, 0.05)  # pyright: ignore[reportArgumentType]
    found = find_nodes(planted, *divided(train, validation), aim, work=2 * WORK)
    assert found.loss <= aim.bound and found.complete
    kept = names(planted, found.kept_f)
    if objective == "superset":
        assert kept == wanted(planted)
    else:  # one of the two neurons is enough to tell the answers apart
        assert kept and kept < wanted(planted)


def test_the_order_of_the_prompts_changes_nothing(random: SparseSubject) -> None:
    train, validation = planted_pairs(12, (4, 6)).both(), planted_pairs(8, (5,), seed=1).both()
    generator = torch.Generator().manual_seed(3)
    shuffled = [pairs.rows(torch.randperm(len(pairs), generator=generator)) for pairs in (train, validation)]
    one = find_nodes(random, *divided(train, validation), Aim(target=0.05), work=WORK / 4)
    other = find_nodes(random, *divided(*shuffled), Aim(target=0.05), work=WORK / 4)
    assert torch.equal(one.kept_f, other.kept_f) and torch.equal(one.tau_f, other.tau_f) and one.loss == other.loss
    assert len(spread(train, 5)) == 5 and len(spread(train, 500)) == len(train)


def test_a_descents_lessons_are_the_loss_and_its_slope_in_random_company(random: SparseSubject) -> None:
    goal = Goal(random, planted_pairs(), Aim())
    kept_f = torch.rand(random.space.size, generator=torch.Generator().manual_seed(0)) < 0.6
    loss, slope_f = NodeLessons(goal, 0).slopes_at(kept_f, torch.Generator().manual_seed(1))
    row_b, company_bf = drawn(goal, NodeLessons(goal, 0).rows, torch.Generator().manual_seed(1))
    mask_f = kept_f.float().requires_grad_()
    with torch.enable_grad():
        literal = masked_loss(goal, mask_f, row_b, company_bf)
        literal.backward()
    assert loss == float(literal.detach()) and mask_f.grad is not None
    assert torch.equal(slope_f, mask_f.grad) and len(set(company_bf.float().mean(1).tolist())) > 1


def test_an_aim_that_cannot_be_met_is_refused(random: SparseSubject) -> None:
    with pytest.raises(MaskError, match="objective 'best' is not known; give superset or paper"):
        Aim("best")  # pyright: ignore[reportArgumentType]
    for target in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MaskError, match="give a positive number"):
            Aim(target=target)
    with pytest.raises(MaskError, match=r"no circuit within the target of 1e-06 was found .* raise --target-loss"):
        find_nodes(random, planted_pairs().both(), planted_pairs().both(), Aim("paper", 1e-6), work=0)
