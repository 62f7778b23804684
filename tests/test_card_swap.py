"""Counterfactual transport: it is what a pinned run says, a copy of the dense model reaches its ceiling, wrong bridges do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge.card.card import CardMeasure
from bridge.card.case import Case, numbers
from bridge.card.swap import Swap, _turned, swap_measures
from conftest import planted_pairs, untrained
from test_card_case import answered, case_of, copied, dense_difference, some_nodes

from bridge.bridges import Coupling
from bridge.circuit import recording_gate
from bridge.dense import DenseModel
from bridge.evidence.null_couplings import shuffled_bridges
from bridge.residual import Enter


@pytest.fixture(scope="module")
def copy() -> Coupling:
    return copied()


def measured(case: Case) -> dict[str, CardMeasure]:
    return {measure.name: measure for measure in swap_measures(case)}


@torch.no_grad()
def test_the_whole_circuits_change_is_that_of_a_run_with_its_nodes_pinned(dense: DenseModel) -> None:
    """Circuit nodes at their value on the counterfactual, all others at that on the prompt, embeddings the prompt's."""
    coupling = untrained(dense)
    case = case_of(coupling, some_nodes(coupling))
    effect_jb = Swap(case).effects(Swap(case).whole(case.kept_f))
    for row in (0, 5, 11):
        length = int(case.pairs.last_b[row]) + 1
        prompt_1t, other_1t = (x[row : row + 1, :length] for x in (case.pairs.prompt_bt, case.pairs.counterfactual_bt))
        here, there = {}, {}
        plain = coupling.sparse.run(prompt_1t, gate=recording_gate(here))
        coupling.sparse.run(other_1t, gate=recording_gate(there))
        pinned = coupling.sparse.run(
            prompt_1t, gate=lambda at, _x, here=here, there=there: torch.where(case.kept[at], there[at], here[at])
        )
        for site in range(1, coupling.n_sites):
            decode = coupling.bridges[site].decode
            h_1td = case.dense.residuals[site][row : row + 1, :length]
            h_1td = h_1td + decode(pinned.residuals[site]) - decode(plain.residuals[site])
            expected = dense_difference(coupling, case.pairs, row, Enter.at(site, h_1td)) - float(case.answer_b[row])
            assert effect_jb[site - 1, row] == pytest.approx(expected, abs=2e-3)


@torch.no_grad()
def test_a_sublayers_own_change_is_the_difference_of_two_sites(dense: DenseModel) -> None:
    coupling = untrained(dense)
    swap = Swap(case_of(coupling, some_nodes(coupling)))
    own = swap.own(swap.case.kept_f)
    total_bts = torch.stack(own[:3]).sum(0)
    expected_btd = total_bts @ coupling.bridges[3].decoder.weight.T * coupling.bridges[3].scale
    torch.testing.assert_close(swap.whole(swap.case.kept_f)[2], expected_btd, atol=1e-4, rtol=1e-3)
    alone_btd = own[2] @ coupling.bridges[3].decoder.weight.T * coupling.bridges[3].scale
    torch.testing.assert_close(swap.by_sublayer(swap.case.kept_f)[2], alone_btd, atol=1e-4, rtol=1e-3)


def test_a_copy_of_the_dense_model_reaches_the_dense_patch(copy: Coupling) -> None:
    """All nodes, exact bridges: at every site what the dense model's own writes do; and no other nodes are left for a control."""
    measures = measured(case_of(copy))
    first = measures["share of the swap carried"]
    assert first.ceiling is not None and first.value == pytest.approx(first.ceiling.mean) and first.passed
    for point in first.points:
        assert point.values["circuit"] == pytest.approx(point.values["dense"], abs=0.02)
    others = measures["against other nodes"]
    assert others.passed is None and others.control is None and "no node outside" in others.note
    assert first.interval is not None and first.value is not None and first.interval[0] <= first.value <= first.interval[1]


def test_bridges_with_their_channels_shuffled_carry_nothing(copy: Coupling) -> None:
    shuffled = measured(case_of(replace(copy, bridges=shuffled_bridges(copy, 0))))
    straight = measured(case_of(copy))
    name = "share of the swap carried"
    assert shuffled[name].passed is False
    values = [m[name].value for m in (shuffled, straight)]
    assert values[0] is not None and values[1] is not None and abs(values[0]) < 0.5 * abs(values[1])


def test_half_of_the_nodes_carry_less_than_all(copy: Coupling) -> None:
    case = case_of(copy, some_nodes(copy, 0.5))
    measures = measured(case)
    first = measures["share of the swap carried"]
    assert first.value is not None and first.ceiling is not None and first.value < first.ceiling.mean
    others = measures["against other nodes"]
    assert others.control is not None and others.control.draws == 20 and others.passed is not None
    mismatched = measures["against other pairs' changes"].control
    assert mismatched is not None and mismatched.draws == 20


def test_a_rotation_keeps_every_length_and_is_one_for_all(copy: Coupling, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(copy)
    swap = Swap(case)
    change_jbtd, seen = swap.whole(case.kept_f), []
    monkeypatch.setattr(Case, "moved", lambda self, row_i, site_i, x: (seen.append((row_i, site_i, x)), torch.zeros(len(x)))[1])
    _turned(swap, change_jbtd, 3, torch.Generator().manual_seed(0))
    row_i, site_i, turned_itd = seen[0]
    assert row_i.tolist() == list(range(12)) and set(site_i.tolist()) == set(range(1, copy.n_sites))
    straight_itd = change_jbtd[site_i - 1, row_i]
    flat, turned = (x.flatten(0, 1).double() for x in (straight_itd, turned_itd))
    torch.testing.assert_close(turned @ turned.T, flat @ flat.T, atol=1e-3, rtol=1e-3)  # all angles and lengths
    assert (turned - flat).norm() > 0.5 * flat.norm()


def test_others_pairs_changes_are_of_other_pairs_of_the_same_length(copy: Coupling, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge.card.swap import _mismatched

    swap = Swap(case_of(copy))
    rows = torch.arange(12.0).view(1, 12, 1, 1).expand(copy.n_sites - 1, 12, 6, 16)
    seen = []
    monkeypatch.setattr(Case, "moved", lambda self, row_i, site_i, x: (seen.append((row_i, x)), torch.zeros(len(x)))[1])
    _mismatched(swap, rows, 0, torch.Generator().manual_seed(0))
    row_i, change_itd = seen[0]
    given_i = change_itd[:, 0, 0].long()
    last_b = swap.case.pairs.last_b
    assert (given_i != row_i).all() and (last_b[given_i] == last_b[row_i]).all() and len(set(given_i.tolist())) == 12


def test_a_single_prompt_has_every_site_in_a_draw_and_no_interval(copy: Coupling) -> None:
    pairs = answered(copy.dense, planted_pairs(1))
    case = case_of(copy, some_nodes(copy, 0.7), pairs)
    row_i, site_i = Swap(case).items(0)
    assert row_i.tolist() == [0] * 4 and site_i.tolist() == [1, 2, 3, 4]
    measures = measured(case)
    assert measures["share of the swap carried"].interval is None
    assert "against other pairs' changes" not in measures and "no others" in measures["share of the swap carried"].note


def test_a_counterfactual_that_changes_nothing_cannot_be_tested(copy: Coupling) -> None:
    pairs = planted_pairs(4)
    (only,) = swap_measures(case_of(copy, pairs=replace(pairs, counterfactual_bt=pairs.prompt_bt)))
    assert only.value is None and only.passed is None and "hardly changes" in only.note


def test_numbers_are_doubles() -> None:
    assert numbers(torch.ones(2)).dtype == np.float64
