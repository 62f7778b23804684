"""Levels: each circuit within the next, and what is said of it is what the gated model does."""

from __future__ import annotations

import pytest
import torch
from test_prune import SEQUENTIAL, ablations_of, random_model

from bridge.circuit import Ablations, ablation_gate
from bridge.levels import BOUNDS, nested_circuits
from bridge.prune import MISS_BOUND, SHARE, find_circuit


@pytest.fixture(scope="module")
def ablations() -> Ablations:
    corpus_bt = torch.randint(20, (16, 8), generator=torch.Generator().manual_seed(4))
    return ablations_of(random_model(SEQUENTIAL, 0.3), [1, 5, 9, 2, 8, 3], corpus_bt)


def test_levels_are_nested_and_measured(ablations: Ablations) -> None:
    kept_f = find_circuit(ablations, seed=1).kept_f
    levels, level_f = nested_circuits(ablations, kept_f)
    assert 2 < len(levels) <= len(BOUNDS) + 1
    assert [level.nodes for level in levels] == sorted({level.nodes for level in levels})
    assert torch.equal(level_f < len(levels), kept_f)
    whole_v = ablations.logits_v.softmax(-1)
    answer = float(ablations.question.difference(ablations.logits_v))
    for number, level in enumerate(levels):
        here_f = level_f <= number
        assert int(here_f.sum()) == level.nodes
        gate = ablation_gate(ablations.space.split(here_f), ablations.means)
        alone_v = ablations.sparse.run(ablations.tokens_1t, gate=gate).logits_btv[0, -1]
        kl = float((whole_v * (whole_v.log() - alone_v.log_softmax(-1))).sum())
        share = float(ablations.question.difference(alone_v)) / answer
        assert (level.kl, level.share) == (pytest.approx(kl, abs=1e-4), pytest.approx(share, abs=1e-3))
        miss = kl + MISS_BOUND / SHARE**2 * ((share - 1) * answer / max(abs(answer), 1)) ** 2
        assert miss <= max(BOUNDS) + 1e-3
    assert levels[-1].nodes == int(kept_f.sum())


def test_a_circuit_of_nothing_has_one_level(ablations: Ablations) -> None:
    levels, level_f = nested_circuits(ablations, torch.zeros(ablations.space.size, dtype=torch.bool))
    assert [level.nodes for level in levels] == [0] and bool((level_f == 1).all())
