"""Tasks of a span: its circuit, the circuit's card and the nulls, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_cases import run
from support.span_cases import BLOCKS, span_folder, span_task  # noqa: F401

from bridge.cards.card import Card
from bridge.cards.evidence import NULLS
from bridge.models.bridges import CoupledModels
from bridge.studies.result import TaskResult


@pytest.fixture(scope="module")
def circuit(span_folder: Path, span_task: Path) -> Path:  # noqa: F811
    """The task's circuit, beside the dense model's own."""
    out = span_folder.parent / "circuits" / "last"
    result = run("circuit", "--task", span_task, "--bridge", span_folder, "--budget", 0.2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "VERDICT" in result.stdout
    return out


def test_a_task_has_a_circuit_in_a_span(span_folder: Path, circuit: Path) -> None:  # noqa: F811
    found = TaskResult.load(circuit)
    assert found.facts.provenance["blocks"] == BLOCKS
    nodes = found.facts.opened.circuit.nodes
    assert 0 < nodes < sum(CoupledModels.from_pretrained(span_folder).sparse.locations().values())


def test_the_card_of_a_spans_circuit(span_folder: Path, span_task: Path, circuit: Path) -> None:  # noqa: F811
    arguments = ("card", "--task", span_task, "--circuit", circuit, "--bridge", span_folder, "--json", circuit / "c.json")
    result = run(*arguments, "--out", circuit)
    assert result.exit_code == 0, result.output
    card = Card.from_json(json.loads((circuit / "c.json").read_text()))
    for key in ("patching", "dense_ratio", "substitution", "profile"):  # too few pairs to predict on
        assert card.report[key].value is not None, key


def test_nulls_of_tasks(span_folder: Path, span_task: Path, circuit: Path) -> None:  # noqa: F811
    result = run(
        "nulls", span_folder, "--tasks", span_task, "--circuits", circuit.parent, "--against", span_folder.parent / "uncoupled",
        "--minutes", 0.02,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = {null["name"]: null for null in json.loads((span_folder / "nulls.json").read_text())["tasks"]["nulls"]}
    assert list(kept) == list(NULLS)
    assert not any(task["passed"] for null in kept.values() for task in null["tasks"])
