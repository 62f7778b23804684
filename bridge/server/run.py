"""Run the server at an address. The socket is bound first, so the printed address is the one that is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from bridge.server.app import create_app
from bridge.server.library import Library
from bridge.server.security import AddressError, Rules, is_loopback

BACKLOG = 128
MOST_CONNECTIONS = 512
HEAD_SECONDS = 10.0


def serve(
    couplings: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    circuits: Path | None = None,
    token: str | None = None,
    dense: str | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> bool:
    """Serve until interrupted, and return whether all jobs had stopped by then.

    `progress` takes the lines to print; `dense` is where the couplings' dense model is, if it has moved. Port 0 means any free
    port. Raises AddressError if the address cannot be bound, LibraryError or CheckpointError if the folders cannot be served.
    """
    everyone = not is_loopback(host)
    if everyone and token is None:
        token = secrets.token_urlsafe(24)
    library = Library(couplings, circuits, dense=dense, device=device)
    with bind_socket(host, port) as bound:
        port = bound.getsockname()[1]
        app = create_app(library, Rules.for_address(host, port, token))
        name, _ = library.coupling(None)
        progress(f"loading {name}")
        library.load(name)  # reports a damaged coupling before the first request
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        progress(f"serving {', '.join(library.couplings())} at http://{shown}:{port}/{f'?token={token}' if token else ''}")
        if everyone:
            progress("the token is sent unencrypted: if others can listen on the network, serve on 127.0.0.1 behind ssh or TLS")
        progress("Ctrl-C to stop")
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[bound])
    return app.state.jobs.stop(0)


class _HeadTimeoutProtocol(H11Protocol):
    """HTTP/1.1 that closes a connection if a request's head is incomplete HEAD_SECONDS after the opening or its first bytes.

    uvicorn itself waits forever for a head, and for the rest of a body after the request was answered.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        """Run the timer while no request is being answered; more bytes do not restart it."""
        waits = (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if waits and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The uvicorn server of an application, with all limits on connections."""
    config = uvicorn.Config(
        app, http=_HeadTimeoutProtocol, log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        backlog=BACKLOG, limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=2, ws="none",
    )  # fmt: skip
    return uvicorn.Server(config)


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; connections queue until they are accepted. Raises AddressError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise AddressError(
            f"‹host› {host!r}", f"is no address of this machine ({error})", "give 127.0.0.1, or an address of this machine"
        ) from None
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise AddressError(
            f"‹port› {port} on {host}", f"cannot be used ({why})", "give another port, or 0 for any free port"
        ) from None
