"""Capability against interpretability, over couplings of one dense model: the paper's figure 3, as values, a table and a plot.

    capability        cross-entropy of the sparse model on held-out text; beside it CE recovered, mean over sites and directions
    interpretability  geometric mean over tasks of the circuits' edges, a task without a circuit counted at the whole model's

A model that does no task is thus as large as its nonzeros between nodes, and the sparser the smaller: how many tasks have a
circuit stands beside every mean. Both are better when smaller, so that in the plot good is left and down; CE recovered runs
from right to left for that. The dense model is the last line: its own cross-entropy, its own circuits at the same level.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bridge.display.svg import BOTTOM, COLOURS, GAP, HEIGHT, LEFT, PANEL, RIGHT, TOP, Frame, figure, log_ticks, ticks, y_title
from bridge.models.store import CheckpointError, read_json, write_json
from bridge.studies.compare import geometric_mean
from bridge.studies.result import Size

FORMAT = 2
SAME_TEXT = 1e-3  # nats by which the dense model's cross-entropy may differ between points that saw the same text


@dataclass(frozen=True)
class TaskSize:
    """The size of a task's circuit in one model, or the whole model's size where there is no circuit, with the reason."""

    task: str
    size: Size
    failed: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Point:
    """One coupling, its capability (nats per token; recovered is a mean over sites), and its circuits.

    l0 is the share of the `weights` that stays, nonzeros their number; loaded is where one that was not fitted came from.
    """

    name: str
    loaded: str | None
    width: int
    l0: float
    nonzeros: int
    weights: int
    ce: float
    ce_dense: float
    kl: float
    recovered_in: float
    recovered_out: float
    tasks: tuple[TaskSize, ...]

    @property
    def recovered(self) -> float:
        """CE recovered, the mean of both directions."""
        return (self.recovered_in + self.recovered_out) / 2

    @property
    def solved(self) -> int:
        """The number of tasks with a circuit."""
        return sum(not task.failed for task in self.tasks)

    @property
    def nodes(self) -> float:
        """Geometric mean of the circuits' nodes, failed tasks at full size."""
        return geometric_mean([task.size.nodes for task in self.tasks])

    @property
    def edges(self) -> float:
        """Geometric mean of the circuits' edges, failed tasks at full size."""
        return geometric_mean([task.size.edges for task in self.tasks])


@dataclass(frozen=True)
class DensePoint:
    """The dense model: its cross-entropy on the text of the first point, and its own circuits, or why there are none."""

    name: str
    fingerprint: str
    ce: float
    tasks: tuple[TaskSize, ...]
    why_not: str = ""

    @property
    def solved(self) -> int:
        """The number of tasks with a circuit."""
        return sum(not task.failed for task in self.tasks)

    @property
    def edges(self) -> float | None:
        """Geometric mean of the circuits' edges, failed tasks at full size; None where they were not searched."""
        return geometric_mean([task.size.edges for task in self.tasks]) if self.tasks else None


@dataclass(frozen=True)
class Failure:
    """A point that could not be measured, with the reason in one line."""

    name: str
    why: str


@dataclass(frozen=True)
class Frontier:
    """A sweep: its points, the failed ones, the missing ones, the dense model, and how circuits were searched."""

    points: tuple[Point, ...]
    failures: tuple[Failure, ...]
    missing: tuple[str, ...]
    dense: DensePoint | None
    level: float
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, derived ones (tasks solved, geometric means) included."""
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        for point, its in zip(self.points, values["points"], strict=True):
            its |= {"recovered": point.recovered, "solved": point.solved, "nodes": point.nodes, "edges": point.edges}
        if self.dense is not None:
            values["dense"] |= {"solved": self.dense.solved, "edges": self.dense.edges}
        return {"format": FORMAT, **values}

    def save(self, path: str | Path) -> None:
        """Write sweep.json, sweep.txt and frontier.svg to a folder. Raises CheckpointError where that fails."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "sweep.txt").write_text(render_frontier(self) + "\n", encoding="utf-8")
            (path / "frontier.svg").write_text(scatter(self), encoding="utf-8")
            write_json(path / "sweep.json", self.to_json())
        except OSError as error:
            raise CheckpointError(
                f"could not write {str(path)!r} ({error})", remedy="free space or name another folder"
            ) from None

    @staticmethod
    def load(path: str | Path) -> Frontier:
        """The sweep that `save` wrote to a folder. Raises CheckpointError where it is missing or damaged."""
        file = Path(path) / "sweep.json"
        if not file.is_file():
            raise CheckpointError(f"{str(path)!r}", "holds no sweep.json", "name a folder that `bridge sweep` wrote")
        values = read_json(file)
        try:
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            return _FRONTIER.validate_python(values)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{str(file)!r}", f"is no sweep that this version reads ({first})", "sweep again") from None

    def __str__(self) -> str:
        return render_frontier(self)


_FRONTIER = TypeAdapter(Frontier)


# -- the table ----------------------------------------------------------------------------------------------------------


def render_frontier(frontier: Frontier) -> str:
    """The sweep as text: a line per point, the dense model's line, the failures."""
    header = ("point", "width", "L0", "nonzeros", "CE", "CE recovered", "solved", "nodes", "edges", "dense edges")
    dense, rows = frontier.dense, [tuple[str, ...](header)]
    counterpart = "-" if dense is None or dense.edges is None else f"{dense.edges:,.0f}"
    for p in sorted(frontier.points, key=lambda p: (p.width, -p.l0)):
        rows.append(
            (p.name, f"{p.width}", f"{p.l0:.4f}", f"{p.nonzeros:,}", f"{p.ce:.3f}", f"{p.recovered:.3f}",
             f"{p.solved} of {len(p.tasks)}", f"{p.nodes:,.0f}", f"{p.edges:,.0f}", counterpart)
        )  # fmt: skip
    if dense is not None:
        solved = f"{dense.solved} of {len(dense.tasks)}" if dense.tasks else "-"
        rows.append(("dense model", "", "", "", f"{dense.ce:.3f}", "1", solved, "", counterpart, counterpart))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines += [f"{failure.name.ljust(widths[0])}  FAILED: {failure.why}" for failure in frontier.failures]
    if frontier.missing:
        lines.append(f"not measured yet: {', '.join(frontier.missing)}")
    lines += [
        "",
        "CE: sparse model, nats per token of held-out text. Nodes, edges: geometric means over tasks of circuits at F "
        f"{frontier.level:g},",
        "a task without a circuit counted at the whole model's size.",
    ]
    if dense is not None and dense.why_not:
        lines.append(f"The dense model was not pruned: {dense.why_not}")
    if len(texts := _dense_ces(frontier)) > 1:
        lines.append(
            f"The points were evaluated on different text (the dense model's CE is {texts[0]:.3f} to {texts[-1]:.3f}): "
            "compare CE recovered, not CE."
        )
    return "\n".join(lines)


def _dense_ces(frontier: Frontier) -> list[float]:
    """The dense model's cross-entropies on the texts of the points, one for each text, ascending."""
    found: list[float] = []
    for ce in sorted(point.ce_dense for point in frontier.points):
        if not found or ce - found[-1] > SAME_TEXT:
            found.append(ce)
    return found


# -- the plot -----------------------------------------------------------------------------------------------------------

_STYLE = (
    ".frontier .dense{stroke:currentColor;stroke-dasharray:5 4;opacity:.7}.frontier .dot{fill:currentColor}"
    ".frontier .loaded{fill:none;stroke:currentColor;stroke-width:2.5}"
    ".frontier .point text{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}"
    ".frontier .path{fill:none;stroke:currentColor;stroke-width:1.5;opacity:.55}"
)


def scatter(frontier: Frontier) -> str:
    """Edges against cross-entropy, and against CE recovered, as a self-contained SVG for light and dark pages."""
    points, dense = frontier.points, frontier.dense
    widths = sorted({point.width for point in points})
    colour_of = {width: place % len(COLOURS) for place, width in enumerate(widths)}
    dense_edges = None if dense is None else dense.edges
    edges = [point.edges for point in points] + ([dense_edges] if dense_edges is not None else [])
    y_ticks = log_ticks(edges)
    side_x, side_y = LEFT + 2 * PANEL + GAP + RIGHT, TOP + HEIGHT + BOTTOM
    parts = [
        _legend(widths, colour_of, dense is not None),
        f'<text class="tick" x="{LEFT}" y="{side_y - 10}">Labels: L0 as a share of the weights; '
        "(a/b): a of b tasks have a circuit, the others count at the whole model's size; rings: loaded.</text>",
        y_title("edges of a circuit, geometric mean over tasks"),
    ]
    panels: tuple[tuple[str, Callable[[Point], float], list[float], bool], ...] = (
        ("cross-entropy of the sparse model, nats per token", lambda p: p.ce, _dense_ces(frontier), False),
        ("CE recovered, mean over sites and directions", lambda p: p.recovered, [1.0], True),
    )
    for place, (title, value, lines, backwards) in enumerate(panels):
        x_ticks = ticks([value(point) for point in points] + (lines if dense is not None else []))
        frame = _Frame(LEFT + place * (PANEL + GAP), x_ticks, y_ticks, logarithmic=True, backwards=backwards)
        parts += frame.axes(title, labelled=place == 0)
        if dense is not None:
            parts += [frame.line(x, dense) for x in lines]
        for width in widths:
            fitted = sorted((p for p in points if p.width == width and p.loaded is None), key=lambda p: p.l0)
            path = " ".join(f"{frame.x(value(p)):.1f},{frame.y(p.edges):.1f}" for p in fitted)
            if len(fitted) > 1:
                parts.append(f'<polyline class="c{colour_of[width]} path" points="{path}"/>')
        boxes = [(frame.x(value(p)) - 6, frame.y(p.edges) - 6, 12.0, 12.0) for p in points]
        if dense_edges is not None:
            boxes += [(frame.x(x) - 7, frame.y(dense_edges) - 7, 14.0, 14.0) for x in lines]
        for point in points:
            parts.append(frame.mark(point, value(point), colour_of[point.width], boxes))
    heading = "Capability against interpretability: left and down is better"
    return figure("frontier", "Capability against interpretability", heading, (side_x, side_y), parts, _STYLE)


def _legend(widths: Sequence[int], colour_of: dict[int, int], dense: bool) -> str:
    parts, x = [], float(LEFT)
    for width in widths:
        text = f"width {width}"
        parts.append(
            f'<circle class="c{colour_of[width]} dot" cx="{x + 5}" cy="46" r="5"/><text x="{x + 16}" y="50">{text}</text>'
        )
        x += 34 + 7 * len(text)
    if dense:
        parts.append(f'<line class="dense" x1="{x}" x2="{x + 24}" y1="46" y2="46"/>')
        parts.append(f'<text x="{x + 30}" y="50">dense model</text>')
    return "<g>" + "".join(parts) + "</g>"


class _Frame(Frame):
    """A panel of the plot, y logarithmic."""

    def line(self, value: float, dense: DensePoint) -> str:
        """The dense model's marks: a line at its cross-entropy, and a diamond at its circuits where they were searched."""
        x, edges = self.x(value), dense.edges
        text = f"dense model {dense.name}: CE {dense.ce:.3f}"
        drawn = f'<line class="dense" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}"/>'
        if edges is not None:
            text += f", {edges:,.0f} edges, {dense.solved} of {len(dense.tasks)} tasks solved"
            y = self.y(edges)
            drawn += f'<line class="dense" x1="{self.left}" x2="{self.left + PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>'
            drawn += f'<path class="dot" d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
        return f"<g><title>{escape(text)}</title>{drawn}</g>"

    def mark(self, point: Point, value: float, colour: int, boxes: list[tuple[float, float, float, float]]) -> str:
        """A point with its label, where that covers no other mark; adds the label to the occupied boxes."""
        x, y = self.x(value), self.y(point.edges)
        label = _share(point.l0) if point.loaded is None else f"{_share(point.l0)} {point.name}"
        label += "" if point.solved == len(point.tasks) else f" ({point.solved}/{len(point.tasks)})"
        size = 6.4 * len(label)
        title = (
            f"{point.name}: width {point.width}, {point.nonzeros:,} nonzeros, CE {point.ce:.3f}, "
            f"recovered {point.recovered:.3f}, {point.edges:,.0f} edges, {point.solved} of {len(point.tasks)} tasks solved"
        )
        places = [
            (x + across * (size + 18) / 2 - size / 2, y + down - 7)
            for down in (0, -14, 14, -28, 28)
            for across in ((1, -1) if down == 0 else (0, 1, -1))
        ]
        inside = [at for at in places if at[0] >= self.left + 2 and at[0] + size <= self.left + PANEL - 2] or places
        free = [at for at in inside if not any(_overlap((*at, size, 14.0), box) for box in boxes)]
        at_x, at_y = (free or inside)[0]
        boxes.append((at_x, at_y, size, 14.0))
        kind = "dot" if point.loaded is None else "loaded"
        return (
            f'<g class="c{colour} point" data-name="{escape(point.name)}"><title>{escape(title)}</title>'
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text x="{at_x:.1f}" y="{at_y + 11:.1f}">{escape(label)}</text></g>'
        )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )


def _share(l0: float) -> str:
    """The fraction as 1/n where it is close to one, else as a number."""
    of = round(1 / l0) if l0 > 0 else 0
    return f"1/{of}" if of > 1 and abs(l0 * of - 1) < 0.02 else f"{l0:.3g}"
