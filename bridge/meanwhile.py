"""How work shares the cores: in a thread of its own while its caller does something else, or on fewer than there are.

Torch and the kernels release Python's lock, so two threads of one core each do twice as much, where the work is such that two
cores on the same small tensor would wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

import torch

T = TypeVar("T")
GRACE = 5  # seconds at most that a step of work which is no longer wanted may go on


class _Left(BaseException):
    """Ends work that nobody waits for any longer."""


@contextmanager
def cores(count: int) -> Iterator[None]:
    """At most so many cores for what torch and the kernels do here, and in threads that begin meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def meanwhile(work: Callable[[Callable[[str], None]], T], say: Callable[[str], None]) -> Iterator[Callable[[], T]]:
    """Work that goes on in a thread of its own; what is given waits for its result, and only then says how far it is.

    The work is given what it says that with, which also ends it once the caller has left the block by an error.
    """
    told, left = "", False
    results: list[T] = []
    errors: list[BaseException] = []

    def tell(text: str) -> None:
        nonlocal told
        if left:
            raise _Left
        told = text

    def run() -> None:
        try:
            results.append(work(tell))
        except BaseException as error:  # raised again by who waits for it
            errors.append(error)

    def result() -> T:
        said = ""
        while running.is_alive():
            running.join(0.2)
            if told != said:
                said = told
                say(said)
        if errors:
            raise errors[0]
        return results[0]

    running = Thread(target=run, name="bridge-meanwhile", daemon=True)
    running.start()
    try:
        yield result
    finally:
        left = True
        running.join(GRACE)
