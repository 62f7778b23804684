"""A Steering as a table for the terminal, and as a plot of probability against strength (paper, figure 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridge.display.columns import columns, truncate, wrap
from bridge.display.plots import draw_figure, svg
from bridge.steering.curves import Spread, Steering

_SHOWN = 6  # nodes that the table names


@dataclass(frozen=True)
class Panel:
    """One probability against strength: with the chosen nodes, random directions, or every node; and on the counterfactual."""

    title: str
    strengths: Sequence[float]
    chosen: Sequence[float]
    random: Sequence[Spread]
    every: Sequence[float] | None = None
    counterfactual: float | None = None


def panels_of(steering: Steering) -> tuple[Panel, Panel]:
    """Return the panels of the contrast's and of the target's probability."""

    def panel(side: str) -> Panel:
        def of(rows: Sequence[Any], name: str) -> list[Any]:
            return [getattr(each, f"{name}_{side}") for each in rows]

        every = [value for value in of(steering.beside, "every") if value is not None]
        return Panel(
            repr(getattr(steering, side).text), [each.strength for each in steering.curve], of(steering.curve, "probability"),
            of(steering.beside, "random"), every or None, getattr(steering, f"counterfactual_{side}"),
        )  # fmt: skip

    return panel("contrast"), panel("target")


def figure_of(heading: str, note: str, panels: Sequence[Panel]) -> Any:
    """Return panels of probability against strength as a figure of matplotlib."""

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        figure.suptitle(heading)
        figure.supxlabel(note, fontsize=7)
        axes[0].set(ylabel="probability in the dense model", ylim=(0, 1))
        for place, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            axis.set(xlabel=f"probability of {panel.title}, against strength", xlim=(0, 1))
            low, mean, high = ([getattr(each, name) for each in panel.random] for name in ("low", "mean", "high"))
            axis.fill_between(panel.strengths, low, high, color="gray", alpha=0.2, label="random directions")
            axis.plot(panel.strengths, mean, color="gray", linewidth=1)
            if panel.counterfactual is not None:
                axis.axhline(panel.counterfactual, linestyle=":", color="gray", label="the counterfactual itself")
            if panel.every is not None:
                axis.plot(panel.strengths, panel.every, "--", color=f"C{place}", label="every node")
            axis.plot(panel.strengths, panel.chosen, "o-", color=f"C{place}", label="chosen nodes")
        axes[0].legend(fontsize=7)

    return draw_figure(len(panels), (8.6, 4.2), paint)


def steering_plot(steering: Steering) -> str:
    """Return the plot of a Steering as SVG."""
    heading = f"Steering the dense model from {steering.target.text!r} to {steering.contrast.text!r}"
    note = f"{_describe_change(steering)}; band: lowest to highest of {steering.draws} random directions of equal norm."
    return svg(figure_of(heading, note, panels_of(steering)))


def _describe_change(steering: Steering) -> str:
    sites = ", ".join(str(site) for site in steering.sites)
    where = f"in full at site {sites}" if steering.at_once else f"at the site after each sublayer ({sites})"
    return f"{steering.n_changed:,} nodes changed; the change is added {where}"


def render_steering(steering: Steering, width: int = 100) -> str:
    """Return the table for a terminal `width` columns wide, a line per strength: chosen nodes, random directions, every node."""
    target, contrast = repr(steering.target.text), repr(steering.contrast.text)
    lines = [f"prompt          {steering.prompt!r}  ({len(steering.tokens)} tokens)"]
    if steering.counterfactual is not None:
        lines.append(f"counterfactual  {steering.counterfactual!r}")
    lines.append(f"question        {steering.contrast} against {steering.target}")
    low, high = min(steering.norms), max(steering.norms)
    norms = f"{low:.2f} to {high:.2f}" if len(steering.norms) > 1 else f"{low:.2f}"
    changed = f"{_describe_change(steering)}; norm {norms} times the residual's"
    lines += wrap("changed         ", changed, width)
    for each in steering.changed[: _SHOWN if steering.n_changed > _SHOWN else None]:
        lines.append(f"                {each.node}@{each.position}  {each.before:+.2f} -> {each.after:+.2f}")
    if steering.n_changed > _SHOWN:
        lines.append(f"                and {steering.n_changed - _SHOWN:,} that change less")
    every = ["every node"] if steering.beside[0].every_target is not None else []
    rows = [["strength", f"p({contrast})", f"p({target})", f"random p({contrast})", *every, "likeliest"]]
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
    lines += [f"text at strength {each.strength:g}:  {each.text!r}" for each in written]
    return "\n".join(truncate(line, width) for line in lines)
