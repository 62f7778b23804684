"""Text for a terminal: rows in columns, wrapped and truncated lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

GAP, INDENT = 2, 6


def columns(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return lines of at most `width`; the first row is the head, and a row of one cell is a heading or note, returned as it is.

    Columns that do not fit are printed below each row, each cell after its head.
    """
    heads = rows[0]
    sizes = [max(len(row[column]) for row in rows if len(row) > 1) for column in range(len(heads))]
    fit = next((n for n in range(len(sizes), 1, -1) if sum(sizes[:n]) + GAP * (n - 1) <= width), 1)
    lines: list[str] = []
    for row in rows:
        if len(row) == 1:
            lines.append(row[0])
            continue
        lines.append((" " * GAP).join(f"{cell:<{size}}" for cell, size in zip(row[:fit], sizes, strict=False)).rstrip())
        if row is not heads:
            below = "; ".join(f"{head} {cell}" for head, cell in zip(heads[fit:], row[fit:], strict=True) if cell)
            lines += wrap(" " * INDENT, below, width, " " * (INDENT + 2))
    return lines


def wrap(head: str, text: str, width: int, below: str | None = None) -> list[str]:
    """Return the text wrapped after a head; further lines are indented by its length, or begin with `below`."""
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head) if below is None else below)


def truncate(line: str, width: int) -> str:
    """Return a line of at most `width` characters, the last of which marks what was cut off."""
    return line if len(line) <= width else f"{line[: width - 1]}\u2026"
