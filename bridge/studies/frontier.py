"""Capability against interpretability over couplings of one dense model (the paper's figure 3), as values, a table and a plot.

    capability        cross-entropy of the sparse model on held-out text; also CE recovered, the mean over sites and directions
    interpretability  geometric mean over tasks of the circuits' edges; a task without a circuit counts at the whole model's size

The size of a model that does no task is therefore its number of nonzeros between nodes, which falls with sparsity; so the number
of tasks with a circuit is printed beside every mean. Both axes are better when smaller, so good is left and down in the plot;
the axis of CE recovered is reversed for this. The last line is the dense model's cross-entropy and its own circuits, same level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bridge.display.plots import can_plot, draw_figure, svg
from bridge.models.store import CheckpointError, as_json, read_json, refuse_unreadable, write_json
from bridge.studies.compare import geometric_mean
from bridge.studies.result import Size

FORMAT = 2
SAME_TEXT = 1e-3  # nats; points whose dense cross-entropies differ by at most this count as evaluated on the same text


@dataclass(frozen=True)
class TaskSize:
    """The size of a task's circuit in one model; if there is none, the whole model's size, and the reason in `failed`."""

    task: str
    size: Size
    failed: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class CouplingPoint:
    """One coupling: its capability (nats per token; recovered is a mean over sites) and the sizes of its circuits.

    l0 is the share of the `weights` that stay, nonzeros their number; loaded is the origin of a coupling that was not fitted.
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
    """The dense model: its cross-entropy on the first point's text, and its own circuits, or the reason why there are none."""

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
        """Geometric mean of the circuits' edges, failed tasks at full size; None if they were not searched."""
        return geometric_mean([task.size.edges for task in self.tasks]) if self.tasks else None


@dataclass(frozen=True)
class Failure:
    """A point that could not be measured, with the reason in one line."""

    name: str
    why: str


@dataclass(frozen=True)
class Frontier:
    """A sweep: its points, failed points, missing points, the dense model, and the level and number of seeds of its searches."""

    points: tuple[CouplingPoint, ...]
    failures: tuple[Failure, ...]
    missing: tuple[str, ...]
    dense: DensePoint | None
    level: float
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """The sweep as plain JSON values, with derived ones (tasks solved, geometric means)."""
        values = as_json(self)
        for point, its in zip(self.points, values["points"], strict=True):
            its |= {"recovered": point.recovered, "solved": point.solved, "nodes": point.nodes, "edges": point.edges}
        if self.dense is not None:
            values["dense"] |= {"solved": self.dense.solved, "edges": self.dense.edges}
        return {"format": FORMAT, **values}

    def save(self, path: str | Path) -> None:
        """Write sweep.json, sweep.txt and, with matplotlib, frontier.svg to a folder. Raises CheckpointError if that fails."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "sweep.txt").write_text(render_frontier(self) + "\n", encoding="utf-8")
            if can_plot():
                (path / "frontier.svg").write_text(svg(frontier_figure(self)), encoding="utf-8")
            write_json(path / "sweep.json", self.to_json())
        except OSError as error:
            raise CheckpointError(
                f"could not write {str(path)!r} ({error})", remedy="free space or name another folder"
            ) from None

    @staticmethod
    def load(path: str | Path) -> Frontier:
        """The sweep that `save` wrote to a folder. Raises CheckpointError if it is missing or damaged."""
        file = Path(path) / "sweep.json"
        if not file.is_file():
            raise CheckpointError(f"{str(path)!r}", "holds no sweep.json", "name a folder that `bridge sweep` wrote")
        values = read_json(file)
        with refuse_unreadable(f"{str(file)!r}", "sweep", "sweep again"):
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            return _FRONTIER.validate_python(values)

    def __str__(self) -> str:
        return render_frontier(self)


_FRONTIER = TypeAdapter(Frontier)


# -- the table ----------------------------------------------------------------------------------------------------------


def render_frontier(frontier: Frontier) -> str:
    """The sweep as text: a line for each point, one for the dense model, and the failures."""
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
        lines.append(f"The dense model's own circuits are not known: {dense.why_not}")
    if len(texts := _dense_ces(frontier)) > 1:
        lines.append(
            f"The points were evaluated on different text (the dense model's CE is {texts[0]:.3f} to {texts[-1]:.3f}): "
            "compare CE recovered, not CE."
        )
    return "\n".join(lines)


def _dense_ces(frontier: Frontier) -> list[float]:
    """The dense model's distinct cross-entropies on the points' texts, one for each text, ascending."""
    found: list[float] = []
    for ce in sorted(point.ce_dense for point in frontier.points):
        if not found or ce - found[-1] > SAME_TEXT:
            found.append(ce)
    return found


# -- the plot -----------------------------------------------------------------------------------------------------------


def frontier_figure(frontier: Frontier) -> Any:
    """A matplotlib figure: edges against cross-entropy, and edges against CE recovered (axis reversed)."""
    widths = sorted({point.width for point in frontier.points})
    panels: tuple[tuple[str, Callable[[CouplingPoint], float], list[float]], ...] = (
        ("cross-entropy of the sparse model, nats per token", lambda p: p.ce, _dense_ces(frontier)),
        ("CE recovered, mean over sites and directions", lambda p: p.recovered, [1.0]),
    )

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        figure.suptitle("Capability against interpretability: left and down is better")
        figure.supxlabel(
            "Labels: L0 as a share of the weights; (a/b): a of b tasks have a circuit, the others count at the model's size. "
            "Rings: loaded couplings.", fontsize=7,
        )  # fmt: skip
        axes[0].set_ylabel("edges of a circuit, geometric mean over tasks")
        for axis, (title, value, lines) in zip(axes, panels, strict=True):
            axis.set(xlabel=title, yscale="log")
            for place, width in enumerate(widths):
                fitted = sorted((p for p in frontier.points if p.width == width and p.loaded is None), key=lambda p: p.l0)
                loaded = [p for p in frontier.points if p.width == width and p.loaded is not None]
                for some, line, face in ((fitted, "-", f"C{place}"), (loaded, "", "none")):
                    x, y, label = [value(p) for p in some], [p.edges for p in some], f"width {width}" if some is fitted else None
                    axis.plot(x, y, f"o{line}", color=f"C{place}", markerfacecolor=face, label=label)
            for place, p in enumerate(sorted(frontier.points, key=value)):
                axis.annotate(
                    _label(p), (value(p), p.edges), (5, 5 if place % 2 else -11), textcoords="offset points", gid=p.name
                )
            if (dense := frontier.dense) is not None:
                for x in lines:
                    axis.axvline(
                        x, color="gray", linestyle="--", label=f"dense model, CE {dense.ce:.3f}" if x == lines[0] else None
                    )
                if dense.edges is not None:
                    axis.axhline(dense.edges, color="gray", linestyle="--")
                    axis.plot(lines, [dense.edges] * len(lines), "D", color="gray")
        axes[1].invert_xaxis()
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(fontsize=7)

    return draw_figure(2, (8.6, 4.4), paint)


def _label(point: CouplingPoint) -> str:
    name = "" if point.loaded is None else f" {point.name}"
    solved = "" if point.solved == len(point.tasks) else f" ({point.solved}/{len(point.tasks)})"
    return f"{_format_fraction(point.l0)}{name}{solved}"


def _format_fraction(l0: float) -> str:
    """The fraction as 1/n if it is within 2% of 1/n, otherwise as a number."""
    of = round(1 / l0) if l0 > 0 else 0
    return f"1/{of}" if of > 1 and abs(l0 * of - 1) < 0.02 else f"{l0:.3g}"
