"""A Steering as a table for the terminal, and as a plot of probability against strength (paper, figure 9)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bridge.display.columns import columns
from bridge.display.svg import BOTTOM, GAP, HEIGHT, LEFT, PANEL, RIGHT, TOP, Frame, figure, y_title
from bridge.steering.curves import Spread, Steering

_SHOWN = 6  # nodes that the text names
_STYLE = (
    ".steering polyline{fill:none;stroke:currentColor;stroke-width:2}.steering .every{stroke-dasharray:6 4;stroke-width:1.5}"
    ".steering .random{fill:currentColor;opacity:.16}.steering polyline.mean{stroke-width:1;opacity:.6}"
    ".steering .counterfactual{stroke:currentColor;stroke-dasharray:2 3;opacity:.7}.steering .dot{fill:currentColor}"
)


@dataclass(frozen=True)
class Panel:
    """One probability against strength: by the chosen nodes, by random directions, by every node, and on the counterfactual."""

    title: str
    strengths: Sequence[float]
    chosen: Sequence[float]
    random: Sequence[Spread]
    every: Sequence[float] | None = None
    counterfactual: float | None = None


def panels_of(steering: Steering) -> tuple[Panel, Panel]:
    """The contrast's probability, and the target's."""
    strengths = [each.strength for each in steering.curve]
    every_contrast = [each.every_contrast for each in steering.beside if each.every_contrast is not None]
    every_target = [each.every_target for each in steering.beside if each.every_target is not None]
    return (
        Panel(
            f"{steering.contrast.text!r}", strengths, [each.probability_contrast for each in steering.curve],
            [each.random_contrast for each in steering.beside], every_contrast or None, steering.counterfactual_contrast,
        ),
        Panel(
            f"{steering.target.text!r}", strengths, [each.probability_target for each in steering.curve],
            [each.random_target for each in steering.beside], every_target or None, steering.counterfactual_target,
        ),
    )  # fmt: skip


def plot(heading: str, note: str, panels: Sequence[Panel]) -> str:
    """Panels of probability against strength as a self-contained SVG for light and dark pages."""
    side_x = LEFT + len(panels) * PANEL + (len(panels) - 1) * GAP + RIGHT
    side_y = TOP + HEIGHT + BOTTOM
    some = panels[0]
    keys = [
        ("", "chosen nodes", True),
        ("every", "every node", some.every is not None),
        ("counterfactual", "the counterfactual itself", some.counterfactual is not None),
    ]
    parts, x = [], float(LEFT)
    for kind, text, there in keys:
        if there:
            drawn = f'<line class="counterfactual" x1="{x}" x2="{x + 24}" y1="46" y2="46"/>' if kind == "counterfactual" else (
                f'<polyline class="c0 {kind}" points="{x},46 {x + 24},46"/>')  # fmt: skip
            parts.append(f'{drawn}<text x="{x + 30}" y="50">{text}</text>')
            x += 48 + 7 * len(text)
    parts.append(
        f'<rect class="c7 random" x="{x}" y="40" width="24" height="12"/><text x="{x + 30}" y="50">random directions</text>'
    )
    parts += [y_title("probability in the dense model"), f'<text class="tick" x="{LEFT}" y="{side_y - 10}">{escape(note)}</text>']
    for place, panel in enumerate(panels):
        frame = Frame(LEFT + place * (PANEL + GAP), (0, 0.2, 0.4, 0.6, 0.8, 1), (0, 0.2, 0.4, 0.6, 0.8, 1))
        parts += frame.axes(f"probability of {panel.title}, against strength", labelled=place == 0)
        low = list(zip(panel.strengths, [each.low for each in panel.random], strict=True))
        high = list(zip(panel.strengths, [each.high for each in panel.random], strict=True))
        mean = list(zip(panel.strengths, [each.mean for each in panel.random], strict=True))
        parts.append(f'<polygon class="c7 random" points="{frame.path([*low, *reversed(high)])}"/>')
        parts.append(f'<polyline class="c7 mean" points="{frame.path(mean)}"/>')
        if panel.counterfactual is not None:
            y = frame.y(panel.counterfactual)
            parts.append(f'<line class="counterfactual" x1="{frame.left}" x2="{frame.left + PANEL}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if panel.every is not None:
            every = list(zip(panel.strengths, panel.every, strict=True))
            parts.append(f'<polyline class="c{place} every" points="{frame.path(every)}"/>')
        chosen = list(zip(panel.strengths, panel.chosen, strict=True))
        parts.append(f'<polyline class="c{place} chosen" points="{frame.path(chosen)}"/>')
        for (strength, value), random in zip(chosen, panel.random, strict=True):
            title = f"strength {strength:g}: {value:.3f}; random {random.mean:.3f}, {random.low:.3f} to {random.high:.3f}"
            at = f'cx="{frame.x(strength):.1f}" cy="{frame.y(value):.1f}"'
            parts.append(f'<circle class="c{place} dot" {at} r="3.5"><title>{escape(title)}</title></circle>')
    return figure("steering", heading, heading, (side_x, side_y), parts, _STYLE)


def steering_plot(steering: Steering) -> str:
    """The plot of a Steering."""
    heading = f"Steering the dense model from {steering.target.text!r} to {steering.contrast.text!r}"
    note = f"{_changed(steering)}; band: lowest to highest of {steering.draws} random directions of equal norm."
    return plot(heading, note, panels_of(steering))


def _changed(steering: Steering) -> str:
    sites = ", ".join(str(site) for site in steering.sites)
    where = f"all at site {sites}" if steering.at_once else f"at each sublayer's own site ({sites})"
    return f"{steering.n_changed:,} nodes changed, added {where}"


def render_steering(steering: Steering, width: int = 100) -> str:
    """The table for a terminal `width` columns wide: a line per strength, chosen nodes, random directions, every node."""
    target, contrast = repr(steering.target.text), repr(steering.contrast.text)
    lines = [f"prompt          {steering.prompt!r}  ({len(steering.tokens)} tokens)"]
    if steering.counterfactual is not None:
        lines.append(f"counterfactual  {steering.counterfactual!r}")
    lines.append(f"question        {steering.contrast} against {steering.target}")
    low, high = min(steering.norms), max(steering.norms)
    norms = f"{low:.2f} to {high:.2f}" if len(steering.norms) > 1 else f"{low:.2f}"
    changed = f"{_changed(steering)}; norm {norms} of the residual's"
    lines += textwrap.wrap(f"changed         {changed}", width, subsequent_indent=" " * 16)
    for each in steering.changed[: _SHOWN if steering.n_changed > _SHOWN else None]:
        lines.append(f"                {each.node}@{each.position}  {each.before:+.2f} -> {each.after:+.2f}")
    if steering.n_changed > _SHOWN:
        lines.append(f"                and {steering.n_changed - _SHOWN:,} that change less")
    whole = steering.beside[0].every_target is not None
    names = [
        "strength",
        f"p({contrast})",
        f"p({target})",
        f"random p({contrast})",
        *(["every node"] if whole else []),
        "likeliest",
    ]
    rows = [names]
    for steered, beside in zip(steering.curve, steering.beside, strict=True):
        random = beside.random_contrast
        row = [f"{steered.strength:g}", f"{steered.probability_contrast:.3f}", f"{steered.probability_target:.3f}"]
        row.append(f"{random.mean:.3f} ({random.low:.3f}-{random.high:.3f})")
        row += [f"{beside.every_contrast:.3f}"] if beside.every_contrast is not None else []
        row.append("  ".join(f"{answer.token.text!r} {answer.probability:.0%}" for answer in steered.dense[:3]))
        rows.append(row)
    lines += ["", *columns(rows, width)]
    if steering.counterfactual_contrast is not None:
        lines.append(
            f"On the counterfactual itself the dense model gives p({contrast}) {steering.counterfactual_contrast:.3f}, "
            f"p({target}) {steering.counterfactual_target:.3f}."
        )
    written = [each for each in steering.curve if each.text is not None]
    lines += [""] if written else []
    lines += [f"goes on at {each.strength:g}:  {each.text!r}" for each in written]
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}\u2026" for line in lines)
