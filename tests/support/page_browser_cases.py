"""What tests share: page_browser_cases."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.server_cases import PATIENCE, until

from bridge.server.app import create_app
from bridge.server.library import Library
from bridge.server.run import bind_socket, make_server
from bridge.server.security import Rules

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (it is in bridge[dev])")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


WIDE = {"width": 1400, "height": 900}


class Watched:
    """A page, and everything that it should not have done: messages on the console, errors, dialogs, requests."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url.partition(":")[0]))

    def open(self, where: str) -> Any:
        self.page.goto(where)
        self.ready()
        return self.page

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready]", state="attached")


@contextmanager
def serving(library: Library, explain: Callable[..., Any], **bounds: int) -> Iterator[str]:
    """The address of a real server."""
    with bind_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        server = make_server(create_app(library, Rules.for_address("127.0.0.1", port, None), explain=explain, **bounds))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
