"""Many tasks: each written as it comes, skipped when it is there, compared at the end; and the command that does it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cli_cases import assert_refused, run
from support.models import CONTEXT, VOCABULARY, untrained

from bridge.circuits.task_search import SearchError
from bridge.models.dense import DenseModel, load_dense
from bridge.studies import suite
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects
from bridge.studies.suite import run_suite

OPTIONS = {"budget": 0.2, "dense": False, "explains": "sparse"}


def test_tasks_are_written_as_they_come_and_skipped_when_there(
    dense: DenseModel, task_file: Path, tmp_path: Path, bridge_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bridge.models.bridges import CoupledModels

    subjects = Subjects.of(CoupledModels.from_pretrained(bridge_folder))
    original, searched = suite.resolved, []

    def resolved(subjects: Subjects, name: str):
        found = original(subjects, str(task_file))
        if name == "hard":  # what no model does: all answers the other way round
            pairs = {split: replace(p, answer_bk=p.wrong_bk, wrong_bk=p.answer_bk) for split, p in found.splits.items()}
            return replace(found, task=name, splits=pairs)
        return replace(found, task=name)

    search = suite.search_task

    def count(*arguments, **options):
        searched.append(arguments[1].task)
        return search(*arguments, **options)

    monkeypatch.setattr(suite, "resolved", resolved)
    monkeypatch.setattr(suite, "search_task", count)
    first = run_suite(subjects, ("one", "hard", "two"), out=tmp_path, progress=lambda _: None, **OPTIONS)
    assert "VERDICT" in next(first)
    first.close()  # killed after the first task
    assert (tmp_path / "one" / "circuit.json").is_file() and not (tmp_path / "two").exists()
    texts = list(run_suite(subjects, ("one", "hard", "two"), out=tmp_path, progress=lambda _: None, **OPTIONS))
    assert searched == ["one", "hard", "two"] and "already searched" in texts[0] and "unsolved" in texts[1]
    assert "geometric mean over 3 tasks, 1 of them failed" in texts[-1] and "CROSS-ABLATION" in texts[-1]
    assert TaskResult.load(tmp_path / "two").facts.task == "two"
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert values["tasks"] == ["one", "two"] and values["sizes"]["failed"] == 1
    assert (tmp_path / "cross_ablation.svg").read_text().rstrip().endswith("</svg>")
    again = list(run_suite(subjects, ("one", "hard", "two"), out=tmp_path, progress=lambda _: None, **OPTIONS))
    assert len(searched) == 3 and again[-1] == texts[-1]
    other = {**OPTIONS, "budget": OPTIONS["budget"] * 2}
    assert "unsolved" in next(run_suite(subjects, ("hard",), out=tmp_path, progress=lambda _: None, **other))
    assert len(searched) == 4  # what another search has not found is looked for
    with pytest.raises(SearchError, match="another search .budget"):
        list(run_suite(subjects, ("one",), out=tmp_path, progress=lambda _: None, **other))
    with pytest.raises(SearchError, match="holds the result of another search"):
        list(run_suite(subjects, ("one",), out=tmp_path, progress=lambda _: None, level=0.95, **OPTIONS))
    text = task_file.read_text()
    task_file.write_text("\n".join(text.splitlines()[:-1]))  # a pair less
    with pytest.raises(SearchError, match="another search .prompts"):
        list(run_suite(subjects, ("one",), out=tmp_path, progress=lambda _: None, **OPTIONS))
    task_file.write_text(text)
    with pytest.raises(SearchError, match="seeds 1, not 2"):
        list(run_suite(subjects, ("one",), out=tmp_path, progress=lambda _: None, seeds=2, **OPTIONS))


def test_the_command_finds_a_circuit_and_writes_it(bridge_folder: Path, task_file: Path, tmp_path: Path) -> None:
    options = ("--bridge", bridge_folder, "--no-dense", "--device", "cpu", "--budget", 0.2, "--explains", "sparse")
    result = run("circuit", "--task", task_file, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "VERDICT   BEHAVIOURAL" in result.stdout and ">" in result.stdout
    assert TaskResult.load(tmp_path / "out").passed
    null = run("circuit", "--task", task_file, *options, "--null", "labels")
    assert null.exit_code == 0 and "It fails, as it must" in null.stdout


def test_the_command_refuses_in_one_line(bridge_folder: Path, task_file: Path, dense_folder: Path, tmp_path: Path) -> None:
    assert_refused(run("circuit"), "give either --task NAME, --task FILE, or --all")
    assert_refused(run("circuit", "--task", "x", "--all"), "give either")
    assert_refused(run("circuit", "--task", "x", "--null", "zero"), "give labels, weights or shuffled")
    assert_refused(
        run("circuit", "--task", "x", "--level", 0.7), "is not a level of the nested circuits; give 0.8, 0.9, 0.95, 0.99"
    )
    assert_refused(run("circuit", "--task", "x", "--explains", "both"), "give dense or sparse")
    assert_refused(run("circuit", "--task", "no_such_task", "--bridge", bridge_folder), "there is no task 'no_such_task'")
    untrained_folder = tmp_path / "untrained"
    coupling = replace(untrained(load_dense(str(dense_folder))), reference_bt=torch.randint(2, VOCABULARY, (4, CONTEXT)))
    coupling.save_pretrained(untrained_folder)
    assert_refused(run("circuit", "--task", task_file, "--bridge", untrained_folder), "there is no circuit to find")
