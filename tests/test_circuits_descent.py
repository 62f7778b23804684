"""The descent of masks, on a loss whose answer is known: what every part that is missing costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bridge.circuits.descent import descend

COST_F = torch.cat([torch.tensor([1.0, 0.8, 0.6, 0.5]), torch.linspace(1e-4, 0.02, 36)])


class Additive:
    """loss(C) = sum of cost_f over what is not in C, with noise in every slope."""

    def __init__(self, cost_f: Tensor) -> None:
        self.cost_f = cost_f

    def loss(self, kept_f: Tensor) -> float:
        return float(self.cost_f[~kept_f].sum())

    def slopes_at(self, kept_f: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        return self.loss(kept_f), -self.cost_f + 1e-3 * torch.randn(len(kept_f), generator=generator)


EVERY_F = torch.ones(len(COST_F), dtype=torch.bool)


def test_what_costs_much_is_kept_and_what_costs_little_goes_as_the_bound_allows() -> None:
    lessons = Additive(COST_F)
    found = descend(lessons, lessons.loss, EVERY_F, 0.1, 300)
    kept_f = found.tau_f > 0
    assert found.met and lessons.loss(kept_f) <= 0.1
    assert bool(kept_f[:4].all())
    assert int(kept_f.sum()) <= 4 + 36 - 12  # the 18 cheapest may go
    assert float(COST_F[4:][kept_f[4:]].mean()) > 2 * float(COST_F[~kept_f].mean())


def test_prompts_that_cost_more_hold_the_mask() -> None:
    lessons, others = Additive(COST_F), Additive(COST_F * torch.tensor([1.0] * 4 + [4.0] * 36))
    found = descend(lessons, others.loss, EVERY_F, 0.1, 300)
    kept_f = found.tau_f > 0
    assert found.met and others.loss(kept_f) <= 0.1
    assert int(kept_f.sum()) >= 4 + 36 - 9  # the 9 cheapest may go, where the lessons alone would let 18


def test_no_part_but_candidates_and_tau_stays_clamped() -> None:
    lessons = Additive(COST_F)
    candidates_f = torch.arange(len(COST_F)) % 3 != 1
    seen: list[tuple[int, float]] = []

    def watch(step: int, tau_f: Tensor, loss: float) -> None:
        seen.append((step, loss))
        assert float(tau_f.abs().max()) <= 1 and bool((tau_f[~candidates_f] == -1).all())

    found = descend(lessons, lambda _: float("inf"), candidates_f, 0.1, 60, watch=watch)
    assert not found.met and [step for step, _ in seen] == [*range(1, 61)]
    assert not bool((found.tau_f > 0)[~candidates_f].any())


def test_a_seed_gives_the_same_mask_twice() -> None:
    lessons = Additive(COST_F)
    one, two, other = (descend(lessons, lessons.loss, EVERY_F, 0.1, 80, seed=seed).tau_f for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("steps", [1, 7])
def test_a_few_steps_are_steps_too(steps: int) -> None:
    lessons = Additive(COST_F)
    seen: list[int] = []
    found = descend(lessons, lessons.loss, EVERY_F, 0.1, steps, watch=lambda step, tau_f, loss: seen.append(step))
    assert len(seen) == steps and found.met  # nothing has gone yet
