"""Tokens in the names of groups: short, and two that differ are told apart where they can be."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bridge.graph.group_names import _text


class Texts:
    """Tokens by their texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def text(self, token: int) -> str:
        """The text of a token."""
        return self.texts[token]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" self", "' self'"),
        ("  ", "'  '"),
        (" " * 8, "8 spaces"),
        ("\n" + " " * 15, r"'\n'+15 spaces"),
        ("\n\n" + " " * 7, r"'\n\n'+7 spaces"),
        ("\n ", r"'\n '"),
        ("\n", r"'\n'"),
        ("", "''"),
        ("a" + " " * 8, "'a        '"),
        ("x" * 30, "'xxxxxxxxx...'"),
    ],
)
def test_a_token_is_named_by_its_text_and_indentation_by_its_width(text: str, name: str) -> None:
    assert _text(cast(Any, Texts(text)), 0) == name
