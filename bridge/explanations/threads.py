"""Limits on cores: fewer of them than there are, where two cores on one small tensor would wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TypeVar

import torch

T = TypeVar("T")
_changing = Lock()
_limits: list[tuple[int, int]] = []  # of the blocks that have not ended: the thread, and how many cores
_whole = 1  # cores outside of all blocks


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Limit torch and the kernels to `count` cores here, and in threads that begin inside the block.

    Blocks may overlap, in one thread or several, and end in any order: each holds until it ends, and after the last of them
    there are as many cores as before the first.
    """
    global _whole
    limit = (get_ident(), count)
    with _changing:
        if not _limits:
            _whole = _in_new_thread(torch.get_num_threads)
        _limits.append(limit)
        _limit_threads()
    try:
        yield
    finally:
        with _changing:
            _limits.remove(limit)
            _limit_threads()


def _limit_threads() -> None:
    """Limit this thread by the blocks that it is in, and threads that begin from now on by all blocks.

    Torch keeps a number of threads for each thread, and one for those to come; to set the first sets the second too.
    """
    own = min([_whole, *(count for thread, count in _limits if thread == get_ident())])
    every = min([_whole, *(count for _, count in _limits)])
    torch.set_num_threads(own)
    if every != own:
        _in_new_thread(lambda: torch.set_num_threads(every))


def _in_new_thread(compute: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()
