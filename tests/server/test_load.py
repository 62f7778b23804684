"""The service under requests made from its own description, and under many at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import Any

import psutil
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS
from support.server_cases import Held, ask, client_of, over, until

from bridge.display.progress import Phase
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.models.bridges import CoupledModels
from bridge.server import run
from bridge.server.app import create_app
from bridge.server.library import Library
from bridge.server.run import bind_socket, make_server
from bridge.server.security import Rules

HOST = {"Host": "127.0.0.1:8765"}
CLIENTS, WAITING, KEPT = 50, 6, 8


@pytest.fixture(scope="module")
def explanation(coupling_folder: Path) -> Explanation:
    return explain(CoupledModels.from_pretrained(coupling_folder), "w5 w9 w12 w5")


# -- requests made from the description ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(coupling_folder: Path, explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The schema of a service in which one explanation is done and one under way."""
    held = Held(explanation)
    folder = Path(shutil.copytree(coupling_folder, tmp_path_factory.mktemp("described") / "tiny"))  # labels are kept in it
    with client_of(Library([folder]), held, waiting=3, remembered=4) as client:
        held.go.set()
        done = ask(client)
        over(client, done)
        held.go.clear()
        held.begun.clear()
        running = ask(client)
        until(held.begun.is_set)
        schema = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=HOST)
        chosen = random.Random(0)

        @schema.hook
        def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
            """In half of the cases something that there is."""
            if path_parameters and chosen.random() < 0.5:
                there = {"id": chosen.choice((done, running)), "name": "for_while"}
                return {key: there.get(key, value) for key, value in path_parameters.items()}
            return path_parameters

        yield schema
        held.go.set()


# a body can fit the description and yet name a token that is none; what has been cancelled is still there, as cancelled
SKIPPED = {"positive_data_acceptance", "use_after_free", "ensure_resource_availability"}


def test_every_answer_is_as_described(described: Any) -> None:
    excluded = [check for name, check in CHECKS._items.items() if name in SKIPPED]
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:

        @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))  # pyright: ignore[reportArgumentType]
        @given(case=operation.as_strategy())
        def every_case(case: Any) -> None:
            case.call_and_validate(excluded_checks=excluded, headers=HOST)

        every_case()


# -- many at once -------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(coupling_folder: Path, explanation: Explanation) -> Iterator[str]:
    """A real server on a free port; explanations take a moment of arithmetic, with phases."""

    def explain_it(*_: Any, progress: Any, **__: Any) -> Explanation:
        for phase in range(5):
            progress(Phase(f"phase {phase}"))
            torch.ones(256, 256).matmul(torch.ones(256, 256))
            time.sleep(0.005)
        return explanation

    with bind_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        app = create_app(
            Library([coupling_folder]),
            Rules.for_address("127.0.0.1", port, None),
            explain=explain_it,
            waiting=WAITING,
            remembered=KEPT,
        )
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()


def fetch(url: str, body: Any = None) -> tuple[int, Any, Message]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_fifty_at_once(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    statuses: Counter[int] = Counter()
    largest = 0
    before = psutil.Process().memory_info().rss

    def one(index: int) -> str:
        """What a patient client does: ask, come again when there is no room, and wait for the end."""
        nonlocal largest
        while True:
            status, told, headers = fetch(f"{address}/api/explanations", {"prompt": f"w{2 + index % 30}"})
            statuses[status] += 1
            if status == 202:
                break
            assert status == 429 and int(headers["Retry-After"]) >= 1, told
            time.sleep(0.05 * random.random())
        while True:
            status, job, _ = fetch(f"{address}/api/explanations/{told['id']}")
            statuses[status] += 1
            if status == 404:  # done, and others have been since
                return "forgotten"
            if job["status"] not in ("queued", "running"):
                return job["status"]
            health = fetch(f"{address}/api/health")[1]
            assert health["queued"] <= WAITING and health["running"] <= 1 and health["remembered"] <= KEPT
            largest = max(largest, health["queued"] + health["running"] + health["remembered"])

    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = Counter(pool.map(one, range(CLIENTS)))
    assert sum(ends.values()) == CLIENTS and set(ends) <= {"done", "forgotten"}
    assert set(statuses) <= {200, 202, 404, 429} and statuses[202] == CLIENTS and statuses[429]
    assert len(fetch(f"{address}/api/explanations")[1]) == KEPT and largest <= WAITING + 1 + KEPT
    grown = (psutil.Process().memory_info().rss - before) / 1e6
    with capsys.disabled():
        print(f"\n{CLIENTS} clients: {dict(ends)}, {dict(statuses)}, memory {grown:+.0f} MB")


def test_others_are_answered_while_one_is_explained(coupling_folder: Path, explanation: Explanation) -> None:
    held = Held(explanation)
    with client_of(Library([coupling_folder]), held) as client:
        ask(client)
        until(held.begun.is_set)
        for path in ("/api/health", "/api/couplings", "/api/tasks", "/api/circuits", "/api/labels", "/api/explanations", "/"):
            assert client.get(path).status_code == 200
        assert client.get("/api/health").json()["running"] == 1
        held.go.set()


# -- connections on which no request comes ------------------------------------------------------------------------------

SECONDS = 1.0
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that waits a second for a head; the application answers POST at once and GET after longer than that."""

    async def answer(scope: Any, _: Any, send: Any) -> None:
        assert scope["type"] == "http"
        for type, body in (("start", {"status": 200, "headers": [(b"content-length", b"4")]}), ("body", {"body": b"done"})):
            await send({"type": f"http.response.{type}", **body})
            if type == "start" and scope["method"] == "GET":
                await asyncio.sleep(2 * SECONDS)

    monkeypatch.setattr(run, "HEAD_SECONDS", SECONDS)
    monkeypatch.setattr(run, "MOST_CONNECTIONS", 5)
    with bind_socket("127.0.0.1", 0) as bound:
        server = make_server(answer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


def talk(port: int, *, first: bytes = b"", then: bytes = b"") -> tuple[bytes, float]:
    """What a server says to a beginning and then one byte after another, and the seconds after which it ends the connection."""
    said, started = b"", time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=0.05) as to, contextlib.suppress(ConnectionError):
        to.sendall(first)
        while time.monotonic() - started < 20:
            with contextlib.suppress(TimeoutError):
                part = to.recv(4096)
                if not part:
                    break
                said += part
            to.sendall(then)
    return said, time.monotonic() - started


@pytest.mark.parametrize(
    ("first", "then", "answers"),
    [
        (b"", b"", 0),
        (b"", b"x", 0),  # a head that never ends
        (b"GET / HTTP/1.1\r\nHost: x\r\n", b"", 0),
        (b"POST / HTTP/1.1\r\nHost: x\r\n\r\nGET", b"x", 1),  # the second head does not
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x", 1),  # a body that was answered already
    ],
)
def test_connections_without_a_request_are_ended(port: int, first: bytes, then: bytes, answers: int) -> None:
    said, seconds = talk(port, first=first, then=then)
    assert said.count(b"done") == answers and SECONDS * 0.8 < seconds < 10


def test_silent_connections_do_not_keep_others_out(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]

    def status() -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/", method="POST"), timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert status() == 503
    until(lambda: all(each.recv(1) == b"" for each in silent))
    assert status() == 200
    for each in silent:
        each.close()


def test_an_answer_that_takes_longer_is_whole_and_the_connection_goes_on(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as to:
        for _ in range(2):
            to.sendall(REQUEST[:9])
            time.sleep(SECONDS / 3)
            to.sendall(REQUEST[9:])
            said = b""
            while not said.endswith(b"done"):
                part = to.recv(4096)
                assert part, said
                said += part
