"""Rows in columns: whole where there is room, below their row where not, and nothing lost."""

from __future__ import annotations

import pytest

from bridge.display.columns import columns

ROWS = [
    ("EVIDENCE", "here", "met", "aim", "control"),
    ("  one", "0.1", "yes", "<= 0.2", "random 3"),
    ("  a note",),
    ("  two", "9", "NO", "", "none"),
]


def test_what_fits_is_aligned() -> None:
    lines = columns(ROWS, 80)
    assert lines[0].split() == list(ROWS[0]) and len(lines) == len(ROWS)
    assert len({line.index(cell) for line, cell in ((lines[0], "met"), (lines[1], "yes"), (lines[3], "NO"))}) == 1
    assert lines[2] == "  a note"


@pytest.mark.parametrize("width", [20, 24, 30, 34])
def test_what_does_not_fit_goes_below_behind_its_head(width: int) -> None:
    lines = columns(ROWS, width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(line.split()) for line in lines)
    for row in ROWS[1:]:
        assert all(cell.strip() in text for cell in row)
    assert "control random 3" in text and "control none" in text and "aim ;" not in text
