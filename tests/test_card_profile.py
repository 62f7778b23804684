"""The effect profile: a node's two effects by hand, and a copy of the dense model, in which both are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bridge.card.profile import _correlated, effects, profile_measures
from conftest import untrained
from test_card_case import case_of, copied, dense_difference, some_nodes

from bridge.circuit import Node
from bridge.dense import DenseModel
from bridge.residual import Enter
from bridge.sparse import Location


@torch.no_grad()
def test_effects_are_those_of_one_node_deleted_in_one_prompt(dense: DenseModel) -> None:
    coupling = untrained(dense)
    case = case_of(coupling)
    nodes = [Node(Location(0, "v"), 3), Node(Location(0, "mlp_act"), 17), Node(Location(1, "attn_out"), 5)]
    row_b = torch.tensor([0, 2, 10])
    sparse_pb, dense_pb = effects(case, nodes, row_b)
    means = case.whole.means
    for p, node in enumerate(nodes):

        def gate(at, x_btn, node=node):
            x_btn = x_btn.clone()
            if at == node.location:
                x_btn[..., node.index] = means[at][node.index]
            return x_btn

        for b, row in enumerate(row_b.tolist()):
            length = int(case.pairs.last_b[row]) + 1
            tokens_1t = case.pairs.prompt_bt[row : row + 1, :length]
            plain, without = coupling.sparse.run(tokens_1t), coupling.sparse.run(tokens_1t, gate=gate)
            answer, wrong = case.pairs.answer_bk[row, 0], case.pairs.wrong_bk[row, 0]
            change_v = (plain.logits_btv - without.logits_btv)[0, -1]
            assert sparse_pb[p, b] == pytest.approx(float(change_v[answer] - change_v[wrong]), abs=1e-4)
            site = coupling.sparse.site(node.location) + 1
            decode = coupling.bridges[site].decode
            h_1td = case.dense.residuals[site][row : row + 1, :length]
            h_1td = h_1td + decode(without.residuals[site]) - decode(plain.residuals[site])
            expected = float(case.answer_b[row]) - dense_difference(coupling, case.pairs, row, Enter.at(site, h_1td))
            assert dense_pb[p, b] == pytest.approx(expected, abs=1e-3)


def test_in_a_copy_effects_are_the_same() -> None:
    coupling = copied()
    (measure,) = profile_measures(case_of(coupling, some_nodes(coupling, 0.5)))
    assert measure.passed and measure.value is not None and measure.value > 0.97
    assert measure.interval is not None and measure.ceiling is not None and measure.control is not None
    assert measure.control.bar < measure.value
    inside = [point.values["inside"] for point in measure.points]
    assert 0 < sum(inside) < len(inside)


def test_what_cannot_be_ranked_is_not() -> None:
    coupling = copied()
    empty = case_of(coupling, torch.zeros(sum(coupling.sparse.locations().values()), dtype=torch.bool))
    (measure,) = profile_measures(empty)
    assert measure.passed is None and "too few" in measure.note
    nodes = [Node(Location(0, "v"), index) for index in range(12)]
    nothing = np.zeros((12, 4))
    flat = _correlated(nothing, np.ones((12, 4)), np.zeros(12), np.ones(12, dtype=bool), nodes, 0)
    assert flat.passed is None and "sparse model" in flat.note


def test_an_unrelated_profile_fails() -> None:
    generator = np.random.default_rng(0)
    nodes = [Node(Location(0, "v"), index) for index in range(60)]
    effect_pb = generator.normal(size=(60, 1)) + 0.1 * generator.normal(size=(60, 16))
    inside = np.arange(60) < 30
    other = _correlated(effect_pb, generator.permutation(effect_pb), np.arange(60) % 3, inside, nodes, 0)
    assert other.passed is False
    same = _correlated(effect_pb, effect_pb + 0.1 * generator.normal(size=(60, 16)), np.arange(60) % 3, inside, nodes, 0)
    assert same.passed and same.interval is not None and same.value is not None
    assert same.interval[0] < same.value <= same.interval[1] + 1e-9
    assert same.ceiling is not None and same.ceiling.mean > 0.9
