"""Access rules, checked before any route: host, token, origin and size of a request, and headers of every response.

    Host      on loopback, it must be a name of this machine with the served port: a page of another site whose name was made
              to resolve to this machine (DNS rebinding) sends its own name
    token     required if other machines can connect, or if one is set: `Authorization: Bearer`, or a cookie, which is set by
              opening the address once with `?token=`; compared in constant time
    Origin    a request that can change anything must not come from a page of another site (CSRF)
    body      at most `most_bytes` bytes, received within BODY_SECONDS, and read before the route runs

Every refusal is JSON, `{"detail": one line}`. An unexpected exception is answered in the same form, and its traceback is logged.
Every answer forbids framing, content sniffing, and all sources that its own Content-Security-Policy does not name.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge.errors import UserError
from bridge.explanations.page import digest

COOKIE = "bridge_token"
TOKEN = r"[A-Za-z0-9._~+/=-]{16,}"
BODY_SECONDS = 10.0
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
DENY_ALL_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_SCRIPT = re.compile(r"<script(?![^>]*json)[^>]*>(.*?)</script>", re.DOTALL)  # in our own pages; scripts of type JSON are data
_log = logging.getLogger("bridge.server")


class AddressError(UserError):
    """An address or token that cannot be used to serve."""


@dataclass(frozen=True)
class Rules:
    """The access rules: `hosts` are the accepted values of the Host header (None: any), `token` is required (None: no token is).

    Raises AddressError if any host is accepted without a token, or if the token is malformed.
    """

    hosts: frozenset[str] | None
    token: str | None = None
    most_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.hosts is None and self.token is None:
            raise AddressError("an address that other machines can reach", "needs a token", "give one, or serve on 127.0.0.1")
        if self.token is not None and not re.fullmatch(TOKEN, self.token):
            raise AddressError(
                "the token given",
                "is not valid: a token has 16 or more letters, digits and - . _ ~ + / =",
                f"give one such as {secrets.token_urlsafe(18)}",
            )

    @staticmethod
    def for_address(host: str, port: int, token: str | None) -> Rules:
        """The rules for a server bound to an address."""
        if not is_loopback(host):
            return Rules(None, token)
        names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower()}
        with_port = {f"{name}:{port}" for name in names}
        return Rules(frozenset(with_port | names if port == 80 else with_port), token)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware that applies the rules."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "Content-Security-Policy": DENY_ALL_POLICY}.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            receive = await self._read_body(scope, receive)
            await self.app(scope, receive, answer)
        except HTTPException as refused:
            await refusal(refused.status_code, refused.detail, refused.headers)(scope, receive, answer)
        except Exception:
            _log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await refusal(500, "the request failed inside bridge; see the server's output")(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        """Raise HTTPException if a request breaks a rule."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        if self.rules.hosts is not None and host not in self.rules.hosts:
            known = ", ".join(sorted(self.rules.hosts))
            raise HTTPException(421, f"Host {host!r} is not served here; use one of {known}")
        self._check_token(scope, headers)
        if scope["method"] in SAFE_METHODS:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if (origin is not None and _authority(origin) != host) or site not in ("same-origin", "none"):
            raise HTTPException(
                403, f"Origin {origin!r} is another site, which may not change anything here; use this server's own page"
            )

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        token = self.rules.token
        if token is None:
            return
        shown = headers.getlist("authorization")
        given = [value.partition(" ")[2].strip() for value in shown if value.lower().startswith("bearer ")]
        given += [value for line in headers.getlist("cookie") for value in _cookies(line)]
        if any(_equal_secrets(value, token) for value in given):
            return
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        if scope["method"] == "GET" and any(key == "token" and _equal_secrets(value, token) for key, value in query):
            rest = urlencode([(key, value) for key, value in query if key != "token"])
            # the path as received, without leading slashes and backslashes, which could redirect to another site
            path = "/" + scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0].lstrip("/\\")
            cookie = f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax"
            raise HTTPException(
                303, "the token is kept in a cookie", {"Location": f"{path}?{rest}" if rest else path, "Set-Cookie": cookie}
            )
        raise HTTPException(
            401,
            "the server's token is missing or wrong; send it as 'Authorization: Bearer TOKEN', or open /?token=TOKEN once",
            {"WWW-Authenticate": "Bearer"},
        )

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the whole body, and return a `receive` that replays it. Raises HTTPException if it is too large or too slow."""
        most = self.rules.most_bytes
        too_large = HTTPException(413, f"the body is larger than the limit of {most:,} bytes; send less")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in Request(scope, receive).stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early; send all of it") from None
        except TimeoutError:
            raise HTTPException(408, f"the body was not received within {BODY_SECONDS:g} seconds; send it faster") from None
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay


def page_policy(html: str) -> str:
    """The Content-Security-Policy of a self-contained page: its own inline scripts by hash, and nothing from elsewhere."""
    scripts = _SCRIPT.findall(html.replace("\r\n", "\n"))
    hashes = " ".join(f"'{digest(text)}'" for text in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The JSON answer to a refused request."""
    return JSONResponse({"detail": one_line(detail)}, status, dict(headers or {}))


def one_line(text: str) -> str:
    """A text as one line that can be sent, with invalid characters escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _authority(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None


def _cookies(line: str) -> list[str]:
    """The tokens in a Cookie header. SimpleCookie is not used: it finds nothing if another cookie of the host is malformed."""
    parts = (part.partition("=") for part in line.split(";"))
    return [value.strip(' \t"') for name, _, value in parts if name.strip() == COOKIE]


def _equal_secrets(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())
