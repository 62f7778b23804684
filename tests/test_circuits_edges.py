"""Edges: one that is removed is a weight of 0 and its mean contribution in the bias, and what is found is what was planted."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import VOCABULARY, planted_pairs, planted_sparse, untrained
from torch import Tensor

from bridge.circuit import Edge, Node
from bridge.circuits.edges import EdgeGoal, Pruned, find_edges, pruned_to
from bridge.circuits.masks import Aim, Goal
from bridge.circuits.subject import ATTENDED, SparseSubject, masked_gate
from bridge.dense import DenseModel
from bridge.kernels.products import Compact
from bridge.sparse import Location


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def random(dense: DenseModel) -> SparseSubject:
    sparse = untrained(dense).sparse.requires_grad_(False)
    sparse.project(0.2)
    return SparseSubject.over(sparse, corpus())


@pytest.mark.parametrize("name", ["0.up", "1.q", "0.o"])
def test_removing_an_edge_is_no_weight_and_its_mean_in_the_bias(random: SparseSubject, name: str) -> None:
    literal = copy.deepcopy(random.sparse)
    matrix = next(matrix for matrix in random.matrices() if matrix.name == name)
    row, column = matrix.weight_ji.nonzero()[3].tolist()
    linear = literal.get_submodule(f"blocks.{name}")
    at = Location(matrix.source.layer, ATTENDED) if name.endswith("o") else matrix.source
    with torch.no_grad():
        linear.bias[row] += linear.weight[row, column] * random.means[at][column]  # pyright: ignore
        linear.weight[row, column] = 0  # pyright: ignore
    pruned = Pruned(random)
    assert isinstance(pruned.subject, SparseSubject)
    pruned.remove({name: (torch.tensor([row]), torch.tensor([column]))})
    tokens_bt = planted_pairs().prompt_bt
    assert torch.equal(pruned.subject.sparse(tokens_bt), literal(tokens_bt))
    assert not torch.equal(literal(tokens_bt), random.sparse(tokens_bt))
    pruned.remove({})
    assert torch.equal(pruned.subject.sparse(tokens_bt), random.sparse(tokens_bt))


def test_slopes_are_the_same_where_the_model_runs_through_its_nonzeros(random: SparseSubject) -> None:
    goal = Goal(random, planted_pairs(), Aim())
    kept_f = torch.rand(random.space.size, generator=torch.Generator().manual_seed(0)) < 0.8
    some_e = torch.rand(EdgeGoal(goal, kept_f).n_edges, generator=torch.Generator().manual_seed(1)) < 0.7
    dense_e = EdgeGoal(goal, kept_f).slopes(some_e)
    for name, weight in random.sparse.packable().items():
        random.sparse.compact[name] = Compact.of(weight)
    judge = EdgeGoal(goal, kept_f)
    assert judge.pruned.patterns
    torch.testing.assert_close(judge.slopes(some_e), dense_e, atol=1e-5, rtol=1e-3)
    assert bool((dense_e[~some_e] != 0).any())  # those that are removed have one as well


def test_all_edges_kept_is_the_circuit_of_the_nodes(random: SparseSubject) -> None:
    goal = Goal(random, planted_pairs(), Aim())
    kept_f = torch.rand(random.space.size, generator=torch.Generator().manual_seed(0)) < 0.7
    judge = EdgeGoal(goal, kept_f)
    every_e = torch.ones(judge.n_edges, dtype=torch.bool)
    assert judge.loss(every_e) == float(goal.loss(kept_f[None]))
    pruned = pruned_to(random, judge.edges(every_e), kept_f)
    gate = masked_gate(random, kept_f)
    assert torch.equal(pruned.logits(goal.pairs, gate), random.logits(goal.pairs, gate))


def test_an_edges_score_is_the_slope_of_the_loss(random: SparseSubject) -> None:
    random = SparseSubject(random.sparse.double(), {at: mean_n.double() for at, mean_n in random.means.items()})
    torch.set_default_dtype(torch.float64)
    try:
        goal = Goal(random, planted_pairs(), Aim("paper"))
        kept_f = torch.rand(random.space.size, generator=torch.Generator().manual_seed(0)) < 0.8
        judge = EdgeGoal(goal, kept_f)
        slopes = dict(zip(judge.entries, judge.slopes(torch.ones(judge.n_edges, dtype=torch.bool)).split(judge.sizes)))
        step = 1e-3
        for name in ("0.q", "0.o", "1.up", "1.down"):
            place = int(slopes[name].abs().argmax())
            row, column = (x[place] for x in judge.entries[name])
            matrix, linear = judge.pruned.before[name], judge.pruned.subject.linear(f"blocks.{name}")
            losses = []
            for part in (step, -step):
                judge.pruned.remove({})
                with torch.no_grad():  # a little of the weight replaced by its mean
                    linear.bias[row] += part * matrix.weight_ji[row, column] * judge.pruned.mean(matrix)[column]  # pyright: ignore
                    linear.weight[row, column] *= 1 - part  # pyright: ignore
                losses.append(float(judge.goal.loss(kept_f[None])))
            assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(float(slopes[name][place]), rel=2e-2, abs=2e-4), name
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_edges_that_were_planted_are_found(dense: DenseModel) -> None:
    subject = SparseSubject.over(planted_sparse(dense, decoys=4), corpus())
    kept = {at: torch.zeros(1, n, dtype=torch.bool) for at, n in subject.space.sizes.items()}
    for kind, indices in (("mlp_in", (0, 1, 8)), ("mlp_act", (0, 1, 8)), ("mlp_out", (2, 3, 8))):
        kept[Location(0, kind)][0, list(indices)] = True  # with a decoy
    goal = Goal(subject, planted_pairs(16).both(), Aim(target=0.01), work=1e12)
    found = find_edges(goal, Goal(subject, planted_pairs(32, seed=1).both(), goal.aim), subject.space.join(kept))
    assert found.n_before == 6 and found.complete and found.loss <= 0.01
    ends = {(str(edge.source), str(edge.target)) for edge in found.edges}
    assert ends == {
        ("L0.mlp_in[0]", "L0.mlp_act[0]"), ("L0.mlp_in[1]", "L0.mlp_act[1]"),
        ("L0.mlp_act[0]", "L0.mlp_out[2]"), ("L0.mlp_act[1]", "L0.mlp_out[3]"),
    }  # fmt: skip
    assert {edge.weight for edge in found.edges} == {2.0} and all(edge.kind == "weight" for edge in found.edges)


def test_weights_between_nodes_that_are_no_edges_carry_their_mean(random: SparseSubject) -> None:
    kept_f = torch.ones(random.space.size, dtype=torch.bool)
    matrix = next(matrix for matrix in random.matrices() if matrix.name == "0.up")
    row, column = matrix.weight_ji.nonzero()[0].tolist()
    edge = Edge(Node(matrix.source, column), Node(matrix.target, row), "weight", 1.0, 0.0)
    pruned = pruned_to(random, [edge], kept_f).sparse
    assert sum(int(weight.count_nonzero()) for name, weight in pruned.blocks.named_parameters() if weight.dim() == 2) == 1
    fewer = {at: mean_n for at, mean_n in random.means.items() if at.kind != ATTENDED}
    with pytest.raises(ValueError, match=r"no corpus mean for 0\.attended"):
        pruned_to(SparseSubject(random.sparse, fewer), [edge], kept_f)
