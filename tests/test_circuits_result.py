"""A task's result is saved and loaded exactly, and what cannot be read is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, planted_pairs, planted_sparse

from bridge.checkpoint import CheckpointError
from bridge.circuit import Circuit, Edge, Node
from bridge.circuits.judge import Judged, judge
from bridge.circuits.masks import Aim, Goal
from bridge.studies.result import SeedRun, Size, TaskFacts, TaskResult, render_text, save_failure
from bridge.circuits.subject import SparseSubject
from bridge.dense import DenseModel
from bridge.sparse import Location
from bridge.tasks.tokens import score


def planted_result(subject: SparseSubject, task: str, neurons: tuple[int, ...] = (0, 1)) -> TaskResult:
    """The result that a search for the planted circuit, or a part of it, would leave."""
    kept = {at: torch.zeros(1, n, dtype=torch.bool) for at, n in subject.space.sizes.items()}
    edges: list[Edge] = []
    read, act, write = (Location(0, kind) for kind in ("mlp_in", "mlp_act", "mlp_out"))
    for neuron in neurons:
        kept[read][0, neuron] = kept[act][0, neuron] = kept[write][0, neuron + 2] = True
        edges.append(Edge(Node(read, neuron), Node(act, neuron), "weight", 2.0, -1 / 3))
        edges.append(Edge(Node(act, neuron), Node(write, neuron + 2), "weight", 2.0, -0.1))
    kept_f = subject.space.join(kept)
    goal = Goal(subject, planted_pairs(4).both(), Aim())
    scores = score(subject.sparse, planted_pairs(4))
    faith = judge(goal, goal, Judged(kept_f, subject, [kept_f], len(edges), 1000), scores, scores)
    size = Size(int(kept_f.sum()), len(edges))
    facts = TaskFacts(
        task=task, language="toy", drop_rate=0.25, objective="superset", target=0.1, null=None, sparse_scores=scores,
        dense_scores=scores, runs=(SeedRun(0, size.nodes, 0.01, 80, True),), whole=Size(subject.space.size, 5000), before=size,
        size=size, entries={"embedding": 2, "unembedding": 4, "bigram": 0}, loss=1 / 3, edges_complete=True,
        dense_whole=Size(100, 10_000), dense_before=Size(50, 2000), dense=Size(50, 1000), dense_loss=0.1,
        dense_complete=True, why_not_dense="", provenance={"dense": "tiny"},
        seconds=1.5,
    )  # fmt: skip
    circuit = Circuit(task, kept, subject.means, {"nodes": 0.1, "edges": 1 / 3}, tuple(edges))
    return TaskResult(circuit, {at: kept_1n[0].float() for at, kept_1n in kept.items()}, faith, facts)


@pytest.fixture
def result(dense: DenseModel) -> TaskResult:
    corpus_bt = torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
    return planted_result(SparseSubject.over(planted_sparse(dense), corpus_bt), "planted")


def test_a_result_comes_back_exactly(result: TaskResult, tmp_path: Path) -> None:
    result.save(tmp_path / "planted")
    loaded = TaskResult.load(tmp_path / "planted")
    assert loaded.facts == result.facts and loaded.faithfulness == result.faithfulness
    assert loaded.circuit.edges == result.circuit.edges and loaded.circuit.nodes == result.circuit.nodes
    assert loaded.circuit.explains == "planted" and loaded.circuit.losses == result.circuit.losses
    for one, other in (
        (loaded.circuit.kept, result.circuit.kept),
        (loaded.circuit.means, result.circuit.means),
        (loaded.inclusion, result.inclusion),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[at], other[at]) for at in other)
    assert list(loaded.circuit.kept) == list(result.circuit.kept)  # the order of the computation
    assert str(loaded) == str(result) == render_text(result)


def test_its_json_is_for_people(result: TaskResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    values = json.loads((tmp_path / "circuit.json").read_text())
    assert values["verdict"] == result.faithfulness.verdict and values["nodes"][0] == "L0.mlp_in[0]"
    assert values["facts"]["size"] == {"nodes": 6, "edges": 4}
    text = render_text(result)
    for part in ("VERDICT", "CIRCUIT   6 of", "250.0 times the edges", "L0.mlp_act", "EVIDENCE", "random", "chance"):
        assert part in text


def test_what_is_no_result_is_refused(result: TaskResult, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        TaskResult.load(tmp_path / "nothing")
    save_failure(tmp_path / "failed", "planted", "it is unsolved", Size(10, 20), None, {})
    with pytest.raises(CheckpointError, match="holds no circuit: it is unsolved"):
        TaskResult.load(tmp_path / "failed")
    result.save(tmp_path / "cut")
    values = json.loads((tmp_path / "cut" / "circuit.json").read_text())
    del values["facts"]["size"]
    (tmp_path / "cut" / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no circuit that this version of bridge reads") as caught:
        TaskResult.load(tmp_path / "cut")
    assert "\n" not in str(caught.value)
