"""Cards by the command: a circuit found or searched, kept and taken again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli_cases import assert_refused, run
from support.studies_suite_cases import bridge_folder, task_file  # noqa: F401

from bridge.cards import suite as cards
from bridge.cards.card import Card
from bridge.cards.suite import requested_cards


@pytest.fixture
def found(bridge_folder: Path, task_file: Path, tmp_path: Path) -> Path:  # noqa: F811
    out = tmp_path / "planted"
    result = run(
        "circuit",
        "--task",
        task_file,
        "--bridge",
        bridge_folder,
        "--no-dense",
        "--budget",
        0.2,
        "--explains",
        "sparse",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    return out


def test_a_circuits_card_is_made_kept_and_taken_again(
    found: Path, bridge_folder: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    arguments = ("card", "--task", task_file, "--circuit", found, "--bridge", bridge_folder, "--json", tmp_path / "card.json")
    result = run(*arguments, "--out", found)
    assert result.exit_code == 0, result.output
    for wanted in ("card      planted", "VERDICT", "EVIDENCE", "share of the counterfactual's effect", "NULLS     NOT KNOWN"):
        assert wanted in result.stdout, wanted
    card = Card.from_json(json.loads((found / "card.json").read_text()))
    assert card == Card.from_json(json.loads((tmp_path / "card.json").read_text()))
    assert card.pairs == 15 and "15 held-out pairs" in card.notes[0]
    needed = {key for rule in card.report.rules for key in rule.needs}
    assert {"dense_solves", "patching", "dense_ratio", "substitution", "profile", "prediction", "nulls"} <= needed
    monkeypatch.setattr(cards, "task_card", lambda *_args, **_options: pytest.fail("made again"))
    assert "VERDICT" in run(*arguments, "--out", found).stdout


def test_a_task_is_searched_where_no_circuit_is(bridge_folder: Path, task_file: Path, tmp_path: Path) -> None:  # noqa: F811
    result = run("card", "--task", task_file, "--bridge", bridge_folder, "--budget", 0.2, "--out", tmp_path / "searched")
    assert_refused(result, "nothing to explain")  # this dense model does not do the task


def test_what_is_wanted(found: Path, tmp_path: Path) -> None:
    (one,) = requested_cards(task=None, circuit=found, names=(), out=None)
    assert (one.task, one.circuit, one.out) == ("planted", found, None)
    (below,) = requested_cards(task=None, circuit=found.parent, names=(), out=tmp_path / "cards")
    assert below.circuit == found and below.out == tmp_path / "cards" / "planted"
    two = requested_cards(task=None, circuit=None, names=("planted", "other"), out=found.parent)
    assert [one.circuit for one in two] == [found, None] and two[1].out == found.parent / "other"


def test_what_cannot_be_done_is_refused(found: Path, bridge_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    assert_refused(run("card"), "the circuit must be given in one way")
    assert_refused(run("card", "--all", "--task", "for_while"), "the circuit must be given in one way")
    assert_refused(run("card", "--circuit", tmp_path / "none"), "holds no circuit")
    assert_refused(run("card", "--circuit", found.parent, "--task", "for_while"), "several circuits")
    assert_refused(run("card", "--circuit", found, "--task", "for_while", "--bridge", bridge_folder), "is of the task planted")
