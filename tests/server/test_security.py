"""Who may ask what: names, tokens, origins, sizes; and what every answer tells a browser."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.server_cases import client_of, refused

from bridge.server import security
from bridge.server.library import Library
from bridge.server.security import COOKIE, AddressError, Guard, Rules, is_loopback, page_policy

TOKEN = "a-token.of_24~characters"


@pytest.fixture
def library(coupling_folder: Path, tmp_path: Path) -> Library:
    shutil.copytree(coupling_folder, tmp_path / "tiny")
    return Library([tmp_path / "tiny"])


@pytest.fixture
def client(library: Library) -> TestClient:
    return client_of(library)


@pytest.fixture
def guarded(library: Library) -> TestClient:
    """A service that other machines reach."""
    return client_of(library, rules=Rules.for_address("0.0.0.0", 8765, TOKEN))


# -- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "LOCALHOST:8765", "[::1]:8765"])
def test_names_of_this_machine_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8765", "localhost", "localhost:80", "127.0.0.1.evil.example:8765", "localhost:8765.evil",
        "127.0.0.1:8765@evil.example", "", "0.0.0.0:8765", "localhost.:8765", "127.0.0.1:08765", " 127.0.0.1:8765", "<b>:8765",
    ],
)  # fmt: skip
def test_other_names_are_not(client: TestClient, host: str) -> None:
    for path in ("/", "/api/health", "/openapi.json", "/nowhere"):
        refused(client.get(path, headers={"Host": host}), 421, "127.0.0.1:8765")


def test_two_names_are_none(library: Library) -> None:
    messages = asked(
        Guard(_never, Rules.for_address("127.0.0.1", 8765, None)), [("host", "localhost:8765"), ("host", "localhost:8765")]
    )
    assert messages[0]["status"] == 421
    assert asked(Guard(_never, Rules.for_address("127.0.0.1", 8765, None)), [])[0]["status"] == 421


def test_an_address_that_others_reach_needs_a_good_token() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost", "LocalHost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", "", "localhost.example.com"))
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(AddressError, match="needs a token"):
            Rules.for_address(host, 8765, None)
    for token in ("", "short", "a token of twenty letters", "é" * 20, "x" * 20 + "\n", 'x";' * 10):
        with pytest.raises(AddressError, match="16 or more") as refusal:
            Rules.for_address("127.0.0.1", 8765, token)
        assert not token or token not in str(refusal.value).partition("give one")[0]
    assert Rules.for_address("127.0.0.1", 80, None).hosts == {"127.0.0.1", "localhost", "[::1]"} | {
        f"{name}:80" for name in ("127.0.0.1", "localhost", "[::1]")
    }


# -- tokens -------------------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_said(guarded: TestClient) -> None:
    for path in ("/", "/api/health", "/api/couplings", "/openapi.json", "/nowhere", "/api/labels"):
        answer = guarded.get(path)
        refused(answer, 401, "Bearer")
        assert answer.headers["WWW-Authenticate"] == "Bearer" and TOKEN not in answer.text
    refused(guarded.put("/api/labels", json={}), 401)


@pytest.mark.parametrize("said", ["", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é" * 24, "null"])
def test_a_wrong_token_is_none(guarded: TestClient, said: str) -> None:
    refused(guarded.get("/api/health", headers=[(b"Authorization", f"Bearer {said}".encode())]), 401)
    refused(guarded.get("/api/health", headers=[(b"Cookie", f"{COOKIE}={said}".encode())]), 401)
    refused(guarded.get("/api/health", headers={"Authorization": f"Basic {TOKEN}"}), 401)
    refused(guarded.get("/api/health", params={"token": said}), 401)


def test_the_token_opens_everything(guarded: TestClient) -> None:
    for headers in (
        {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer  {TOKEN} "}, {"Cookie": f"a=b; {COOKIE}={TOKEN}"},
    ):  # fmt: skip
        assert guarded.get("/api/health", headers=headers | {"Host": "any.example"}).status_code == 200
    described = guarded.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert described["paths"]["/api/health"]["get"]["security"] == [{"HTTPBearer": []}]


@pytest.mark.parametrize(
    "line",
    [
        'prefs={{"a":1}}; {}', "x=a b; {}", "noval; {}", "a=ü; {}", "{}; x=a b", ";;=; {};", "bad\xff={{[]}};{};noval",
        '"; {}; "', f"{COOKIE}=another-servers-on-this-host; {{}}",
    ],
)  # fmt: skip
def test_the_cookie_is_found_among_any_others(guarded: TestClient, line: str) -> None:
    def answer(value: str) -> Any:
        header = line.format(f"{COOKIE}={value}").encode("latin-1")
        return guarded.get("/api/health", headers=[(b"Cookie", header)])

    assert answer(TOKEN).status_code == answer(f'"{TOKEN}"').status_code == 200
    refused(answer(TOKEN[:-1]), 401)
    refused(guarded.get("/api/health", headers=[(b"Cookie", line.format(f"x{COOKIE}={TOKEN}").encode("latin-1"))]), 401)
    refused(guarded.get("/api/health", headers=[(b"Cookie", line.format(f"x={COOKIE}={TOKEN}").encode("latin-1"))]), 401)


def test_opening_the_address_with_the_token_keeps_it_in_a_cookie(guarded: TestClient) -> None:
    answer = guarded.get(f"/api/labels?token={TOKEN}&bridge=a%26b", follow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/api/labels?bridge=a%26b")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}={TOKEN};") and "HttpOnly" in cookie and "SameSite=Lax" in cookie
    assert guarded.get("/api/health").status_code == 200  # the client keeps cookies, as a browser does
    refused(guarded.put("/api/labels", json={}, headers={"Origin": "http://evil.example"}), 403)
    # nothing of the path makes the redirect lead elsewhere
    for path in ("//evil.example/", "/\\evil.example/", "///evil.example"):
        answer = client_send(guarded, f"{path}?token={TOKEN}")
        assert answer[0]["status"] == 303
        location = dict(answer[0]["headers"])[b"location"].decode()
        assert location.startswith("/evil.example")
    refused(guarded.post(f"/api/explanations?token={TOKEN}", json={}), 422)  # by its cookie


def test_a_query_does_not_authorise_what_changes_anything(guarded: TestClient) -> None:
    refused(guarded.put(f"/api/labels?token={TOKEN}", json={}), 401)


# -- origins ------------------------------------------------------------------------------------------------------------

FOREIGN = [
    {"Origin": "http://evil.example"}, {"Origin": "http://evil.example:8765"}, {"Origin": "null"}, {"Origin": ""}, {"Origin": "http://["},
    {"Origin": "http://localhost:8766"}, {"Origin": "http://127.0.0.1:8765.evil.example"}, {"Origin": "file://127.0.0.1:8765"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://localhost:8765"},
]  # fmt: skip


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_change_nothing(client: TestClient, headers: dict[str, str]) -> None:
    before = client.get("/api/labels").json()
    label = {"L0.mlp_act[1]": "theirs"}
    refused(client.put("/api/labels", json=label, headers=headers), 403)
    refused(client.patch("/api/labels", json=label, headers=headers), 403)
    refused(client.post("/api/explanations", json={"prompt": "w5"}, headers=headers), 403)
    refused(client.delete("/api/explanations/none", headers=headers), 403)
    assert client.get("/api/labels").json() == before
    assert client.get("/api/explanations").json() == []
    assert "access-control-allow-origin" not in client.options("/api/labels", headers=headers).headers


def test_the_servers_own_page_and_programs_do(client: TestClient) -> None:
    label = {"L0.mlp_act[1]": "ours"}
    for headers in ({}, {"Origin": "http://127.0.0.1:8765", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert client.put("/api/labels", json=label, headers=headers).status_code == 200


# -- bodies -------------------------------------------------------------------------------------------------------------


async def _never(*_: Any) -> None:
    raise AssertionError("this was not to be let through")


def asked(
    app: Any,
    headers: Iterable[tuple[str, str]],
    *,
    method: str = "GET",
    path: str = "/",
    query: str = "",
    parts: Iterable[bytes] = (b"",),
) -> list[dict[str, Any]]:
    """What an ASGI application sends for a request whose body comes in parts; after the last of them nothing comes any more."""
    sent: list[dict[str, Any]] = []
    coming = iter(parts)

    async def receive() -> dict[str, Any]:
        if (body := next(coming, None)) is None:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": body, "more_body": body != b""}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "scheme": "http", "headers": [(name.encode(), value.encode()) for name, value in headers],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent


def client_send(client: TestClient, target: str) -> list[dict[str, Any]]:
    path, _, query = target.partition("?")
    return asked(client.app, [("host", "127.0.0.1:8765")], path=path, query=query)


HOST = ("host", "127.0.0.1:8765")


def test_large_bodies_are_not_read(client: TestClient) -> None:
    most = Rules(None, TOKEN).most_bytes
    refused(client.put("/api/labels", content=b"x" * (most + 1)), 413, f"{most:,} bytes")
    refused(client.put("/api/labels", content=b"x", headers={"Content-Length": str(10**40)}), 413)
    rules = Rules.for_address("127.0.0.1", 8765, None)
    endless = (b"x" * 65536 for _ in range(10**9))
    taken = 0

    def counted() -> Iterable[bytes]:
        nonlocal taken
        for part in endless:
            taken += len(part)
            yield part

    sent = asked(Guard(_never, rules), [HOST], method="POST", parts=counted())
    assert sent[0]["status"] == 413 and json.loads(sent[1]["body"])["detail"] and taken <= most + 65536


def test_bodies_that_do_not_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.05)
    sent = asked(Guard(_never, Rules.for_address("127.0.0.1", 8765, None)), [HOST], method="POST", parts=[b"slow"])
    assert sent[0]["status"] == 408 and "0.05 seconds" in json.loads(sent[1]["body"])["detail"]


# -- answers ------------------------------------------------------------------------------------------------------------


def test_every_answer_tells_browsers_what_it_is(client: TestClient, guarded: TestClient) -> None:
    answers = [
        client.get("/"), client.get("/api/health"), client.get("/nowhere"), client.get("/api/health", headers={"Host": "x"}),
        client.put("/api/labels", content=b"x"), guarded.get("/"), client.delete("/api/labels"),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200, 200, 404, 421, 422, 401, 405]
    for answer in answers:
        for name, value in security.HEADERS.items():
            assert answer.headers[name] == value
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
        assert not {"server", "x-powered-by"} & set(answer.headers)


def test_what_nobody_expected_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("secret 17")

    sent = asked(Guard(fail, Rules.for_address("127.0.0.1", 8765, None)), [HOST])
    assert sent[0]["status"] == 500 and b"secret" not in sent[1]["body"] and json.loads(sent[1]["body"])["detail"]
    assert "secret 17" in caplog.text  # for who runs the server


def test_a_pages_policy_names_its_scripts_by_what_is_in_them() -> None:
    import base64
    import hashlib

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = page_policy(
        '<script type="application/json">{"a": 1}</script>\n<script>\r\nf(1 < 2, "<b>");\n</script><script>g()</script>'
    )
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert scripts == f"script-src {digest(chr(10) + 'f(1 < 2, ' + chr(34) + '<b>' + chr(34) + ');' + chr(10))} {digest('g()')}"
    assert "script-src 'none'" in page_policy("<p onclick='x()'>text</p>")
