"""Small pieces of HTML for notebooks: self-contained, without scripts, everything escaped, legible on light and dark pages.

A result's `_repr_html_` is a `card` of lines and tables. Words, titles and cells are escaped here; `parts` are HTML already.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_GOOD, _BAD, _OPEN = "#2a7d4f", "#b8374b", "#6b7280"
_EDGE = "1px solid rgba(128,128,128,.35)"


def text(words: str) -> str:
    """Return escaped text that keeps its whitespace and breaks long lines."""
    return f'<span style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(words)}</span>'


def token(words: str, strength: float) -> str:
    """Return a token of a prompt as Python would write it, shaded by a strength from 0 to 1."""
    shade = f"rgba(42,157,92,{0.6 * min(1.0, max(0.0, strength)):.2f})"
    style = f"background:{shade};border:{_EDGE};border-radius:3px;padding:0 3px;margin:1px;display:inline-block;white-space:pre"
    return f'<code style="{style}">{html.escape(repr(words)[1:-1])}</code>'


def verdict(words: str) -> str:
    """Return a verdict in its colour: failed, open or passed."""
    colour = _BAD if words in ("refuted", "no explanation", "unsolved") else _OPEN if words == "undecided" else _GOOD
    return f'<b style="background:{colour};color:#fff;border-radius:3px;padding:1px 6px">{html.escape(words)}</b>'


def listing(words: str) -> str:
    """Return escaped text in lines and columns, as a terminal shows it."""
    style = "display:block;white-space:pre;overflow-x:auto;font-family:monospace"
    return f'<span style="{style}">{html.escape(words)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of escaped cells."""
    at = "text-align:left;padding:1px 10px 1px 0;white-space:pre-wrap"

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f'<{tag} style="{at}">{html.escape(cell)}</{tag}>' for cell in cells) + "</tr>"

    style = "border-collapse:collapse;font-size:90%;margin:4px 0"
    body = "".join(line("td", row) for row in rows)
    return f'<table style="{style}"><thead>{line("th", head)}</thead><tbody>{body}</tbody></table>'


def fold(title: str, *parts: str) -> str:
    """Return parts that are folded away until the reader opens them."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def card(title: str, *parts: str) -> str:
    """Return the parts under a title, in a box."""
    inside = "".join(f'<div style="margin:4px 0">{part}</div>' for part in parts)
    return (
        f'<div style="border:{_EDGE};border-radius:6px;padding:8px 12px;max-width:60em"><b>{html.escape(title)}</b>{inside}</div>'
    )
