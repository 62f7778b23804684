"""Cores that blocks of work share: what each may use, whatever other blocks begin and end meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Thread

import pytest
import torch

from bridge.explanations.threads import cores


@pytest.fixture(autouse=True)
def _four() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def fresh() -> int:
    """The cores of a thread that begins now."""
    found: list[int] = []
    thread = Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_a_block_holds_here_and_in_threads_that_begin_in_it() -> None:
    with cores(2):
        assert (torch.get_num_threads(), fresh()) == (2, 2)
        with cores(3):
            assert (torch.get_num_threads(), fresh()) == (2, 2)
        with cores(1):
            assert (torch.get_num_threads(), fresh()) == (1, 1)
        assert (torch.get_num_threads(), fresh()) == (2, 2)
    assert (torch.get_num_threads(), fresh()) == (4, 4)
    with pytest.raises(KeyError), cores(1):
        raise KeyError
    assert (torch.get_num_threads(), fresh()) == (4, 4)


@pytest.mark.parametrize("first", [0, 1])
def test_blocks_of_one_thread_end_in_any_order(first: int) -> None:
    stacks = [ExitStack(), ExitStack()]
    for stack, count in zip(stacks, (1, 2), strict=True):
        stack.enter_context(cores(count))
    stacks[first].close()
    assert torch.get_num_threads() == (2, 1)[first]
    stacks[1 - first].close()
    assert (torch.get_num_threads(), fresh()) == (4, 4)


@pytest.mark.parametrize("born", ["before", "within"])
@pytest.mark.parametrize("first", ["this", "other"])
def test_blocks_of_two_threads_end_in_any_order(born: str, first: str) -> None:
    """Also in a thread that began in a block of another's; the other may go on when this one has ended."""
    with ThreadPoolExecutor(1) as pool:

        def other(work: Callable[[], object]) -> object:
            return pool.submit(work).result()

        if born == "before":
            assert other(torch.get_num_threads) == 4
        here, there = ExitStack(), ExitStack()
        here.enter_context(cores(1))
        other(lambda: there.enter_context(cores(2)))
        assert (torch.get_num_threads(), fresh()) == (1, 1)
        if first == "this":
            here.close()
            assert (torch.get_num_threads(), other(torch.get_num_threads), fresh()) == (4, 2, 2)
            other(there.close)
        else:
            other(there.close)
            assert (torch.get_num_threads(), fresh()) == (1, 1)
            here.close()
        assert (torch.get_num_threads(), other(torch.get_num_threads), fresh()) == (4, 4, 4)


def test_a_thread_left_with_one_core_does_not_leave_others_with_it() -> None:
    with ThreadPoolExecutor(1) as pool:
        with cores(1):
            assert pool.submit(torch.get_num_threads).result() == 1  # it began here, and stays as it is

        def enter() -> None:
            with cores(1):
                pass

        pool.submit(enter).result()
        assert (torch.get_num_threads(), fresh()) == (4, 4)
