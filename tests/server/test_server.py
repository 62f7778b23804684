"""The service: what it lists, explains, cancels and keeps, and how it refuses; on a tiny coupling, in this process."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import datetime
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.circuits_subject_cases import subject_over
from support.models import CONTEXT
from support.server_cases import (
    HOSTILE,
    OTHER,
    PATIENCE,
    PROMPT,
    Held,
    ask,
    client_of,
    over,
    refused,
    until,
)
from support.span_cases import BLOCKS, span_folder  # noqa: F401
from support.studies_result_cases import planted_result
from typer.testing import CliRunner

from bridge.cli.main import app as commands
from bridge.display.progress import OnProgress, Phase
from bridge.errors import UserError
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.explanations.parts import Answered, Drawn
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from bridge.models.store import CheckpointError
from bridge.server.library import LONGEST_LABEL, Library, finite_json
from bridge.server.schema import LONGEST_PROMPT
from bridge.steering.curves import steer
from bridge.studies.result import Size, save_failure

STEERING = {"value": 1.5, "strength": 0.5}


class Staged(Held):
    """The same that hands over what is known early, and is then held up."""

    def __call__(self, coupling: CoupledModels, prompt: str, *, progress: OnProgress, **more: Any) -> Explanation:
        for known in stages_of(self.explanation):
            more["stage"](known)
        return super().__call__(coupling, prompt, progress=progress)


def stages_of(explanation: Explanation) -> tuple[Answered, Drawn]:
    """What is known of an explanation before it is whole."""
    sizes = tuple(circuit.nodes for circuit in explanation.nested)
    names = [field.name for field in fields(Drawn) if field.name != "sizes"]
    answered = Answered(**{field.name: getattr(explanation, field.name) for field in fields(Answered)})
    return answered, Drawn(**{name: getattr(explanation, name) for name in names}, sizes=sizes)


# -- explanations -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_explained_as_in_python(root: Path, coupled: CoupledModels) -> None:
    said: list[str] = []

    def watched(*arguments: Any, progress: OnProgress, **more: Any) -> Explanation:
        def say(phase: Phase) -> None:
            progress(phase)
            said.append(client.get(f"/api/explanations/{id}").json()["phase"])

        return explain(*arguments, progress=say, **more)

    with client_of(Library([root]), watched) as client:
        assert not client.get("/api/couplings").json()[0]["loaded"]
        id = ask(client, target="w7", contrast="w8")
        values = over(client, id)
        assert (values["id"], values["status"], values["error"], values["bridge"]) == (id, "done", None, "models/deep/tiny")
        told = values["explanation"]
        assert (told["answer"]["text"], told["contrast"]["text"]) == ("w7", "w8")
        expected = explain(coupled, PROMPT, target="w7", contrast="w8").to_json()
        expected["provenance"] |= {"coupling": "models/deep/tiny", "dense": "tiny"}  # and not the folders they were loaded from
        assert told == json.loads(json.dumps(expected))
        assert Explanation.from_json(told).agree == told["agree"]
        assert [phase.partition(":")[0] for phase in said][:2] == ["tokens", "means"] and "groups" in said
        assert client.get("/api/couplings").json()[0]["loaded"]


def test_a_prompt_is_explained_by_a_span(span_folder: Path) -> None:  # noqa: F811
    with client_of(Library([span_folder.parent])) as client:
        (listed,) = client.get("/api/couplings").json()
        assert listed["blocks"] == BLOCKS
        values = over(client, ask(client, bridge=listed["name"]))
        assert (values["status"], values["error"]) == ("done", None)
        assert values["explanation"]["provenance"]["blocks"] == BLOCKS
        page = client.get(f"/api/explanations/{values['id']}/page")
        assert page.status_code == 200 and "<html" in page.text


def test_one_at_a_time_in_order_and_a_full_queue_says_when_to_come_again(root: Path, explanation: Explanation) -> None:
    held = Held(explanation)
    with client_of(Library([root]), held, waiting=2) as client:
        ids = [ask(client, f"w{index}") for index in (2, 3)]
        assert held.begun.wait(PATIENCE)
        until(lambda: client.get("/api/health").json()["running"] == 1)
        ids.append(ask(client, "w4"))
        answer = client.post("/api/explanations", json={"prompt": "w6"})
        refused(answer, 429, "2 explanations are waiting, and at most 2 may", "try again in ")
        assert 1 <= int(answer.headers["Retry-After"]) <= 600
        assert client.get("/api/health").json() | {"version": ""} == {
            "status": "ok",
            "version": "",
            "queued": 2,
            "running": 1,
            "remembered": 0,
        }
        assert held.calls == 1
        held.go.set()
        assert [over(client, id)["explanation"]["prompt"] for id in ids] == ["w2", "w3", "w4"]
        assert held.calls == 3
        ask(client, "w6")  # there is room again


def test_what_waits_and_what_runs_can_be_cancelled(root: Path, explanation: Explanation) -> None:
    held = Held(explanation)
    with client_of(Library([root]), held) as client:
        running, waiting, last = (ask(client, f"w{index}") for index in (2, 3, 4))
        assert held.begun.wait(PATIENCE)
        assert client.delete(f"/api/explanations/{waiting}").json()["status"] == "cancelled"
        assert client.delete(f"/api/explanations/{running}").json()["status"] in ("running", "cancelled")
        assert over(client, running) == client.get(f"/api/explanations/{running}").json()
        assert over(client, running)["status"] == "cancelled" and over(client, running)["explanation"] is None
        held.go.set()
        assert over(client, last)["status"] == "done"
        assert held.calls == 2  # what was cancelled while it waited never began
        assert client.delete(f"/api/explanations/{last}").json()["status"] == "done"  # too late: it stays
        refused(client.get(f"/api/explanations/{running}/page"), 409, "cancelled")
        refused(client.delete("/api/explanations/none"), 404, "'none'")


def test_a_cancelled_job_whose_work_ends_anyway_is_cancelled(root: Path, explanation: Explanation) -> None:
    begun, go = threading.Event(), threading.Event()

    def deaf(*_: Any, **__: Any) -> Explanation:
        begun.set()
        assert go.wait(PATIENCE)
        return explanation

    with client_of(Library([root]), deaf) as client:
        id = ask(client)
        assert begun.wait(PATIENCE)
        answer = client.delete(f"/api/explanations/{id}").json()
        assert answer["status"] == "running" and answer["stopping"] and answer["phase"] == "coupling: loading it"
        assert client.delete(f"/api/explanations/{id}").json() == answer
        go.set()
        assert over(client, id)["status"] == "cancelled" and not over(client, id)["stopping"]


def test_the_list_tells_places_times_and_verdicts(root: Path, explanation: Explanation) -> None:
    def told(client: TestClient, *ids: str) -> list[dict[str, Any]]:
        jobs = {job["id"]: job for job in client.get("/api/explanations").json()}
        return [jobs[id] for id in ids]

    held, verdict = Staged(explanation), explanation.report.verdict
    with client_of(Library([root]), held) as client:
        running, *waiting = (ask(client, f"w{index}") for index in range(2, 5))
        until(lambda: client.get(f"/api/explanations/{running}").json()["phase"] == "held")
        jobs = told(client, running, *waiting)
        assert [job["place"] for job in jobs] == [None, 1, 2]
        assert [job["began_at"] is None for job in jobs] == [False, True, True]
        assert all(job["ended_at"] is None and not job["stopping"] for job in jobs)
        assert [(job["stage"], job["verdict"]) for job in jobs] == [("drawn", None), (None, None), (None, None)]
        client.delete(f"/api/explanations/{waiting[0]}")
        assert told(client, waiting[1])[0]["place"] == 1
        held.go.set()
        over(client, waiting[1])
        jobs = told(client, running, *waiting)
        assert [(job["stage"], job["verdict"]) for job in jobs] == [
            ("explanation", verdict),
            (None, None),
            ("explanation", verdict),
        ]
        for job in jobs:
            times = [datetime.fromisoformat(job[key]) for key in ("asked_at", "began_at", "ended_at") if job[key] is not None]
            assert times == sorted(times) and len(times) == (2 if job["status"] == "cancelled" else 3)
            assert job["place"] is None and all(time.tzinfo is not None for time in times)


def test_only_so_many_results_are_kept_the_latest_used(root: Path, explanation: Explanation) -> None:
    with client_of(Library([root]), lambda *_, **__: explanation, remembered=3) as client:
        ids = []
        for index in range(2, 8):
            ids.append(ask(client, f"w{index}"))
            over(client, ids[-1])
            if index > 2:
                assert over(client, ids[0])["status"] == "done"  # looked at again and again, so kept
        assert [job["id"] for job in client.get("/api/explanations").json()] == [ids[4], ids[5], ids[0]]
        assert client.get("/api/health").json()["remembered"] == 3
        refused(client.get(f"/api/explanations/{ids[1]}"), 404, ids[1], "3")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("the prompt\nis odd; mend it"), "the prompt is odd; mend it"),
        (RuntimeError("secret 17"), "inside bridge (RuntimeError)"),
    ],
)
def test_work_that_fails_is_a_line_and_the_next_goes_on(root: Path, error: Exception, line: str) -> None:
    def fail(*_: Any, **__: Any) -> Explanation:
        raise error

    with client_of(Library([root]), fail) as client:
        for _ in range(2):
            values = over(client, ask(client))
            assert values["status"] == "failed" and line in values["error"] and "secret" not in values["error"]
            assert values["explanation"] is None


def test_numbers_that_json_has_not_never_leave(root: Path, explanation: Explanation) -> None:
    with client_of(Library([root]), lambda *_, **__: replace(explanation, dense_d=math.nan)) as client:
        id = ask(client)
        assert over(client, id)["status"] == "failed"
        assert "NaN" not in client.get(f"/api/explanations/{id}").text


def test_stopping_cancels_everything(root: Path, explanation: Explanation) -> None:
    held = Held(explanation)
    library = Library([root])
    with client_of(library, held) as client:
        ids = [ask(client), ask(client)]
        assert held.begun.wait(PATIENCE)
        jobs = client.app.state.jobs  # pyright: ignore[reportAttributeAccessIssue]
    assert [jobs.get(id).status for id in ids] == ["cancelled", "cancelled"]
    assert jobs.stop(0)


# -- what is known early ------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A dataclass as JSON has it."""
    return json.loads(json.dumps(asdict(value)))


def test_what_is_known_early_is_read_before_the_rest(root: Path, explanation: Explanation) -> None:
    answered, drawn = stages_of(explanation)
    go = {name: threading.Event() for name in ("answered", "drawn")}

    def staged(*_: Any, stage: Callable[[Answered | Drawn], None], **__: Any) -> Explanation:
        for name, known in (("answered", answered), ("drawn", drawn)):
            stage(known)
            assert go[name].wait(PATIENCE)
        return explanation

    def known(stage: str) -> dict[str, Any]:
        return until(lambda: (job := client.get(f"/api/explanations/{id}").json())["stage"] == stage and job)

    with client_of(Library([root]), staged) as client:
        id = ask(client)
        first = known("answered")
        assert (first["answered"], first["drawn"], first["explanation"]) == (plain(answered), None, None)
        refused(client.get(f"/api/explanations/{id}/page"), 409, "running")
        go["answered"].set()
        second = known("drawn")
        assert (second["answered"], second["drawn"], second["explanation"]) == (None, plain(drawn), None)
        assert not second["readable"] and client.get("/api/explanations").json()[0]["stage"] == "drawn"
        brief = client.get(f"/api/explanations/{id}", params={"brief": True}).json()
        assert brief == second | {"drawn": None}
        go["drawn"].set()
        done = over(client, id)
        assert (done["stage"], done["readable"], done["verdict"]) == ("explanation", True, explanation.report.verdict)
        assert (done["answered"], done["drawn"]) == (None, None)
        assert Explanation.from_json(done["explanation"]).nodes == explanation.nodes
        page = client.get(f"/api/explanations/{id}/page")
        assert page.status_code == 200 and f'"served":true,"job":"{id}"' in page.text


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_what_was_known_before_the_end_stays(root: Path, explanation: Explanation, end: str) -> None:
    held = Staged(explanation)
    with client_of(Library([root]), held) as client:
        id = ask(client)
        until(lambda: client.get(f"/api/explanations/{id}").json()["phase"] == "held")
        if end == "cancelled":
            client.delete(f"/api/explanations/{id}")
        else:
            held.explanation = replace(explanation, dense_d=math.nan)  # which JSON has not
            held.go.set()
        job = over(client, id)
        assert (job["status"], job["stage"], job["readable"], job["explanation"]) == (end, "drawn", False, None)
        assert job["drawn"] == plain(stages_of(explanation)[1])


def test_an_explanation_says_nothing_of_this_machine(root: Path, explanation: Explanation) -> None:
    with client_of(Library([root])) as client:
        id = ask(client, counterfactual=OTHER)
        assert over(client, id)["status"] == "done"
        told = over(client, id)["explanation"]
        assert told["provenance"]["coupling"] == "models/deep/tiny"
        for text in (client.get(f"/api/explanations/{id}").text, client.get(f"/api/explanations/{id}/page").text):
            assert "models/deep/tiny" in text
            for place in (str(root.parent), explanation.provenance.dense, str(explanation.provenance.coupling)):
                assert Path(place).is_absolute() and place not in text


def test_text_that_was_read_from_a_file_is_named_without_its_folder(root: Path, explanation: Explanation) -> None:
    file = root / "deep" / "tiny" / "coupling.json"
    values = json.loads(file.read_text())
    values["recipe"]["data"]["source"] = "stdlib+/home/me/secret/code"
    file.write_text(json.dumps(values))
    with client_of(Library([root])) as client:
        text = client.get(f"/api/explanations/{over(client, ask(client))['id']}").text
        assert "(stdlib+code)" in text and "secret" not in text


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ({}, ["prompt", "required"]),
        ({"prompt": ""}, ["prompt ''", "at least 1"]),
        ({"prompt": "w5 " * LONGEST_PROMPT}, ["at most", str(LONGEST_PROMPT)]),
        ({"prompt": "w5 " * (CONTEXT + 1)}, [f"{CONTEXT + 1} tokens", f"context is {CONTEXT}"]),
        ({"prompt": "   "}, ["empty"]),
        ({"prompt": PROMPT, "target": "w5 w6"}, ["target 'w5 w6' is 2 tokens"]),
        ({"prompt": PROMPT, "contrast": "#40"}, ["contrast #40 is not a token of the dense model; give an id from 0 to 39"]),
        ({"prompt": PROMPT, "contrast": "nowhere"}, ["contrast 'nowhere'", "vocabulary"]),
        ({"prompt": PROMPT, "counterfactual": "w5"}, ["has 1 tokens and the prompt 4", "equal length"]),
        ({"prompt": PROMPT, "counterfactual": PROMPT}, ["the prompt itself"]),
        ({"prompt": PROMPT, "counterfactual": ""}, ["counterfactual ''", "at least 1"]),
        ({"prompt": PROMPT, "counterfactual": "w5 " * LONGEST_PROMPT}, ["counterfactual", "at most"]),
        ({"prompt": PROMPT, "card": True}, ["card", "not permitted"]),
        ({"prompt": PROMPT, "targt": "w5"}, ["targt", "not permitted"]),
        ({"prompt": 5}, ["prompt 5", "string"]),
        ([PROMPT], ["the body"]),
        (None, ["the body"]),
    ],
)  # fmt: skip
def test_bodies_that_break_a_rule(client: TestClient, body: Any, parts: list[str]) -> None:
    over(client, ask(client))  # the coupling is in memory then, and says what it cannot take at once
    refused(client.post("/api/explanations", json=body), 422, *parts)


def test_a_prompt_too_long_for_a_coupling_not_yet_loaded_fails_in_the_same_words(root: Path) -> None:
    with client_of(Library([root])) as client:
        values = over(client, ask(client, "w5 " * (CONTEXT + 1)))
        assert values["status"] == "failed" and f"context is {CONTEXT}" in values["error"]


def test_a_counterfactual_is_checked_before_the_coupling_is_loaded_or_after(root: Path) -> None:
    with client_of(Library([root])) as client:
        values = over(client, ask(client, counterfactual="w5"))
        assert values["status"] == "failed" and "equal length" in values["error"] and not values["readable"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "part"),
    [
        (b'{"prompt": ', "application/json", 422, "the body is not valid JSON"),
        (b'{"prompt": "a\\ud800"}', "application/json", 422, "\\ud800"),
        (b'{"prompt": NaN, "x": 1}', "application/json", 422, "prompt nan"),
        (b'{"prompt": "w5", "x\\ud800": 1}', "application/json", 422, "x\\ud800"),
        (b'{"prompt": "\xff"}', "application/json", 400, "cannot be read as JSON"),
        (b"[" * 100_000, "application/json", 400, "cannot be read as JSON"),
        (b'{"prompt": "w5"}', "text/plain", 422, "Content-Type"),
    ],
)
def test_bodies_that_are_no_json(client: TestClient, content: bytes, kind: str, status: int, part: str) -> None:
    answer = client.post("/api/explanations", content=content, headers={"Content-Type": kind})
    refused(answer, status, part)


def test_paths_and_methods_that_there_are_not(client: TestClient) -> None:
    refused(client.get("/nope"), 404, "/nope", "/openapi.json")
    refused(client.get("/docs"), 404)
    refused(client.request("TRACE", "/api/health"), 405, "TRACE")
    refused(client.post("/api/explanations", json={"prompt": PROMPT, "bridge": "../tiny"}), 404, "'../tiny'", "/api/couplings")


# -- the library --------------------------------------------------------------------------------------------------------


def test_couplings_under_the_roots_are_listed_and_nothing_else(
    root: Path, coupling_folder: Path, tmp_path: Path, coupled: CoupledModels
) -> None:
    broken = root / "broken"
    shutil.copytree(coupling_folder, broken)
    (broken / "coupling.json").write_text('{"format": 1')
    (root / "elsewhere").symlink_to(coupling_folder)  # leads out of the root
    (root / "linked").mkdir()
    (root / "linked" / "coupling.json").symlink_to(coupling_folder / "coupling.json")
    (root / ".hidden").mkdir()
    shutil.copytree(coupling_folder, root / ".hidden" / "tiny")
    with client_of(Library([root, coupling_folder])) as client:
        listed = {one["name"]: one for one in client.get("/api/couplings").json()}
        assert list(listed) == ["models/broken", "models/deep/tiny", "tiny"]
        assert [one["default"] for one in listed.values()] == [True, False, False]
        tiny = listed["tiny"]
        assert (tiny["width"], tiny["l0"], tiny["context"]) == (coupled.sparse.width, coupled.recipe.sparsity.l0, CONTEXT)
        assert tiny["error"] is None and "damaged" in listed["models/broken"]["error"]
        values = over(client, ask(client, bridge="models/broken"))
        assert values["status"] == "failed" and "damaged" in values["error"]
        for told in (values["error"], *(str(one) for one in listed.values())):
            assert str(tmp_path.parent) not in told and "/models/" not in told  # nowhere where things lie
        for name in ("models/elsewhere", "models/linked", "models/deep/../deep/tiny", str(coupling_folder), "models", ""):
            refused(client.get("/api/labels", params={"bridge": name}), 404, name)


def test_lists_are_made_in_one_walk(root: Path, circuits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is listed: the folders are walked once for it, and not once for each."""
    for index in range(4):
        shutil.copytree(root / "deep" / "tiny", root / f"copy{index}")
    walks: list[str] = []
    walk = os.walk
    with client_of(Library([root], circuits)) as client:
        monkeypatch.setattr("os.walk", lambda top, *options: (walks.append(str(top)), walk(top, *options))[1])
        assert len(client.get("/api/couplings").json()) == 5 and walks == [str(root)]
        assert len(client.get("/api/circuits").json()) == 4 and walks == [str(root), str(circuits)]


def test_weights_are_read_once_for_all_pages(root: Path, explanation: Explanation, monkeypatch: pytest.MonkeyPatch) -> None:
    """An explanation is held to its coupling by fingerprints that were taken when that was loaded."""
    with client_of(Library([root]), lambda *_, **__: explanation) as client:
        id = ask(client)
        over(client, id)
        for taken in (
            "bridge.models.dense.DenseModel.fingerprint",
            "bridge.explanations.explanation.sparse_fingerprint",
            "bridge.nodes.statistics.sparse_fingerprint",
        ):
            monkeypatch.setattr(taken, lambda _: pytest.fail("weights were read again"))
        assert client.get(f"/api/explanations/{id}/page").status_code == 200
        monkeypatch.undo()
        other = replace(explanation, provenance=replace(explanation.provenance, coupling_fingerprint="0" * 64))
    with client_of(Library([root]), lambda *_, **__: other) as client:
        id = ask(client)
        over(client, id)
        refused(client.get(f"/api/explanations/{id}/page"), 422, "was made with other weights (of ")


def test_what_cannot_be_loaded_is_told_without_its_folders(root: Path) -> None:
    library = Library([root])
    name, folder = library.coupling(None)
    facts = json.loads((folder / "coupling.json").read_text())
    facts["dense"]["name"] = facts["recipe"]["dense"] = "/srv/secret models/dense"
    facts["dense"]["beside"] = "../../secret models/dense"
    (folder / "coupling.json").write_text(json.dumps(facts))
    assert library.facts(folder)["dense"] == "dense"
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        library.load(name)
    assert "secret" not in str(caught.value) and str(root) not in str(caught.value) and "dense" in str(caught.value)


def test_damaged_files_are_told_without_their_folders(root: Path, tmp_path: Path) -> None:
    library = Library([root], tmp_path)
    name, folder = library.coupling(None)
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "circuit.json").write_text("{")
    (folder / "labels.json").write_text("{")
    _, found = library.circuit(next(iter(library.circuits())))
    for read in (lambda: finite_json(found / "circuit.json"), lambda: library.labels(name)):
        with pytest.raises(CheckpointError, match="damaged") as caught:
            read()
        assert str(tmp_path) not in str(caught.value) and str(folder) not in str(caught.value)


def test_a_coupling_that_was_fitted_again_is_loaded_again(root: Path) -> None:
    library = Library([root])
    name, folder = library.coupling(None)
    first = library.load(name)
    assert library.load(name) is first
    os.utime(folder / "coupling.json", (1, 1))
    assert library.find_loaded(name) is None and library.load(name) is not first
    for index in range(3):  # what is in memory stays bounded
        shutil.copytree(folder, root / f"copy{index}")
        library.load(f"models/copy{index}")
    assert sum(library.find_loaded(name) is not None for name in library.couplings()) == 2


def test_tasks_are_listed_and_only_they_are_read(client: TestClient, tmp_path: Path) -> None:
    listed = client.get("/api/tasks").json()
    assert {"name": "ioi", "language": "english"}.items() <= next(one for one in listed if one["name"] == "ioi").items()
    task = client.get("/api/tasks/for_while").json()
    assert task["pairs"] and all(pair["prompt"] != pair["counterfactual"] and pair["answer"] for pair in task["pairs"])
    (tmp_path / "mine.jsonl").write_text("{}")
    for name in ("nope", "mine.jsonl", "%2Fetc%2Fpasswd", str(tmp_path / "mine.jsonl").replace("/", "%2F")):
        assert client.get(f"/api/tasks/{name}").status_code == 404


@pytest.fixture
def circuits(dense: DenseModel, tmp_path: Path) -> Path:
    """A folder of circuits: one found, one of which there is none, one damaged, one that holds NaN, and links out of it."""
    import torch
    from support.models import VOCABULARY, planted_sparse

    folder, outside = tmp_path / "circuits", tmp_path / "outside"
    corpus_bt = torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))
    result = planted_result(subject_over(planted_sparse(dense), corpus_bt), "planted")
    for name in ("suite/planted", "odd", "nan"):
        result.save(folder / name)
    result.save(outside)
    save_failure(folder / "failed", "ioi", "the sparse model does not do it", Size(1, 1), None, {})
    (folder / "odd" / "circuit.json").write_text("[]")
    values = json.loads((folder / "nan" / "circuit.json").read_text())
    (folder / "nan" / "circuit.json").write_text(json.dumps(values | {"losses": {"nodes": math.nan}}))
    (folder / "link").symlink_to(outside)
    (folder / "file").mkdir()
    (folder / "file" / "circuit.json").symlink_to(outside / "circuit.json")
    return folder


def test_circuits_are_listed_and_shown(root: Path, circuits: Path) -> None:
    with client_of(Library([root], circuits)) as client:
        listed = {one["name"]: one for one in client.get("/api/circuits").json()}
        assert list(listed) == ["circuits/failed", "circuits/nan", "circuits/odd", "circuits/suite/planted"]
        planted = listed["circuits/suite/planted"]
        stored = json.loads((circuits / "suite" / "planted" / "circuit.json").read_text())
        assert (planted["task"], planted["nodes"], planted["edges"]) == ("planted", 6, 4)
        shown = client.get("/api/circuits/circuits/suite/planted").json()
        assert shown == {"name": "circuits/suite/planted"} | {key: stored[key] for key in shown if key != "name"}
        assert "does not do it" in listed["circuits/failed"]["error"]
        for name in ("failed", "nan", "odd"):
            refused(client.get(f"/api/circuits/circuits/{name}"), 409, listed[f"circuits/{name}"]["error"])
        for name in (
            "circuits/link",
            "circuits/file",
            "circuits/..%2Foutside",
            "..%2F..%2Fetc%2Fpasswd",
            "%2Fetc%2Fpasswd",
            "%00",
        ):
            refused(client.get(f"/api/circuits/{name}"), 404)


def test_folders_that_cannot_be_served(root: Path, coupling_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "again" / "tiny").mkdir(parents=True)
    for couplings, circuits, message in (
        ([tmp_path / "none"], None, "is not a folder"),
        ([tmp_path / "empty"], None, "no coupling in"),
        ([coupling_folder, tmp_path / "again" / "tiny"], None, "are called 'tiny'"),
        ([root], tmp_path / "none", "circuits="),
    ):
        with pytest.raises(UserError, match=message):
            Library(couplings, circuits)


# -- labels -------------------------------------------------------------------------------------------------------------


def test_labels_are_kept_in_the_couplings_folder(client: TestClient, root: Path) -> None:
    assert client.get("/api/labels").json() == {}
    names = [f"L1.mlp_act[{index}]" for index in range(len(HOSTILE))]
    sent = dict(zip(names, HOSTILE, strict=True))
    kept = client.put("/api/labels", json=sent)
    assert kept.status_code == 200
    assert kept.json() == {name: " ".join(text.split()) for name, text in sent.items() if text.strip()}
    stored = json.loads((root / "deep" / "tiny" / "labels.json").read_text())
    assert stored == kept.json() == client.get("/api/labels", params={"bridge": "models/deep/tiny"}).json()
    # some of them changed, the others kept; then all replaced
    changed = client.patch("/api/labels", json={names[0]: " a  name ", names[1]: "", "embedding[3]": "x"}).json()
    assert changed == {name: text for name, text in stored.items() if name != names[1]} | {
        names[0]: "a name",
        "embedding[3]": "x",
    }
    assert client.put("/api/labels", json={names[2]: "only"}).json() == {names[2]: "only"} == client.get("/api/labels").json()


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ({"../x": "x"}, ["'../x'", "as in L1.mlp_act[37]"]),
        ({"L1.mlp_act[37]\n": "x"}, ["names no node"]),
        ({"L1.mlp_act[1]": "x" * (LONGEST_LABEL + 1)}, [str(LONGEST_LABEL), "shorten"]),
        ({"L1.mlp_act[1]": "a\x00b"}, ["'\\x00'", "leave it out"]),
        ({"L1.mlp_act[1]": None}, ["string"]),
        ({f"L1.mlp_act[{index}]": "x" for index in range(5001)}, ["5,001 labels", "5,000"]),
        (["x"], ["the body"]),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_kept(client: TestClient, labels: Any, parts: list[str]) -> None:
    before = client.patch("/api/labels", json={"L0.mlp_act[1]": "before"}).json()
    refused(client.put("/api/labels", json=labels), 422, *parts)
    assert client.get("/api/labels").json() == before


def test_a_label_file_is_the_earlier_one_or_the_new_one(
    client: TestClient, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = root / "deep" / "tiny" / "labels.json"
    before = client.put("/api/labels", json={"L0.mlp_act[1]": "before"}).json()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        refused(client.put("/api/labels", json={"L0.mlp_act[1]": "after"}), 409, "No space left")
    assert client.get("/api/labels").json() == before and [path.name for path in file.parent.glob(".*")] == []
    for damaged in ("{", "[]", '{"L0.mlp_act[1]": 5}', '{"L0.mlp_act[1]": NaN}', '{"L0.mlp_act[1]": "\\ud800"}'):
        file.write_text(damaged)
        refused(client.get("/api/labels"), 409, "damaged")
        refused(client.patch("/api/labels", json={"L0.mlp_act[1]": "x"}), 409, "damaged")
        assert file.read_text() == damaged  # for a person to mend
    (tmp_path / "secret.json").write_text('{"a": "secret"}')
    file.unlink()
    file.symlink_to(tmp_path / "secret.json")
    refused(client.get("/api/labels"), 409, "link")
    client.put("/api/labels", json={"L0.mlp_act[1]": "x"})
    assert not file.is_symlink() and "secret" in (tmp_path / "secret.json").read_text()


# -- pages and steering -------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Which elements a page has, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_prompt_is_text_on_the_page(root: Path, explanation: Explanation, hostile: str) -> None:
    hostile = f"w5 {hostile}"  # a word that the vocabulary has: what has none is refused, once the coupling is loaded

    def explain_it(coupling: CoupledModels, prompt: str, **_: Any) -> Explanation:
        return replace(explanation, prompt=prompt)

    with client_of(Library([root]), explain_it) as client:
        calm, id = ask(client, "calm"), ask(client, hostile)
        assert over(client, id)["explanation"]["prompt"] == hostile and over(client, calm)["status"] == "done"
        pages = [client.get(f"/api/explanations/{each}/page") for each in (calm, id)]
        assert Elements(pages[0].text).tags == Elements(pages[1].text).tags
        assert all(page.headers["content-type"] == "text/html; charset=utf-8" for page in pages)
        policy = pages[1].headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "script-src 'unsafe" not in policy


def test_the_first_page_runs_its_own_script_and_no_other(client: TestClient) -> None:
    answer = client.get("/")
    licences = (files("bridge.viewer") / "licences.txt").read_text()
    rest = answer.text.replace(f'<script type="text/plain">{licences}</script>', "")
    assert Elements(rest).tags.count("script") == 1 and "http" not in rest and "{{" not in rest and "@font-face" in rest
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]


def test_the_first_page_marks_what_is_unseen_as_the_explanations_pages_do(client: TestClient) -> None:
    sources = sorted((Path(__file__).parents[2] / "bridge" / "viewer" / "src").glob("*.js"))
    viewer = "".join(source.read_text(encoding="utf-8") for source in sources)
    page = client.get("/").text
    for start in ("const HIDDEN =", "const SIGNS ="):
        line = viewer[viewer.index(start) :].partition(";\n")[0]
        assert line in page


def steered_node(explanation: Explanation) -> str:
    return next(node.id for node in explanation.nodes if node.kind != "error")


def test_steering_is_that_of_the_library(client: TestClient, coupled: CoupledModels, explanation: Explanation) -> None:
    id = ask(client)
    over(client, id)
    node = steered_node(explanation)
    told = client.post(f"/api/explanations/{id}/steer", json={"node": node, **STEERING}).json()
    moves, at = [f"{node}=1.5"], (0.5,)
    expected = steer(coupled, explanation.prompt, moves, strengths=at, target=explanation.answer.id).curve[-1]
    assert told["probability_target"] == pytest.approx(expected.probability_target, rel=1e-4)
    assert told["text"] == expected.text


def test_steering_what_cannot_be_steered(client: TestClient, explanation: Explanation) -> None:
    id = ask(client)
    over(client, id)
    where, node = f"/api/explanations/{id}/steer", steered_node(explanation)
    refused(client.post(where, json={"node": "L9.mlp_act[1]@0", **STEERING}), 404, "'L9.mlp_act[1]@0'")
    refused(client.post("/api/explanations/none/steer", json={"node": node, **STEERING}), 404, "'none'")
    for odd in ({"strength": 1.5}, {"strength": -1}, {"value": 1e9}, {"value": "x"}, {"more": 1}):
        refused(client.post(where, json={"node": node, **STEERING, **odd}), 422, next(iter(odd)))
    body = json.dumps({"node": node, **STEERING}).replace("1.5", "NaN")
    refused(client.post(where, content=body, headers={"Content-Type": "application/json"}), 422, "finite")


def test_steering_is_done_between_two_phases_of_what_runs(
    root: Path, explanation: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(explanation)
    threads: list[str] = []

    def steered(
        coupling: CoupledModels, prompt: str, moves: list[str], *, strengths: tuple[float, ...], **_: Any
    ) -> SimpleNamespace:
        threads.append(threading.current_thread().name)
        assert (coupling.sparse.width, moves) == (32, [f"{node}=1.5"])
        chances = {"probability_target": 0.25, "probability_contrast": 0.5}
        at = [SimpleNamespace(strength=s, dense=explanation.dense, text=f"{prompt} on", **chances) for s in (0, *strengths)]
        return SimpleNamespace(curve=at)

    monkeypatch.setattr("bridge.server.app.steer", steered)
    node = steered_node(explanation)
    with client_of(Library([root]), held) as client:
        held.go.set()
        id = ask(client)
        over(client, id)
        held.go.clear()
        held.begun.clear()
        running = ask(client)
        assert held.begun.wait(PATIENCE)
        answer = client.post(f"/api/explanations/{id}/steer", json={"node": node, **STEERING})
        assert answer.status_code == 200, answer.text
        assert client.get(f"/api/explanations/{running}").json()["status"] == "running"
        told = answer.json()
        assert (told["strength"], told["probability_target"], told["text"]) == (0.5, 0.25, f"{PROMPT} on")
        assert [one["token"]["text"] for one in told["dense"]] == [one.token.text for one in explanation.dense]
        refused(client.post(f"/api/explanations/{running}/steer", json={"node": node, **STEERING}), 409, "running")
        assert threads == ["bridge-worker_0"]


# -- the command --------------------------------------------------------------------------------------------------------


def refused_command(*arguments: object) -> str:
    result = CliRunner().invoke(commands, ["serve", *map(str, arguments)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("bridge: "), result.output
    return result.stderr


def test_the_command_refuses_in_a_line(coupling_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a folder" in refused_command("--bridge", tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in refused_command("--bridge", coupling_folder, "--port", taken.getsockname()[1])
    assert "no address of this machine" in refused_command("--bridge", coupling_folder, "--host", "no.such.host.invalid")
    assert "16 or more" in refused_command("--bridge", coupling_folder, "--host", "0.0.0.0", "--port", 0, "--token", "short")
    monkeypatch.setitem(sys.modules, "bridge.server.run", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "bridge.server.run")
    assert "uvicorn is not installed" in refused_command("--bridge", coupling_folder)


def test_the_command_serves_until_interrupted(coupling_folder: Path) -> None:
    """A prompt is being explained when the interrupt comes."""
    import urllib.request

    command = [
        sys.executable,
        "-m",
        "bridge.cli.main",
        "serve",
        "--bridge",
        str(coupling_folder),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = ""
        while "http://" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        address = line.split()[-1]
        request = urllib.request.Request(
            f"{address}api/explanations", json.dumps({"prompt": PROMPT}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 202
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0 and "Traceback" not in errors, errors
