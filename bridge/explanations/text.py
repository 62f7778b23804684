"""Render an Explanation as text for a terminal, in these sections, and as HTML for a notebook.

answer      both models' next tokens, and the question with its span
VERDICT     the verdict with its reasons
CIRCUITS    the nested circuits, a row each
PATH        the strongest paths from tokens to the answer, in words, through the groups of the opening circuit
GROUPS      each group with its edges and the effects of ablating it in the sparse and in the dense model
NODES       the strongest nodes, listed at their tokens
ATTENTION, EVIDENCE, how to read the text, and the explanation's origin
"""

from __future__ import annotations

from collections.abc import Sequence

from bridge.display import html as display
from bridge.display.columns import columns, truncate, wrap
from bridge.evidence.measures import evidence_table
from bridge.evidence.sufficiency import NestedCircuit
from bridge.explanations.parts import Answer, Answered, Explained, ExplainedEdge, ExplainedGroup
from bridge.graph.paths import strongest_paths
from bridge.models.schema import ERROR

LISTED_NODES = 40
LISTED_EDGES = 2  # into each listed node
LISTED_GROUPS = 20
LISTED_HEADS = 6
PATHS = 3
_MIN_EDGE_NATS = 0.005  # nats; edges of smaller effect are not shown
_HEAD_WIDTH = 10  # width of the column with the section's name
_GROUP_COLUMN = 38  # column at which the description of a group starts
_ANSWERS = 4  # likeliest tokens of a model; fewer if the line is too short

# -- as text ----------------------------------------------------------------------------------------------------------------


def render_text(explanation: Explained, width: int = 100, *, answer: bool = True) -> str:
    """Return the explanation for a terminal `width` columns wide; `answer` includes the section `render_answer` makes."""
    where, report = explanation.provenance, explanation.report
    span = "" if where.blocks is None else f" of blocks {where.blocks} (the dense model runs before and after them)"
    made = (
        f"bridge {where.version}, seed {where.seed}; {where.coupling or 'a coupling in memory'} (L0 {where.l0:g}){span}, dense "
        f"model {where.dense} ({where.dense_fingerprint[:12]}), means over {where.reference}"
    )
    drawn = (_path(explanation, width), _groups(explanation, width), _nodes(explanation, width), _attention(explanation, width))
    parts = (
        *((render_answer(explanation, width).split("\n"),) if answer else ()),
        wrap("VERDICT   ", f"{report.verdict.upper()}. {' '.join(report.reasons)}", width),
        _circuits(explanation, width),
        *(drawn if explanation.counts.nodes else (wrap("PATH      ", "Nothing is drawn: no circuit was searched.", width),)),
        evidence_table(report.measures, width),
        wrap("", _HOW_TO_READ, width),
        wrap("", made, width),
    )
    return "\n".join(truncate(line, width) for part in parts for line in (*part, "")).rstrip()


_HOW_TO_READ = (
    "How to read this: d is the log-odds in question, in nats; the span is what d loses when every node and every error is at "
    "its mean over text. F, normalised faithfulness, is 1 minus the distance of d from the dense model's, as a share of the "
    "span. A node is a channel of the sparse model at one token. An error is the part of the dense residual that the sparse "
    "model misses at a site and token; with all errors the sparse model gives the dense answer exactly. The effect of a node or "
    "a group is the loss of d when it alone is ablated from the circuit. A group's sparse effect is the loss when it is ablated "
    "from the sparse model with all its nodes, where other nodes may also lead to the answer; its dense effect is the loss in "
    "the dense model when that change is patched through the bridge. An edge's effect is computed to first order. A result "
    "about the sparse model holds for the dense model only if the evidence on the dense model supports it."
)


def render_answer(answered: Answered, width: int = 100) -> str:
    """Return the first section of `render_text`: the prompt, both models' answers, and the question."""
    agree = "agrees" if answered.agree else "gives another answer by itself"
    sparse = [f"sparse    {answers_text(answered.sparse, count)}  {agree}" for count in range(_ANSWERS, 0, -1)]
    lines = [
        *wrap("prompt    ", f"{answered.prompt!r}  ({len(answered.tokens)} tokens)", width),
        f"dense     {answers_text(answered.dense)}",
        next((line for line in sparse if len(line) <= width), sparse[-1]),
        *wrap("question  ", f"{question(answered)}: {_span(answered)}", width),
    ]
    return "\n".join(truncate(line, width) for line in lines)


def question(answered: Answered) -> str:
    """Return the question in words."""
    over = "at all" if answered.contrast is None else f"rather than {answered.contrast}"
    own = "" if answered.answer.id == answered.dense[0].token.id else ", which is not the dense model's answer"
    return f"why {answered.answer} {over}{own}"


def _span(answered: Answered) -> str:
    against = "against all other tokens " if answered.contrast is None else ""
    return (
        f"log-odds {against}{answered.dense_d:+.1f} in the dense model, {answered.nothing_d:+.1f} with everything at its mean: a "
        f"span of {abs(answered.span):.1f} nats to explain (the sparse model by itself: {answered.sparse_d:+.1f})"
    )


def answers_text(answers: tuple[Answer, ...], count: int = _ANSWERS) -> str:
    """Return the first of a model's answers with their probabilities."""
    return "  ".join(f"{each.token.text!r} {each.probability:.1%}" for each in answers[:count])


def _circuits(explanation: Explained, width: int) -> list[str]:
    """Return a table of the nested circuits, and the shares of the span that flow through nodes and errors."""
    rows: list[tuple[str, ...]] = [
        ("CIRCUITS  ", "nodes", "errors", "F", "miss", "KL", "supersets", "worst", "adversary", "left", "by errors")
    ]
    for place, each in enumerate(explanation.nested):
        mark = ">" if place == explanation.opening else " "
        name = "full KL" if each.asked is None else f"F {each.asked:g}"
        rows.append((f"{mark}{' ' if each.within else '!'}{name}", *_circuit_cells(each)))
    lines = columns(rows, width)
    circuit, counts = explanation.circuit, explanation.counts
    if not counts.nodes:
        return lines
    missed = "" if all(each.within for each in explanation.nested) else "! misses a bound of the search. "
    errors = f"{counts.errors:,} error{'' if counts.errors == 1 else 's'}"
    alone, share = counts.edges_faithfulness, round(circuit.error_share, 2) + 0.0  # no -0
    pruned = "" if alone is None else f" (of {counts.edges_before:,}; F {alone:.3f} with these edges alone)"
    asked = explanation.config.opens_at
    instead = "" if circuit.asked == asked else f", because the circuit at F {asked:g} does not hold in random supersets"
    legend = (
        f"{missed}> is drawn here{instead}: {circuit.nodes:,} of {counts.active:,} active nodes, and {errors}; "
        f"{counts.edges:,} edges over {counts.weights:,} weights{pruned}, in {len(explanation.groups):,} groups. "
        f"{1 - share:.0%} of the span flows through nodes, {share:.0%} through errors; replacement "
        f"{explanation.replacement:.2f}, completeness {explanation.completeness:.2f}."
    )
    lines += wrap(" " * _HEAD_WIDTH, legend, width)
    if (backup := explanation.backup) is not None:
        strongest = f": {', '.join(backup.strongest)}" if backup.strongest else ""
        what = (
            f"When this circuit is ablated, {backup.left:.2f} of the span is left, more than {explanation.config.left:g}: "
            f"{backup.nodes:,} other nodes back it up{strongest}."
        )
        lines += wrap(" " * _HEAD_WIDTH, what, width)
    return lines


def _circuit_cells(each: NestedCircuit) -> tuple[str, ...]:
    adversary = "" if each.adversary is None else f"{each.adversary:.2f}"
    return (
        f"{each.nodes:,}", f"{each.errors:,}", f"{each.faithfulness:.3f}", f"{each.miss:.2f}", f"{each.kl:.3f}",
        f"{each.supersets_mean:.3f}", f"{each.supersets_worst:.2f}", adversary, f"{each.left:.2f}",
        f"{round(each.error_share, 2) + 0.0:.2f}",
    )  # fmt: skip


# -- the path ---------------------------------------------------------------------------------------------------------------


def _path(explanation: Explained, width: int) -> list[str]:
    groups = {f"group:{group.id}": group for group in explanation.groups}
    lines: list[str] = []
    for path in strongest_paths(explanation.group_edges, PATHS):
        words = []
        for each in path.steps:
            group = groups.pop(each, None)  # each group is described once
            if group is None:
                words.append(_describe_end(explanation, each))
            else:
                words.append(f"[{group.id}: {_describe_group(group, group.label or group.name)}]")
        lines += wrap(" " * _HEAD_WIDTH if lines else "PATH      ", " -> ".join(words), width)
    return lines or ["PATH      No group adds anything to the answer."]


def _describe_end(explanation: Explained, end: str) -> str:
    """Return an end of a group edge in words."""
    kind, _, where = end.partition(":")
    if kind == "answer":
        return repr(explanation.answer.text)
    if kind == "group":
        return f"[{where}]"
    if kind == "input":
        return f"{explanation.tokens[int(where)].text!r} at {where}"
    site, _, position = where.partition("@")
    return f"error at site {site}, token {position}"


def _groups(explanation: Explained, width: int) -> list[str]:
    """Return the lines on the strongest groups, at most 20, in the order of the computation."""
    shown = set(
        sorted((group.id for group in explanation.groups), key=lambda id: -abs(explanation.groups[id].effect))[:LISTED_GROUPS]
    )
    head = (
        "The loss of d when all of a group is ablated: from the circuit; from the sparse model with all its nodes; the same "
        "patched through the bridge into the dense model."
    )
    if (correlation := explanation.group_correlation) is not None:
        head += f" The two models agree on them by a correlation of {correlation:.2f}."
    lines = wrap("GROUPS    ", head, width)
    lines += [f"{'':8}{'group':<6}{'circuit':>7}{'sparse':>7}{'dense':>7}   what it is"] if shown else []
    for group in explanation.groups:
        if group.id in shown:
            lines += _group(explanation, group, width)
    if len(explanation.groups) > len(shown):
        lines.append(f"        and {len(explanation.groups) - len(shown):,} groups of smaller effect, which the JSON lists")
    return lines


def _group(explanation: Explained, group: ExplainedGroup, width: int) -> list[str]:
    effects = (group.effect, group.sparse_effect, group.dense_effect)
    numbers = "".join(f"{'-' if effect is None else f'{effect:+.2f}':>7}" for effect in effects)
    head = f"{'':8}{f'[{group.id}]':<6}{numbers}   "
    what = f"{_describe_group(group, group.name)}{f': {group.label}' if group.label else ''}"
    lines = wrap(head, what, width, " " * _GROUP_COLUMN)
    own = f"group:{group.id}"
    for word, end, this in (("from", "source", "target"), ("to", "target", "source")):
        joined = [edge for edge in explanation.group_edges if getattr(edge, this) == own and abs(edge.effect) >= _MIN_EDGE_NATS]
        joined.sort(key=lambda edge: -abs(edge.effect))
        if joined:
            ends = [f"{_describe_end(explanation, getattr(edge, end))} {edge.effect:+.2f}" for edge in joined[:6]]
            lines += _wrap_list(f"{'':{_GROUP_COLUMN}}{word} ", ends, width, " " * (_GROUP_COLUMN + 5))
    return lines


def _describe_group(group: ExplainedGroup, name: str) -> str:
    """Return a group's layers, kind and positions, its name, and the number of its nodes."""
    positions = ", ".join(map(str, group.positions))
    count = f"({len(group.nodes)} node{'' if len(group.nodes) == 1 else 's'})"
    if group.kind == ERROR:
        return f"{name}, at token {positions} {count}"
    first, last = group.layers[0], group.layers[-1]
    return f"L{first if first == last else f'{first}-{last}'} {group.kind} at {positions}: {name} {count}"


def _nodes(explanation: Explained, width: int) -> list[str]:
    opened = [node for node in explanation.nodes if node.effect is not None]
    shown = sorted(opened, key=lambda node: -abs(node.effect or 0))[:LISTED_NODES]
    inputs: dict[str, list[ExplainedEdge]] = {}
    for edge in explanation.edges:  # strongest first
        if abs(edge.effect) >= _MIN_EDGE_NATS:
            inputs.setdefault(edge.target, []).append(edge)
    names = {node.id: f"error at site {node.layer}" if node.kind == ERROR else node.name for node in shown}
    longest = max(map(len, names.values()), default=4)
    lines = [f"NODES     The {len(shown):,} of {explanation.counts.nodes:,} nodes with the largest effects, at their tokens"]
    lines.append(f"        {'node':<{longest}}  group    value     mean   effect   inputs")
    for position, token in enumerate(explanation.tokens):
        here = [node for node in explanation.nodes if node.position == position and node.id in names]
        lines += [f"  {position:>3}  {token.text!r}"] if here else []
        for node in here:
            value = f"{node.activation:+.2f}" if node.activation else "inactive"
            arrows = [_describe_input(edge, position) for edge in inputs.get(node.id, [])[:LISTED_EDGES]]
            group = "" if node.group is None else f"[{node.group}]"
            head = f"        {names[node.id]:<{longest}}  {group:<5}{value:>8}{node.mean:>+9.2f}{node.effect or 0:>+9.2f}   "
            lines += _wrap_list(head, arrows, width) if arrows else [head.rstrip()]
            lines += wrap(" " * 12, node.label, width) if node.label else []
    last = len(explanation.tokens) - 1
    answer = [_describe_input(edge, last) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    lines += _wrap_list("        d from ", answer[:8], width) if answer else []
    if len(opened) > len(shown):
        lines.append(f"        and {len(opened) - len(shown):,} nodes of smaller effect, which the JSON lists")
    return lines


def _describe_input(edge: ExplainedEdge, position: int) -> str:
    name, _, at = edge.source.partition("@")
    return f"{name}{'' if at == str(position) else '@' + at} {edge.effect:+.2f}"


def _attention(explanation: Explained, width: int) -> list[str]:
    if not explanation.attention:
        return ["ATTENTION No head of the circuit has an effect on d."]
    left = explanation.attention_left_out + max(0, len(explanation.attention) - LISTED_HEADS)
    head = "The loss of d when a head's nodes are ablated at a token: pattern and values; its pattern alone; its values alone."
    lines = [
        *wrap("ATTENTION ", f"{head} {left:,} more heads at tokens have an effect.", width),
        "        head         effect  pattern   values   sink   reads",
    ]
    for head in explanation.attention[:LISTED_HEADS]:
        numbers = f"{head.effect:>+7.2f}  {head.pattern_effect:>+7.2f}  {head.value_effect:>+7.2f}  {head.sink:>5.2f}"
        shown = [read for read in head.reads[:3] if read.weight >= 0.05]
        reads = ", ".join(f"{explanation.tokens[read.position].text!r}@{read.position} {read.weight:.2f}" for read in shown)
        lines.append(f"        {f'L{head.layer}.head {head.head}@{head.query}':<11}  {numbers}   {reads}".rstrip())
        for read in head.reads[:1]:
            why = ", ".join(f"q*k[{term.channel}] {term.product:+.2f}" for term in read.terms[:3])
            values = ", ".join(
                f"{term.node.partition('.')[2].partition('@')[0]} {term.effect:+.2f}" for term in read.moved[:3] if term.effect
            )
            text = f"@{read.position} by {why or 'no channel'}; moves {values or 'no node of the circuit'}"
            lines += wrap(" " * 12, text, width, " " * 14)
    return lines


# -- lines --------------------------------------------------------------------------------------------------------------------


def _wrap_list(head: str, parts: Sequence[str], width: int, below: str | None = None) -> list[str]:
    """Return the parts separated by commas and wrapped, with no line break inside a part."""
    marked = ", ".join(part.replace(" ", "\u00a0") for part in parts)
    return [line.replace("\u00a0", " ") for line in wrap(head, marked, width, below)]


# -- in a notebook ------------------------------------------------------------------------------------------------------------


def render_html(explanation: Explained) -> str:
    """Return HTML with the question, the summed |effect| of the nodes at each token, the verdict, and all of the text, folded."""
    effects = [0.0] * len(explanation.tokens)
    for node in explanation.nodes:
        effects[node.position] += abs(node.effect or 0)
    most, report = max(effects) or 1.0, explanation.report
    return display.card(
        question(explanation),
        "".join(display.token(each.text, effect / most) for each, effect in zip(explanation.tokens, effects, strict=True)),
        display.text(f"dense {answers_text(explanation.dense)}; sparse {answers_text(explanation.sparse)}"),
        f"{display.verdict(report.verdict)} {display.text(' '.join(report.reasons))}",
        display.fold("everything, as text", display.listing(render_text(explanation))),
    )
