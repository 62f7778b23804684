"""Interchange interventions on pairs: literal runs, a copy of the dense model reaches its ceiling, wrong bridges do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import planted_pairs, untrained
from support.studies_task_cases import answered, case_of, copied, decoded, dense_difference, some_nodes
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense
from bridge.data.task_tokens import TokenPairs
from bridge.evidence import patching
from bridge.evidence.carry import Transporter
from bridge.evidence.controls import matched_nodes
from bridge.evidence.measures import Measure
from bridge.evidence.patching import (
    Counterfactual,
    counterfactual_effect,
    dense_losses,
    dense_writes,
    other_pair_shares,
    patch_circuits,
    patching_measures,
    rotated_shares,
)
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import recording_gate
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.verdicts.null_couplings import shuffled_bridges


@pytest.fixture(scope="module")
def copy() -> CoupledModels:
    return copied()


def swapped(coupling: CoupledModels, pairs: TokenPairs) -> Counterfactual:
    return Counterfactual(pairs.counterfactual_bt, follow_dense(coupling, pairs.counterfactual_bt, pairs.last_b))


def measured(coupling: CoupledModels, kept_f: Tensor | None = None, pairs: TokenPairs | None = None) -> dict[str, Measure]:
    transporter, kept_f, pairs = case_of(coupling, kept_f, pairs)
    matched_cf = matched_nodes(transporter.masked, kept_f, 3, torch.Generator().manual_seed(0))
    measures = patching_measures(transporter, swapped(coupling, pairs), kept_f, matched_cf, 0.5, 0)
    return {measure.key: measure for measure in measures}


def changes_of(transporter: Transporter, row_value: Tensor) -> list[Tensor]:
    """Changes of the sparse residual whose entries tell their row."""
    tokens, width = transporter.masked.n_tokens, transporter.coupling.sparse.width
    return [row_value.view(-1, 1, 1).expand(-1, tokens, width)] * transporter.coupling.n_sites


@torch.no_grad()
@pytest.mark.parametrize("errors", [False, True])
def test_the_circuit_takes_its_values_on_each_counterfactual(dense: DenseModel, errors: bool) -> None:
    coupling = untrained(dense)
    transporter, kept_f, pairs = case_of(coupling, some_nodes(coupling), errors=errors)
    there = swapped(coupling, pairs)
    (moved_jb,) = dense_losses(transporter, patch_circuits(transporter, there, kept_f[None]))
    kept, means = transporter.masked.space.split(kept_f), transporter.masked.means
    for row in (0, 5, 11):
        length = int(pairs.last_b[row]) + 1
        prompt_1t, other_1t = (x[row : row + 1, :length] for x in (pairs.prompt_bt, pairs.counterfactual_bt))
        correct = (lambda at, x: x + means[at]) if errors else None
        values: dict = {}
        coupling.sparse.run(other_1t, gate=recording_gate(values), correct=correct)
        plain = coupling.sparse.run(prompt_1t, correct=correct)
        changed = coupling.sparse.run(
            prompt_1t, gate=lambda at, x, values=values: torch.where(kept[at][0], values[at], x), correct=correct
        )
        for site in range(coupling.n_sites):
            h_1td = transporter.dense.residuals[site][row : row + 1, :length]
            h_1td = h_1td + decoded(transporter, site, changed.residuals[site] - plain.residuals[site])
            expected = float(transporter.loss.model_b[row]) - dense_difference(coupling, pairs, row, Enter.at(site, h_1td))
            assert float(moved_jb[site, row]) * transporter.loss.span == pytest.approx(expected, abs=2e-3)
    swap_b = counterfactual_effect(transporter, there)
    for row in (0, 11):
        expected = dense_difference(coupling, pairs, row) + dense_difference(coupling, pairs.reversed(), row)
        assert float(swap_b[row]) == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_the_dense_models_own_change_is_all_but_the_embeddings(dense: DenseModel) -> None:
    coupling = untrained(dense)
    transporter, _, pairs = case_of(coupling)
    there = swapped(coupling, pairs)
    moved_jb = dense_writes(transporter, there)
    for row, site in ((0, 1), (11, 4)):
        length = int(pairs.last_b[row]) + 1
        here, other = transporter.dense.residuals, there.followed.dense.residuals
        entering = other[site] - (other[0] - here[0])
        enter = Enter.at(site, entering[row : row + 1, :length])
        expected = float(transporter.loss.model_b[row]) - dense_difference(coupling, pairs, row, enter)
        assert float(moved_jb[site, row]) * transporter.loss.span == pytest.approx(expected, abs=1e-3)
    assert not moved_jb[0].any()


def test_a_copy_of_the_dense_model_reaches_the_dense_patch(copy: CoupledModels) -> None:
    """All nodes, exact bridges: at every site what the dense model's own writes do."""
    measures = measured(copy)
    first = measures["patching"]
    assert first.value == pytest.approx(1)
    for point in first.points:
        assert point.values["circuit"] == pytest.approx(point.values["all nodes"])
        assert point.values["circuit"] == pytest.approx(point.values["dense"], abs=0.02)
    assert first.interval is not None and first.value is not None and first.interval[0] <= first.value <= first.interval[1]


def test_bridges_with_their_channels_shuffled_carry_nothing(copy: CoupledModels) -> None:
    shuffled, straight = (measured(each)["patching"] for each in (replace(copy, bridges=shuffled_bridges(copy, 0)), copy))
    values = [sum(point.values["all nodes"] for point in measure.points[1:]) for measure in (shuffled, straight)]
    assert abs(values[0]) < 0.5 * abs(values[1])


def test_half_of_the_nodes_carry_less_than_all_and_stand_beside_controls(copy: CoupledModels) -> None:
    measures = measured(copy, some_nodes(copy, 0.5))
    first = measures["patching"]
    assert first.value is not None and first.value < 1 and first.control is not None and first.control.draws == 3
    assert first.criterion is not None and first.criterion.control_bound == pytest.approx(first.value / 3)
    draws = {key: measure.control.draws for key, measure in measures.items() if measure.control is not None}
    assert draws == {"patching": 3, "patching_rotated": 100, "patching_pairs": 20}


def test_a_rotation_keeps_every_length_and_is_one_for_all(copy: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    transporter, kept_f, pairs = case_of(copy)
    (changes,) = patching.patch_circuits(transporter, swapped(copy, pairs), kept_f[None])
    seen = []
    monkeypatch.setattr(
        Transporter, "lost_by", lambda self, row_k, site_k, x: (seen.append((row_k, site_k, x)), torch.zeros(len(x)))[1]
    )
    rotated_shares(transporter, changes, torch.ones(12), torch.Generator().manual_seed(0), 4)
    row_k, site_k, turned_ktd = seen[3]
    assert row_k.tolist() == list(range(12)) and set(site_k.tolist()) == set(range(1, copy.n_sites))
    straight_ktd = torch.cat(
        [decoded(transporter, site, changes[site][row][None]) for row, site in zip(row_k.tolist(), site_k.tolist(), strict=True)]
    )
    flat, turned = (x.flatten(0, 1).double() for x in (straight_ktd, turned_ktd))
    torch.testing.assert_close(turned @ turned.T, flat @ flat.T, atol=1e-3, rtol=1e-3)  # all angles and lengths
    assert (turned - flat).norm() > 0.5 * flat.norm()


def test_others_pairs_changes_are_of_other_pairs_of_the_same_length(copy: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    transporter, _, pairs = case_of(copy)
    seen = []
    monkeypatch.setattr(
        patching, "_decoded", lambda transporter, changes, row_k, site_k: seen.append(row_k) or torch.zeros(len(row_k))
    )
    monkeypatch.setattr(Transporter, "lost_by", lambda self, row_k, site_k, x: (seen.append(row_k), torch.zeros(len(x)))[1])
    found = other_pair_shares(
        transporter, changes_of(transporter, torch.arange(12.0)), torch.ones(12), torch.Generator().manual_seed(0), 1
    )
    given_k, row_k = seen
    assert len(found) == 1 and (given_k != row_k).all() and len(set(given_k.tolist())) == 12
    assert (pairs.last_b[given_k] == pairs.last_b[row_k]).all()


def test_a_single_prompt_has_no_interval_and_no_other_pairs(copy: CoupledModels) -> None:
    measures = measured(copy, some_nodes(copy, 0.7), answered(copy.dense, planted_pairs(1)))
    assert set(measures) == {"patching"} and measures["patching"].interval is None
    few, _, _ = case_of(copy, None, answered(copy.dense, planted_pairs(2)))
    row_k, site_k = patching._draw_items(few, 0)
    assert row_k.tolist() == [0] * 4 + [1] * 4 and site_k.tolist() == [1, 2, 3, 4] * 2


def test_a_counterfactual_that_changes_nothing_cannot_be_tested(copy: CoupledModels) -> None:
    pairs = planted_pairs(4)
    measures = measured(copy, pairs=replace(pairs, counterfactual_bt=pairs.prompt_bt))
    assert len(measures) == 3 and all(measure.value is measure.passed is None for measure in measures.values())
    assert "by only 0.00 nats" in measures["patching"].note
