"""Work that goes on in a thread of its own while its caller does something else; torch and the kernels release the lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
GRACE = 5  # seconds at most that a step of work which is no longer wanted may go on


class _Left(BaseException):
    """Ends work that nobody waits for any longer."""


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
