"""The backbone: against sets counted by hand, chance against draws, and what deleting does against the losses given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bridge.studies.backbone import find_backbone, own_overlap

NODES = 40
CIRCUITS = {"a": {0, 1, 2, 3, 10}, "b": {0, 1, 2, 11, 12}, "c": {0, 1, 10, 13}, "d": {0, 5}}


def masks(circuits: dict[str, set[int]] = CIRCUITS) -> Tensor:
    return torch.stack([torch.isin(torch.arange(NODES), torch.tensor(sorted(kept))) for kept in circuits.values()])


def losses(gone_f: Tensor) -> list[float]:
    """Every deleted node costs a task a nat that has it, and half a nat one that has not."""
    return [1 + sum(1.0 if node in kept else 0.5 for node in gone_f.nonzero().flatten().tolist()) for kept in CIRCUITS.values()]


def test_the_backbone_is_what_half_of_the_circuits_have() -> None:
    found = find_backbone(list(CIRCUITS), masks(), losses)
    assert found is not None
    shared = {node for node in range(NODES) if sum(node in kept for kept in CIRCUITS.values()) >= 2}
    own = [kept - shared for kept in CIRCUITS.values()]
    assert found.nodes == len(shared) == 4 and found.own == tuple(map(len, own))
    assert found.shared == tuple(len(kept & shared) for kept in CIRCUITS.values())
    for a, gone in enumerate(own):
        for b, kept in enumerate(CIRCUITS.values()):
            assert found.rise[a][b] == pytest.approx(sum(1.0 if node in kept else 0.5 for node in gone))
            assert found.jaccard[a][b] == pytest.approx(len(gone & own[b]) / len(gone | own[b]))
    assert found.mean_cross_effect is not None and found.mean_cross_effect > 0
    text = found.text()
    assert "4 nodes are in at least half of 4 circuits" in text and all(name in text for name in CIRCUITS)


def test_random_sets_overlap_by_nothing_beyond_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    beyond = []
    for _ in range(500):
        one_f, other_f = (torch.randperm(NODES, generator=generator) < size for size in (12, 20))
        jaccard, over = own_overlap(one_f, other_f, NODES)
        assert jaccard == pytest.approx(int((one_f & other_f).sum()) / int((one_f | other_f).sum()))
        beyond.append(over)
    assert sum(beyond) / len(beyond) == pytest.approx(0, abs=0.02)
    assert own_overlap(one_f, one_f, NODES)[1] == pytest.approx(1)  # pyright: ignore[reportPossiblyUnboundVariable]


def test_two_tasks_have_no_backbone() -> None:
    assert find_backbone(["a", "b"], masks()[:2], lambda _: [0.0, 0.0]) is None
