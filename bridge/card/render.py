"""A card as a person reads it: verdict, every test with interval, ceiling and control, nulls; many cards as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bridge.card.card import TESTS, TITLES, Card, CardMeasure, NullResult, Test
from bridge.columns import columns
from bridge.evidence.task_sufficiency import SOLVED

_HOW_TO_READ = (
    "How to read this: everything but the first line is about the dense model. D is the logit of the right answer (the target) "
    "less that of the wrong one (the contrast). Ceiling is what all nodes of the sparse model reach in the circuit's "
    "place: what is missing there the coupling has lost, not the circuit. What a null passes too is no evidence by itself."
)
_HEAD = ("ON THE DENSE MODEL", "here", "met", "95%", "ceiling", "aim", "control")


def render_card(card: Card, width: int = 110, *, verdict: bool = True) -> str:
    """The card for a terminal `width` columns wide; without its verdict where that has been said already."""
    made = card.provenance
    about = f"{card.about} ({card.pairs} held-out pairs)" if card.kind == "task" else "one prompt"
    parts = (
        [f"card      {about}; a circuit of {made.get('nodes', 0):,} nodes, on the sparse model {card.sparse}"],
        _wrapped("VERDICT   ", f"{card.verdict.upper()}. {' '.join(card.reasons)}", width) if verdict else [],
        _table(card, width),
        _nulls(card, width),
        [line for note in card.notes for line in textwrap.wrap(note, width)],
        textwrap.wrap(_HOW_TO_READ, width),
        [f"{made.get('coupling') or 'a coupling in memory'}, seed {made.get('seed')}; {card.seconds:.0f} s"],
    )
    return "\n".join(line for part in parts if part for line in (*part, "")).rstrip()


def _table(card: Card, width: int) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]  # those of one cell are headings and notes, and no columns
    for test in TESTS:
        measures = card.measures(test)
        if not measures:
            continue
        rows.append((f"  {TITLES[test]}",))
        for measure in measures:
            rows.append(_row(measure))
            rows += [(f"      {line}",) for line in textwrap.wrap(measure.note, width - 6)]
            rows += [(f"      {line}",) for line in _by_place(measure)]
    return columns(rows, width)


def _row(measure: CardMeasure) -> tuple[str, ...]:
    bounds = "" if measure.interval is None else f"{measure.interval[0]:.2f} to {measure.interval[1]:.2f}"
    ceiling = "" if measure.ceiling is None else _number(measure.ceiling.mean)
    name, value, met, aim, control = measure.row(_number)
    return f"    {name}", value, met, bounds, ceiling, aim, control


def _by_place(measure: CardMeasure) -> list[str]:
    """The circuit and its ceiling at every site or span, where there are such."""
    points = [point for point in measure.points if "all nodes" in point.values]
    if not points:
        return []
    names = [name for name in ("circuit", "all nodes", "dense", "complement") if name in points[0].values]
    cells = [[point.label.replace("sites ", "").replace("site ", "") for point in points]]
    cells += [[_number(point.values[name]) for point in points] for name in names]
    sizes = [max(len(row[column]) for row in cells) for column in range(len(points))]
    heads = ["at" if measure.test == "swap" else "sites", *names]
    return [
        f"{head:<10} " + "  ".join(f"{cell:>{size}}" for cell, size in zip(row, sizes, strict=True))
        for head, row in zip(heads, cells, strict=True)
    ]


def _nulls(card: Card, width: int) -> list[str]:
    if card.nulls is None:
        return _wrapped("NULLS     ", f"NOT KNOWN: {card.nulls_note or 'they were not run'}.", width)
    return render_nulls(card.nulls, width)


def render_nulls(nulls: Sequence[NullResult], width: int = 110) -> list[str]:
    """On how many tasks each null passes each test; all tests on one task it must not."""
    heads = ["NULLS", "all four", "tasks", "solved", *(TITLES[test].partition(" ")[2] or TITLES[test] for test in TESTS[1:])]
    rows = [heads]
    for null in nulls:
        count = len(null.tasks)
        solved = sum((task.accuracy or 0) >= SOLVED for task in null.tasks)
        cells = [_passing(null, test) for test in TESTS[1:]]
        verdict = "PASSES: the method fails" if null.passed else "fails, as it must"
        rows.append([f"  {null.name}", verdict, str(count), f"{solved}", *cells])
    lines = columns(rows, width)
    for null in nulls:
        lines += textwrap.wrap(f"{null.name}: {null.what}", width, initial_indent="    ", subsequent_indent="    ")
        why = "; ".join(f"{task.task}: {task.why}" for task in null.tasks if task.why)
        lines += textwrap.wrap(why, width, initial_indent="      ", subsequent_indent="      ") if why else []
        lines += textwrap.wrap(null.note, width, initial_indent="      ", subsequent_indent="      ") if null.note else []
    return lines


def _passing(null: NullResult, test: Test) -> str:
    """On how many tasks it holds, and the mean of its first value."""
    values = [value for task in null.tasks if (value := task.values.get(test)) is not None]
    return f"{null.passing(test)} of {len(null.tasks)}" + (f" ({_number(sum(values) / len(values))})" if values else "")


def render_cards(cards: Sequence[Card]) -> str:
    """A line per card: each test's first value with its ceiling, and whether the test holds."""
    heads = ["task", "nodes", *(TITLES[test].partition(" ")[2] for test in TESTS[1:]), "verdict"]
    rows = [heads]
    for card in cards:
        cells = []
        for test in TESTS[1:]:
            first = next(iter(card.measures(test)), None)
            met = {True: "yes", False: "NO", None: "?"}[card.holds(test)]
            value = "-" if first is None or first.value is None else _number(first.value)
            ceiling = "" if first is None or first.ceiling is None else f" of {_number(first.ceiling.mean)}"
            cells.append(f"{value}{ceiling} {met}")
        rows.append([card.about, f"{card.provenance.get('nodes', 0):,}", *cells, card.verdict])
    sizes = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(f"{cell:<{size}}" for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    supported = sum(card.verdict == "mechanistic support" for card in cards)
    return "\n".join([*lines, "", f"{supported} of {len(cards)} with mechanistic support"])


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
