"""A task's result is saved and loaded exactly, and what cannot be read is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, planted_pairs, planted_sparse

from bridge.checkpoint import CheckpointError
from bridge.circuit import Circuit, Edge, Node
from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.nested import Nested
from bridge.circuits.question import Question
from bridge.circuits.subject import SparseSubject
from bridge.dense import DenseModel
from bridge.evidence.task_sufficiency import Judged, gather_task
from bridge.sparse import Location
from bridge.studies.result import SeedRun, Size, TaskFacts, TaskResult, render_text, save_failure
from bridge.studies.search import search_config
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
    kept_f, config, scores = subject.space.join(kept), search_config(), score(subject.sparse, planted_pairs(4))
    masked = MaskedModel(subject.sparse, Question.of_pairs(planted_pairs(4).both()), subject.means, by_position=False)
    test = CircuitLoss(masked, masked.logits(torch.ones(8, len(kept_f), dtype=torch.bool)), config)
    levels = config.nested()[:-1]
    nested = Nested(levels, torch.where(kept_f, 0, len(levels)), (0.5,) * len(levels))
    judged = Judged(nested, [kept_f], [len(edges)] * len(levels), 1000)
    report, measured = gather_task(test, judged, scores, scores)
    facts = TaskFacts(
        task=task, language="toy", drop_rate=0.25, explains="dense", null=None, search=config, sparse_scores=scores,
        dense_scores=scores, runs=(SeedRun(0, int(kept_f.sum()), 0, 0.5),), whole=Size(subject.space.size, 5000), levels=measured,
        opening=config.opening, errors=(), entries={"embedding": 2, "unembedding": 4, "bigram": 0},
        dense_whole=Size(100, 10_000), dense=Size(50, 1000), why_not_dense="", provenance={"dense": "tiny"}, seconds=1.5,
    )  # fmt: skip
    means = {at: subject.means[at] for at in kept}
    inclusion = {at: kept_1n[0].float() for at, kept_1n in kept.items()}
    level = {at: torch.where(kept_1n[0], 0, len(levels)).to(torch.int8) for at, kept_1n in kept.items()}
    return TaskResult(Circuit(task, kept, means, tuple(edges)), level, inclusion, report, facts)


@pytest.fixture
def result(dense: DenseModel) -> TaskResult:
    corpus_bt = torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
    return planted_result(SparseSubject.over(planted_sparse(dense), corpus_bt), "planted")


def test_a_result_comes_back_exactly(result: TaskResult, tmp_path: Path) -> None:
    result.save(tmp_path / "planted")
    loaded = TaskResult.load(tmp_path / "planted")
    assert loaded.facts == result.facts and loaded.report == result.report
    assert loaded.circuit.edges == result.circuit.edges and loaded.circuit.nodes == result.circuit.nodes
    assert loaded.circuit.explains == "planted"
    for one, other in (
        (loaded.circuit.kept, result.circuit.kept),
        (loaded.circuit.means, result.circuit.means),
        (loaded.inclusion, result.inclusion),
        (loaded.level, result.level),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[at], other[at]) for at in other)
    assert list(loaded.circuit.kept) == list(result.circuit.kept)  # the order of the computation
    assert str(loaded) == str(result) == render_text(result)


def test_its_json_is_for_people(result: TaskResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    values = json.loads((tmp_path / "circuit.json").read_text())
    assert values["verdict"] == result.report.verdict and values["nodes"][0] == "L0.mlp_in[0]"
    assert [level["edges"] for level in values["facts"]["levels"]] == [4, 4, 4, 4]
    text = render_text(result)
    for part in ("VERDICT", ">", "F 0.9", "250.0 times as many", "L0.mlp_act", "EVIDENCE", "matched", "chance"):
        assert part in text


def test_what_is_no_result_is_refused(result: TaskResult, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        TaskResult.load(tmp_path / "nothing")
    save_failure(tmp_path / "failed", "planted", "it is unsolved", Size(10, 20), None, {})
    with pytest.raises(CheckpointError, match="holds no circuit: it is unsolved"):
        TaskResult.load(tmp_path / "failed")
    result.save(tmp_path / "cut")
    values = json.loads((tmp_path / "cut" / "circuit.json").read_text())
    del values["facts"]["whole"]
    (tmp_path / "cut" / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no circuit that this version of bridge reads") as caught:
        TaskResult.load(tmp_path / "cut")
    assert "\n" not in str(caught.value)
    values["format"] = 1
    (tmp_path / "cut" / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="a circuit of format 1, not 2; search again"):
        TaskResult.load(tmp_path / "cut")
