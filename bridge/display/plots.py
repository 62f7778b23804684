"""Plots as SVG, drawn by matplotlib, which is loaded for the first plot (an extra: `pip install 'bridge[plots]'`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from io import StringIO
from typing import Any

from bridge.errors import UserError

STYLE: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bridge",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_figure(panels: int, size: tuple[float, float], paint: Callable[[Any, Sequence[Any]], None]) -> Any:
    """Return a figure of panels side by side (size in inches), painted by `paint`. Raises UserError without matplotlib."""
    if not can_plot():
        raise UserError("a plot", "needs matplotlib, which is not installed", "run pip install 'bridge[plots]'")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0]))
    return figure


def svg(figure: Any) -> str:
    """Return a figure as the text of a self-contained SVG; the same figure gives the same text."""
    from matplotlib import rc_context

    file = StringIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
