"""Parts shared by the plots: panels with axes and round ticks, and a self-contained SVG for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

PANEL, HEIGHT, GAP = 380, 300, 36  # pixels of a panel's frame, and between two
LEFT, TOP, BOTTOM, RIGHT = 74, 74, 84, 22
COLOURS = (  # on light and on dark paper; classes c0, c1, ...
    ("#0b62d6", "#6cb2ff"), ("#c2410c", "#ff9d5c"), ("#15803d", "#5ad17f"), ("#9333ea", "#cf9bff"), ("#b45309", "#f0b429"),
    ("#be185d", "#ff86b6"), ("#0e7490", "#4dd0e1"), ("#57534e", "#c9c4bf"),
)  # fmt: skip


def figure(name: str, title: str, heading: str, size: tuple[int, int], parts: Sequence[str], style: str = "") -> str:
    """A whole SVG of the class `name`: its style, paper and heading, then the parts. `style` is CSS beyond the shared one."""
    side_x, side_y = size
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{name}" viewBox="0 0 {side_x} {side_y}" width="{side_x}" '
        f'height="{side_y}" role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        _style(name, style),
        '<rect class="paper" width="100%" height="100%"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(heading)}</text>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _style(name: str, more: str) -> str:
    def colours(dark: bool) -> str:
        return "".join(f".{name} .c{place}{{color:{pair[dark]}}}" for place, pair in enumerate(COLOURS))

    return (
        f"<style>.{name}{{color:#1f2328;--paper:#fff}}.{name} text{{fill:currentColor}}.{name} .paper{{fill:var(--paper)}}"
        f".{name} .axis{{text-anchor:middle}}.{name} .tick{{font-size:11px;opacity:.8}}"
        f".{name} .grid{{stroke:currentColor;opacity:.13}}.{name} .frame{{fill:none;stroke:currentColor;opacity:.45}}"
        f"{more}{colours(False)}@media (prefers-color-scheme:dark){{.{name}{{color:#e6edf3;--paper:#0d1117}}"
        f"{colours(True)}}}</style>"
    )


@dataclass(frozen=True)
class Frame:
    """A panel: where it begins, and its axes, y perhaps logarithmic (from 1 up), x perhaps from right to left."""

    left: float
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    logarithmic: bool = False
    backwards: bool = False

    def x(self, value: float) -> float:
        """Pixels from the left."""
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return self.left + PANEL * (1 - share if self.backwards else share)

    def y(self, value: float) -> float:
        """Pixels from above."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        if self.logarithmic:
            value, low, high = math.log(max(value, 1)), math.log(low), math.log(high)
        return TOP + HEIGHT * (1 - (value - low) / (high - low))

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        """The points as pixel coordinates of a polyline or polygon."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def axes(self, title: str, *, labelled: bool) -> list[str]:
        """The frame, its grid and the ticks; those of y only where they are labelled."""
        bottom, right = TOP + HEIGHT, self.left + PANEL
        parts = [f'<rect class="frame" x="{self.left}" y="{TOP}" width="{PANEL}" height="{HEIGHT}"/>']
        for tick in self.x_ticks:
            x = self.x(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="axis tick" x="{x:.1f}" y="{bottom + 18}">{tick:g}</text>')
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            if labelled:
                parts.append(f'<text class="tick" text-anchor="end" x="{self.left - 8}" y="{y + 4:.1f}">{_short(tick)}</text>')
        parts.append(f'<text class="axis" x="{self.left + PANEL / 2}" y="{bottom + 42}">{escape(title)}</text>')
        return parts


def y_title(text: str) -> str:
    """The title of the first panel's vertical axis."""
    return f'<text class="axis" transform="translate(18,{TOP + HEIGHT / 2}) rotate(-90)">{escape(text)}</text>'


def ticks(values: Sequence[float]) -> list[float]:
    """About six round numbers that enclose the values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = max(high - low, 1e-3, 1e-3 * abs(high))
    step = next(m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5) if m * 10.0**e >= span / 5)
    first, last = math.floor((low - 0.02 * span) / step), math.ceil((high + 0.02 * span) / step)
    return [round(place * step, 10) for place in range(first, last + 1)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, ... (or 1, 10, ... over many decades) that enclose the values."""
    low, high = (max(1.0, min(values)), max(1.0, max(values))) if values else (1.0, 10.0)
    factors = (1, 2, 5) if high / low < 2000 else (1,)
    every = [m * 10.0**e for e in range(16) for m in factors]
    first = max((place for place, tick in enumerate(every) if tick <= low / 1.05), default=0)
    last = next(place for place, tick in enumerate(every) if tick >= high * 1.05)
    return every[first : last + 1]


def _short(number: float) -> str:
    """A number as 20k for 20,000, 1M for a million."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
