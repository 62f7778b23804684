"""Limits on the number of cores, for small tensors on which two cores would wait for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import TypeVar

import torch

T = TypeVar("T")
_limits_lock = Lock()
_limits: list[tuple[int, int]] = []  # thread and number of cores of each open block
_unlimited_cores = 1  # number of cores outside all blocks


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Limit torch and the kernels to `count` cores in this thread, and in threads that start inside the block.

    Blocks may overlap, in one thread or several, and end in any order. Each limit holds until its block ends, and after the last
    block the number of cores is the one before the first.
    """
    global _unlimited_cores
    limit = (get_ident(), count)
    with _limits_lock:
        if not _limits:
            _unlimited_cores = _in_new_thread(torch.get_num_threads)
        _limits.append(limit)
        _limit_threads()
    try:
        yield
    finally:
        with _limits_lock:
            _limits.remove(limit)
            _limit_threads()


def _limit_threads() -> None:
    """Limit this thread by its own open blocks, and new threads by all open blocks.

    Torch keeps one setting for each thread, and one for new threads. Setting the first sets the second too.
    """
    own = min([_unlimited_cores, *(count for thread, count in _limits if thread == get_ident())])
    every = min([_unlimited_cores, *(count for _, count in _limits)])
    torch.set_num_threads(own)
    if every != own:
        _in_new_thread(lambda: torch.set_num_threads(every))


def _in_new_thread(compute: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute).result()
