"""A task's result is saved and loaded exactly, and what cannot be read is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.circuits_subject_cases import subject_over
from support.models import VOCABULARY, planted_sparse
from support.studies_result_cases import planted_result

from bridge.models.dense import DenseModel
from bridge.models.store import CheckpointError
from bridge.studies.result import Size, TaskResult, render_text, save_failure


@pytest.fixture
def result(dense: DenseModel) -> TaskResult:
    corpus_bt = torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
    return planted_result(subject_over(planted_sparse(dense), corpus_bt), "planted")


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
    with pytest.raises(CheckpointError, match="no circuit that this version reads") as caught:
        TaskResult.load(tmp_path / "cut")
    assert "\n" not in str(caught.value)
    values["format"] = 1
    (tmp_path / "cut" / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"no circuit that this version reads \(format 1, not 2\); search again"):
        TaskResult.load(tmp_path / "cut")
