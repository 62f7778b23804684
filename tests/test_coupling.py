"""The coupling as a person holds it: the same as the bare one, with methods that are the functions; and the example runs."""

# ruff: noqa: F811
from __future__ import annotations

import os
import runpy
from dataclasses import fields, replace
from pathlib import Path

import networkx as nx
import pytest
import torch
from support.studies_suite_cases import bridge_folder, task_file  # noqa: F401  (fixtures)

import bridge
from bridge.api import Coupling
from bridge.cards.suite import CardRequest, run_cards
from bridge.models.bridges import CoupledModels
from bridge.studies import search
from bridge.studies.search import Subjects, search_task
from bridge.studies.suite import resolved
from bridge.training import loop as training

EXAMPLE = Path(__file__).parent.parent / "recipes" / "example.py"
PROMPT = "w9 w12 w30 w2"


@pytest.fixture(scope="module")
def held(bridge_folder: Path) -> Coupling:
    return bridge.load(bridge_folder)


def test_what_is_loaded_is_the_coupled_models_with_methods(held: Coupling, bridge_folder: Path) -> None:
    bare = CoupledModels.from_pretrained(bridge_folder, dense=held.dense)
    assert isinstance(held, CoupledModels) and bridge.Coupling is Coupling and type(bare) is CoupledModels
    assert isinstance(Coupling.from_pretrained(bridge_folder), Coupling)
    for field in fields(CoupledModels):
        one, other = getattr(held, field.name), getattr(bare, field.name)
        if isinstance(one, torch.nn.Module) and not isinstance(one, type(held.dense)):
            assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
        elif not isinstance(one, torch.Tensor):
            assert one is other or one == other


def test_explain_and_evaluate_are_the_functions(held: Coupling) -> None:
    assert held.explain(PROMPT) == bridge.explain(held, PROMPT)
    assert held.reference_bt is not None
    assert held.evaluate(held.reference_bt[:2]) == bridge.evaluate(held, held.reference_bt[:2])


def test_circuit_is_the_search(held: Coupling, task_file: Path) -> None:
    subjects = Subjects.of(held)
    expected = search_task(subjects, resolved(subjects, str(task_file)), explains="sparse", dense=False, budget=0.2)
    found = held.circuit(task_file, explains="sparse", dense=False, budget=0.2)
    assert found.circuit.nodes == expected.circuit.nodes and found.report == expected.report
    assert held.subjects is held.subjects
    with pytest.raises(bridge.UserError, match="no-such-task"):
        held.circuit("no-such-task")


def test_card_is_that_of_the_command(held: Coupling, task_file: Path, tmp_path: Path) -> None:
    found = held.circuit(task_file, explains="sparse", dense=False, budget=0.2)
    found.save(tmp_path / "planted")
    (expected, _) = next(
        run_cards(held.subjects, [CardRequest(str(task_file), tmp_path / "planted", None)], progress=lambda _: None)
    )
    said: list[str] = []
    kept, fresh = (
        held.card(task_file, tmp_path / "planted", progress=lambda phase: said.append(str(phase))),
        held.card(task_file, found),
    )
    assert expected is not None and said
    for card in (kept, fresh):
        assert (card.report, card.nulls, card.verdict) == (expected.report, expected.nulls, expected.verdict)
    assert kept.provenance == expected.provenance
    other = replace(found, facts=replace(found.facts, task="another"))
    with pytest.raises(bridge.UserError, match="the circuit is of the task another, not planted"):
        held.card(task_file, other)
    with pytest.raises(bridge.UserError, match="nothing to explain"):  # searched: this dense model does not do the task
        held.card(task_file, budget=0.2)


def test_what_is_fitted_has_them_too(dense_folder: Path, text_file: Path) -> None:
    settings = {"sparse.head_channels": 8, "data.rows": 4}
    fitted = bridge.fit(dense_folder, l0=0.2, data=str(text_file), tokens=64, width=32, settings=settings, device="cpu")
    assert isinstance(fitted, Coupling)
    assert bridge.fit.__doc__ == training.fit.__doc__


def test_the_example_runs(
    bridge_folder: Path,
    task_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {"BRIDGE": bridge_folder, "PROMPT": PROMPT, "TASK": task_file, "OUT": tmp_path / "out"}.items():
        monkeypatch.setitem(os.environ, f"EXAMPLE_{name}", str(value))
    monkeypatch.setattr(search, "TASK_SEARCH", replace(search.TASK_SEARCH, least_span=-1.0))  # of a random dense model
    left = runpy.run_path(str(EXAMPLE))
    said = capsys.readouterr().out
    assert left["explanation"].report.verdict.upper() in said
    assert left["result"].facts.task == "planted" and "planted: " in said
    assert nx.read_graphml(tmp_path / "out" / "explanation.graphml").number_of_edges() == len(left["explanation"].edges)
    assert "circuit-tracer start-server" in said
    for shown in (left["explanation"], left["evaluation"], left["result"]):
        assert shown._repr_html_().startswith("<div")


def test_the_example_is_cells_that_can_be_read() -> None:
    cells = EXAMPLE.read_text().split("\n# %% ")
    assert len(cells) > 6 and all(cell.split("\n")[0].rstrip().endswith((".", "?", "`")) for cell in cells[1:])
