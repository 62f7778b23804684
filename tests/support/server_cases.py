"""What tests share: server_cases."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bridge.display.progress import OnProgress, Phase
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.models.bridges import CoupledModels
from bridge.server.app import create_app
from bridge.server.library import Library
from bridge.server.security import Rules

PROMPT = "w30 w31 w4 w8"


OTHER = "w30 w31 w4 w9"


RULES = Rules.for_address("127.0.0.1", 8765, None)


PATIENCE = 60.0  # seconds after which a test gives up


@pytest.fixture(scope="module")
def coupled(coupling_folder: Path) -> CoupledModels:
    return CoupledModels.from_pretrained(coupling_folder)


@pytest.fixture(scope="module")
def explanation(coupled: CoupledModels) -> Explanation:
    return explain(coupled, PROMPT)


@pytest.fixture
def root(coupling_folder: Path, tmp_path: Path) -> Path:
    """A folder of couplings that a test may write to, with one in it."""
    shutil.copytree(coupling_folder, tmp_path / "models" / "deep" / "tiny")
    beside = json.loads((coupling_folder / "coupling.json").read_text())["dense"]["name"]
    assert Path(beside).is_dir()
    return tmp_path / "models"


def client_of(
    library: Library, explain: Callable[..., Explanation] = explain, *, rules: Rules = RULES, **bounds: int
) -> TestClient:
    """A client of the service that asks as a program on this machine does."""
    return TestClient(create_app(library, rules, explain=explain, **bounds), base_url="http://127.0.0.1:8765")


@pytest.fixture
def client(root: Path, explanation: Explanation) -> Iterator[TestClient]:
    """A client of a service that has the explanation of any prompt at once."""
    with client_of(Library([root]), lambda *_, **__: explanation) as client:
        yield client


class Held:
    """An `explain` that says phase after phase until it is let go, and counts how often it was called."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation, self.begun, self.go, self.calls = explanation, threading.Event(), threading.Event(), 0

    def __call__(self, coupling: CoupledModels, prompt: str, *, progress: OnProgress, **_: Any) -> Explanation:
        self.calls += 1
        self.begun.set()
        started = time.monotonic()
        while not self.go.wait(0.005):
            progress(Phase("held"))
            assert time.monotonic() - started < PATIENCE
        return replace(self.explanation, prompt=prompt)


def ask(client: TestClient, prompt: str = PROMPT, **more: Any) -> str:
    answer = client.post("/api/explanations", json={"prompt": prompt, **more})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/api/explanations/{answer.json()['id']}"
    return answer.json()["id"]


def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it holds."""
    started = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.005)
    return value


def over(client: TestClient, id: str) -> dict[str, Any]:
    """An explanation once nothing more happens to it."""

    def look() -> dict[str, Any] | None:
        values = client.get(f"/api/explanations/{id}").json()
        return values if values["status"] not in ("queued", "running") else None

    return until(look)


def refused(answer: Any, status: int, *parts: str) -> None:
    """That an answer is a refusal in one line that holds some parts."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"detail"}
    detail = answer.json()["detail"]
    assert "\n" not in detail and "Traceback" not in detail
    for part in parts:
        assert part in detail, detail


HOSTILE = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\u202etxt.exe", "'; DROP TABLE nodes; --", "{{7*7}}",
    "\\u0000", "${jndi:ldap://x}", "\u2028\u2029 line", "\ufeff", "e\u0301", "\U0001f469\u200d\U0001f52c", "javascript:alert(1)",
    "&lt;b&gt;", "]]>",
    "__proto__", "../../etc/passwd", "%00%0a", "\x85next",
]  # fmt: skip
