"""Represent the changes that a fine-tune made as values, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bridge.display.columns import columns
from bridge.evidence.measures import Measure, evidence_table
from bridge.explanations.parts import Answer, Token
from bridge.explanations.text import answers_text

FORMAT = 1
Status = Literal["came", "went", "changed"]
Verdict = Literal["NOTHING CHANGED", "TRANSPLANTED", "NOT TRANSPLANTED"]
SHOWN_NODES, SHOWN_EDGES, SHOWN_EFFECTS, SHOWN_CHANNELS = 12, 8, 5, 12  # maximum numbers of lines in the text


@dataclass(frozen=True)
class ChangedNode:
    """A node that the fine-tune changed: its values in the base's and the fine-tune's run, and its own change.

    share is the own change's share of the change of d; effects are effects on d from the node's mean, in nats.
    """

    id: str
    name: str
    position: int
    token: str
    status: Status
    before: float
    after: float
    own: float
    share: float
    effect_before: float
    effect_after: float


@dataclass(frozen=True)
class ChangedEdge:
    """A changed weight into a changed node; effect is what the difference adds to d, to first order, in nats.

    The source of a weight of matrix o (values) has no position, because the head gathers values from several positions.
    """

    source: str
    target: str
    status: Status
    before: float
    after: float
    effect: float


@dataclass(frozen=True)
class ShiftedEffect:
    """A node that is not among the changed nodes, and its effects on d from its mean in the two models, in nats."""

    id: str
    name: str
    position: int
    token: str
    before: float
    after: float


@dataclass(frozen=True)
class Transplant:
    """Shares of the change of d that the base's dense model makes with the changes of the changed nodes, all nodes, or controls.

    Changes enter at each sublayer's own site; in the by_site shares, the whole change enters at one site.
    """

    share: float
    all_nodes: float
    matched: tuple[float, ...]
    displaced: tuple[float, ...]
    by_site: tuple[float, ...]
    all_nodes_by_site: tuple[float, ...]


@dataclass(frozen=True)
class PromptDiff:
    """The change of the answer to one prompt: d of both dense and both sparse models, and the causes of the change.

    through divides the change of d into shares of nodes, embedding, errors and unembedding; changed is the number of nodes.
    """

    prompt: str
    tokens: tuple[str, ...]
    answer: Token
    contrast: Token | None
    base_answers: tuple[Answer, ...]
    tuned_answers: tuple[Answer, ...]
    base_d: float
    tuned_d: float
    base_sparse_d: float
    tuned_sparse_d: float
    through: Mapping[str, float] = field(default_factory=dict)
    changed: int = 0
    nodes: tuple[ChangedNode, ...] = ()
    edges: tuple[ChangedEdge, ...] = ()
    effects: tuple[ShiftedEffect, ...] = ()
    transplant: Transplant | None = None

    @property
    def change(self) -> float:
        """Change of the dense model's d by the fine-tune, in nats."""
        return self.tuned_d - self.base_d


@dataclass(frozen=True)
class ChangedChannel:
    """A channel that changed on some prompts: the number of these prompts, and its share of the change over all prompts."""

    name: str
    prompts: int
    share: float


@dataclass(frozen=True)
class Diff:
    """Changes of the answers to some prompts, and the check by transplanting.

    least is the smallest change of d, in nats, that counts as a change.
    """

    prompts: tuple[PromptDiff, ...]
    transplant: Measure
    channels: tuple[ChangedChannel, ...]
    least: float
    base: Mapping[str, Any]
    tuned: Mapping[str, Any]
    seed: int

    @property
    def changed(self) -> tuple[PromptDiff, ...]:
        """The prompts on which something changed."""
        return tuple(each for each in self.prompts if each.transplant is not None)

    @property
    def verdict(self) -> Verdict:
        """Verdict of the transplant's measure; its bootstrap interval must also lie above the largest control."""
        if not self.changed:
            return "NOTHING CHANGED"
        measure = self.transplant
        apart = measure.interval is None or (measure.control is not None and measure.interval[0] > measure.control.bar)
        return "TRANSPLANTED" if measure.passed and apart else "NOT TRANSPLANTED"

    def to_json(self) -> dict[str, Any]:
        """Return the diff as plain JSON values."""
        prompts = [{**asdict(each), "change": each.change} for each in self.prompts]
        measure = {**asdict(self.transplant), "passed": self.transplant.passed}
        channels = [asdict(each) for each in self.channels]
        return {
            "format": FORMAT, "verdict": self.verdict, "transplant": measure, "channels": channels, "prompts": prompts,
            "least": self.least, "base": dict(self.base), "tuned": dict(self.tuned), "seed": self.seed,
        }  # fmt: skip


def render_diff(diff: Diff, width: int = 100) -> str:
    """Return a diff as text: for one prompt its nodes and edges; for several prompts one line each, and the channels."""
    lines = _prompt_lines(diff.prompts[0], diff.least, width) if len(diff.prompts) == 1 else _table(diff, width)
    lines += ["", f"VERDICT   {_summary_sentence(diff)}", ""]
    if diff.changed:
        lines += [*evidence_table([diff.transplant], width, places=True)]
    return "\n".join(lines).rstrip()


def _summary_sentence(diff: Diff) -> str:
    match diff.verdict:
        case "NOTHING CHANGED":
            return f"NOTHING CHANGED. No answer's d differs by {diff.least:g} nats or more between the two dense models."
        case "TRANSPLANTED":
            return (
                "TRANSPLANTED. The contribution of the changed nodes, each sublayer's at its own site, changes the base's dense "
                "model as the fine-tune did, and that of as many other active nodes does not."
            )
        case _:
            return (
                "NOT TRANSPLANTED. In the base's dense model, the changed nodes' share of the change is too small or not clearly "
                "above that of the controls, or the controls' share is too large."
            )


def _prompt_lines(one: PromptDiff, least: float, width: int) -> list[str]:
    why = "at all" if one.contrast is None else f"rather than {one.contrast.text!r}"
    lines = [
        f"prompt    {one.prompt!r}  ({len(one.tokens)} tokens)",
        f"base      {answers_text(one.base_answers)}",
        f"tuned     {answers_text(one.tuned_answers)}",
        f"question  why {one.answer.text!r} (#{one.answer.id}) {why}: d {one.base_d:+.2f} in the base, {one.tuned_d:+.2f} in the "
        "fine-tuned model",
        f"change    {one.change:+.2f} nats (the sparse models alone: {one.tuned_sparse_d - one.base_sparse_d:+.2f})",
    ]
    if one.transplant is None:
        return [*lines, f"          less than {least:g} nats: there is no change to explain"]
    lines += [f"through   {', '.join(f'{kind} {share:.0%}' for kind, share in one.through.items())}", ""]
    rows = [(f"CHANGED ({one.changed:,} nodes)", "", "value", "own change", "share", "effect on d")]
    for node in one.nodes[:SHOWN_NODES]:
        value, effect = f"{node.before:.2f} -> {node.after:.2f}", f"{node.effect_before:+.2f} -> {node.effect_after:+.2f}"
        rows.append((f"  {node.id} {node.token!r}", node.status, value, f"{node.own:+.2f}", f"{node.share:+.0%}", effect))
    lines += [*columns(rows, width), ""]
    rows = [("WEIGHTS INTO CHANGED NODES", "", "weight", "adds to d")]
    for edge in one.edges[:SHOWN_EDGES]:
        rows.append(
            (f"  {edge.source} -> {edge.target}", edge.status, f"{edge.before:.3f} -> {edge.after:.3f}", f"{edge.effect:+.2f}")
        )
    lines += [*columns(rows, width), ""]
    rows = [("OTHER NODES' EFFECTS", "base", "tuned")]
    rows += [(f"  {each.id} {each.token!r}", f"{each.before:+.2f}", f"{each.after:+.2f}") for each in one.effects[:SHOWN_EFFECTS]]
    return [*lines, *columns(rows, width)]


def _table(diff: Diff, width: int) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("PROMPT", "answer", "base d", "tuned d", "change", "changed", "through nodes", "transplant", "matched")
    ]
    for each in diff.prompts:
        numbers = (f"{each.base_d:+.2f}", f"{each.tuned_d:+.2f}", f"{each.change:+.2f}")
        made = each.transplant
        mean = 0.0 if made is None else sum(made.matched) / len(made.matched)
        shares = ("-",) * 3 if made is None else (f"{each.through['node']:.2f}", f"{made.share:.2f}", f"{mean:.2f}")
        shown = f"  ...{each.prompt[-20:]!r}", repr(each.answer.text), *numbers, f"{each.changed:,}", *shares
        rows.append(shown)
    lines = columns(rows, width)
    if diff.channels:
        rows = [("CHANNELS CHANGED", "prompts", "share")]
        rows += [(f"  {each.name}", f"{each.prompts}", f"{each.share:+.1%}") for each in diff.channels[:SHOWN_CHANNELS]]
        lines += ["", *columns(rows, width)]
    return lines
