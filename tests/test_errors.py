"""Errors as values, and as one line for a reader of a command and for one of Python."""

from __future__ import annotations

import pickle

import pytest

from bridge.cli.console import option_name
from bridge.errors import RunError, UserError


def test_an_error_has_its_parts_and_is_one_line() -> None:
    error = UserError("l0 7", "is more than the\n 6 weights there are", "give fewer")
    assert (error.what, error.rule, error.remedy) == ("l0 7", "is more than the\n 6 weights there are", "give fewer")
    assert str(error) == "l0 7 is more than the 6 weights there are; give fewer"
    assert error.problem == "l0 7 is more than the 6 weights there are"
    assert str(UserError("there is no task 'x'", remedy="name another")) == "there is no task 'x'; name another"
    assert str(RunError("3 of 4 points failed")) == "3 of 4 points failed"
    assert isinstance(error, ValueError) and str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("text", "command", "python"),
    [
        ("name another ‹out›", "name another --out", "name another out="),
        ("‹out› 'x y'", "--out 'x y'", "out='x y'"),
        ("give ‹seeds› 5, or ‹no_dense›", "give --seeds 5, or --no-dense", "give seeds=5, or no_dense="),
        ("leave it out of ‹settings›", "leave it out of --set", "leave it out of settings="),
    ],
)
def test_parameters_are_named_as_the_reader_gives_them(text: str, command: str, python: str) -> None:
    assert UserError("it", remedy=text).line(option_name) == f"it; {command}"
    assert str(UserError("it", remedy=text)) == f"it; {python}"
