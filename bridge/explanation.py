"""An Explanation as a value: what it holds, as JSON, as text and in notebooks.

It cannot be made without its Faithfulness. Where the two models disagree the circuit is still shown, since one may want to know
what the sparse model does instead, but the verdict says first that it explains nothing of the dense model.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bridge import display
from bridge.attention import ExplainedHead, Read
from bridge.bridges import Coupling
from bridge.card.card import Card
from bridge.card.render import render_card
from bridge.checkpoint import CheckpointError, read_json
from bridge.circuit import EdgeKind
from bridge.levels import Level
from bridge.nodes import sparse_fingerprint
from bridge.prompts import shown
from bridge.recipe import UserError
from bridge.sparse import ATTENTION_KINDS, MLP_KINDS
from bridge.validate import EVIDENCE, Faithfulness, Measure, evidence

FORMAT = 1  # of the JSON: docs/explanation-json.md; counted up where a field goes or changes its meaning, not where one comes
LISTED_NODES, LISTED_EDGES, LISTED_HEADS = 40, 2, 8  # in the rendered text


class ExplainError(UserError):
    """A prompt, target or coupling that cannot be explained, in one line that says what to change."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary: its id, and the text that names it and no other (`Prompts.text`)."""

    id: int
    text: str

    def __str__(self) -> str:
        """The text as Python would write it, and the id."""
        return shown(self.text, self.id)


@dataclass(frozen=True)
class Answer:
    """A next token and its probability."""

    token: Token
    probability: float


@dataclass(frozen=True)
class ExplainedNode:
    """A node of the circuit: its activation in the sparse model, its corpus mean, and what its deletion from the circuit does.

    importance is the rise in KL to the whole sparse model (nats), effect the loss of logit difference (logits); in a large
    circuit both are measured for those nodes alone that matter most to first order, and None for the others. level is the first
    of the explanation's nested circuits that has the node. label is a few words on the channel, where `bridge nodes` has been
    run on the coupling.
    """

    id: str
    name: str
    layer: int
    kind: str
    index: int
    position: int
    activation: float
    mean: float
    importance: float | None
    effect: float | None
    level: int
    label: str | None = None


@dataclass(frozen=True)
class ExplainedEdge:
    """An edge between two nodes, named by their ids; see `flow` for kinds, weights and effects."""

    source: str
    target: str
    kind: EdgeKind
    weight: float
    effect: float


@dataclass(frozen=True)
class Counts:
    """How large the circuit is: nodes, edges (nonzero weights between two nodes) and the distinct weights among them.

    Embedding, unembedding and bigram entries are no edges, and counted apart.
    """

    nodes: int
    edges: int
    weights: int
    embedding: int
    unembedding: int
    bigram: int


@dataclass(frozen=True)
class Searched:
    """How the circuit was found: nodes along the way, whether silenced ones were candidates, whether it ran to its end."""

    active: int
    candidates: int
    silenced: bool
    complete: bool


@dataclass(frozen=True)
class Provenance:
    """What an explanation depends on; coupling_fingerprint is that of the sparse weights."""

    dense: str
    dense_fingerprint: str
    coupling: str | None
    l0: float
    seed: int
    version: str
    reference: str
    coupling_fingerprint: str | None = None


@dataclass(frozen=True)
class Answered:
    """What is known at once: the question, and both models' answers."""

    prompt: str
    tokens: tuple[Token, ...]
    target: Token
    contrast: Token
    dense: tuple[Answer, ...]
    sparse: tuple[Answer, ...]
    dense_difference: float
    sparse_difference: float

    @property
    def agree(self) -> bool:
        """Whether the two models give the same answer."""
        return self.dense[0].token.id == self.sparse[0].token.id


@dataclass(frozen=True)
class Drawn:
    """What is known before all the evidence is: the circuit, and whether it is sufficient (KL and share of D that it keeps)."""

    nodes: tuple[ExplainedNode, ...]
    edges: tuple[ExplainedEdge, ...]
    counts: Counts
    searched: Searched
    levels: tuple[Level, ...]
    sufficiency: tuple[Measure, Measure]


@dataclass(frozen=True)
class Explanation(Answered):
    """Why the dense model answers as it does, as far as a circuit of the sparse model tells, with the evidence.

    card holds further tests on the dense model, where they were asked for.
    """

    faithfulness: Faithfulness
    nodes: tuple[ExplainedNode, ...]
    edges: tuple[ExplainedEdge, ...]
    attention: tuple[ExplainedHead, ...]
    attention_left_out: int
    counts: Counts
    searched: Searched
    levels: tuple[Level, ...]
    provenance: Provenance
    card: Card | None = None

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain JSON values, the verdict written out: the contract of docs/explanation-json.md."""
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        values["faithfulness"] |= {"verdict": self.faithfulness.verdict, "reasons": list(self.faithfulness.reasons)}
        card = None if self.card is None else self.card.to_json()
        return {"format": FORMAT, **values, "card": card, "agree": self.agree}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Explanation:
        """The explanation that `to_json` wrote. Raises ExplainError for anything else."""
        try:
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            json.dumps(values, allow_nan=False)  # Python reads NaN, which is no JSON
            return _consistent(_READER.validate_python(values))
        except ValidationError as error:
            wrong = error.errors()[0]
            first = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg'].lower()}"
            raise ExplainError(f"this is not an explanation that this version of bridge reads ({first}); explain again") from None
        except (ValueError, RecursionError) as error:
            first = str(error).splitlines()[0]
            raise ExplainError(f"this is not an explanation that this version of bridge reads ({first}); explain again") from None

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        return render_html(self)


_READER = TypeAdapter(Explanation)


def _consistent(explanation: Explanation) -> Explanation:
    """An explanation that was read, if its parts fit each other. Raises ValueError."""
    for name in ("tokens", "dense", "sparse"):
        if not getattr(explanation, name):
            raise ValueError(f"{name} is empty")
    length = len(explanation.tokens)
    for node in explanation.nodes:
        if not 0 <= node.position < length:
            raise ValueError(f"node {node.id!r} is at token {node.position} of {length}")
        if node.kind not in ATTENTION_KINDS + MLP_KINDS:
            raise ValueError(f"node {node.id!r} is of kind {node.kind!r}, not one of {', '.join(ATTENTION_KINDS + MLP_KINDS)}")
    for head in explanation.attention:
        if not all(0 <= position < length for position in (head.query, *(read.position for read in head.reads))):
            raise ValueError(f"head {head.head} of layer {head.layer} reads beyond the {length} tokens")
    return explanation


def read_explanation(path: str | Path) -> Explanation:
    """The explanation in a JSON file. Raises ExplainError where there is none."""
    if not Path(path).is_file():
        raise ExplainError(f"there is no file {str(path)!r}; name one that `bridge explain --json` wrote")
    try:
        return Explanation.from_json(read_json(Path(path)))
    except ExplainError as error:
        raise ExplainError(f"{str(path)!r}: {error}") from None
    except CheckpointError as error:
        why = str(error).partition(": ")[2].partition(";")[0]
        raise ExplainError(
            f"{str(path)!r} holds no explanation ({why}); name a file that `bridge explain --json` wrote"
        ) from None


@dataclass(frozen=True)
class Fingerprints:
    """What tells a coupling's dense and sparse model from others; every weight is read for it."""

    dense: str
    sparse: str

    @staticmethod
    def of(coupling: Coupling) -> Fingerprints:
        """Those of a coupling as it is now."""
        return Fingerprints(coupling.dense.fingerprint(), sparse_fingerprint(coupling.sparse))


def check_coupling(explanation: Explanation, coupling: Coupling, known: Fingerprints | None = None) -> None:
    """Raise ExplainError where an explanation is not of a coupling: of another dense model, or of other sparse weights.

    `known` are the coupling's fingerprints, where it is one that does not change.
    """
    made, where = explanation.provenance, coupling.path or "this coupling"
    known = Fingerprints.of(coupling) if known is None else known
    if known.dense != made.dense_fingerprint:
        raise ExplainError(f"the explanation is not of {coupling.dense.name!r}, to which {where!r} is coupled; name its own")
    if made.coupling_fingerprint not in (None, known.sparse):
        raise ExplainError(
            f"the explanation is of {made.coupling!r} with other weights than {where!r} has; name its own, or explain again"
        )


# -- as text ----------------------------------------------------------------------------------------------------------------


def render_text(explanation: Explanation, width: int = 100, *, answer: bool = True) -> str:
    """The explanation for a terminal `width` columns wide: answer, verdict, circuit, evidence, and how to read them.

    Without the answer where that has been shown already (`render_answer`).
    """
    where = explanation.provenance
    made = (
        f"bridge {where.version}, seed {where.seed}; {where.coupling or 'a coupling in memory'} (L0 {where.l0:g}), dense model "
        f"{where.dense} ({where.dense_fingerprint[:12]}), means over {where.reference}"
    )
    parts = (
        *((render_answer(explanation, width).split("\n"),) if answer else ()),
        _render_verdict(explanation, width),
        _render_circuit(explanation, width),
        _render_attention(explanation, width),
        _render_evidence(explanation, width),
        *(() if explanation.card is None else (render_card(explanation.card, width, verdict=False).split("\n"),)),
        textwrap.wrap(_HOW_TO_READ, width),
        textwrap.wrap(made, width),
    )
    return "\n".join(_cut(line, width) for part in parts for line in (*part, "")).rstrip()


_HOW_TO_READ = (
    "How to read this: D is the logit of the target less that of the contrast. A node is a channel of the sparse model at one "
    "token; value is its activation there (off: silenced by AbsTopK), mean its average over text, which replaces it when it is "
    "deleted; effect is what D loses when it alone is deleted from the circuit. Inputs are its strongest edges, with what D owes "
    "to each. What holds in the sparse model holds for the dense one only as far as the last line of the evidence goes."
)


def render_answer(answered: Answered, width: int = 100) -> str:
    """What is known at once, as `render_text` begins."""
    prompt, *lines = _render_answer(answered)
    return "\n".join((*_wrap("", prompt, width, " " * 10), *(_cut(line, width) for line in lines)))


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _render_answer(explanation: Answered) -> list[str]:
    def listed(answers: tuple[Answer, ...]) -> str:
        return "  ".join(f"{quoted(each.token.text)} {each.probability:.1%}" for each in answers[:4])

    differences = explanation.dense_difference, explanation.sparse_difference
    own = "" if explanation.target.id == explanation.dense[0].token.id else ", which is not the dense model's answer"
    return [
        f"prompt    {quoted(explanation.prompt)}  ({_tokens(len(explanation.tokens))})",
        f"dense     {listed(explanation.dense)}",
        f"sparse    {listed(explanation.sparse)}  {'agrees' if explanation.agree else 'DISAGREES'}",
        f"question  why {explanation.target} rather than {explanation.contrast}{own}",
        "          D is {:+.2f} in the dense model, {:+.2f} in the sparse one".format(*differences),
    ]


def _render_verdict(explanation: Explanation, width: int) -> list[str]:
    """The card's verdict where there is a card, and then what the prompt's own evidence says."""
    own, card = explanation.faithfulness, explanation.card
    if card is None or card.verdict == own.verdict:
        return _wrap(
            "VERDICT   ", f"{own.verdict.upper()}. {' '.join((*own.reasons, *(card.reasons[1:] if card else ())))}", width
        )
    told = _wrap("VERDICT   ", f"{card.verdict.upper()}. {' '.join(card.reasons)}", width)
    return [*told, *_wrap("          ", f"Before the card, {own.verdict}: {' '.join(own.reasons)}", width)]


def _render_circuit(explanation: Explanation, width: int) -> list[str]:
    counts, searched = explanation.counts, explanation.searched
    lines = [
        f"CIRCUIT   {counts.nodes:,} nodes, where {searched.active:,} are active; {counts.edges:,} edges over "
        f"{counts.weights:,} weights"
    ]
    if not searched.complete:
        lines.append("          The search ran out of work: there may be a smaller circuit.")
    within = ", ".join(f"{level.nodes:,} with KL {level.kl:.2f} and {level.share:.2f} of D" for level in explanation.levels[:-1])
    lines += _wrap("          ", f"Within it {within}.", width) if within else []
    shown = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:LISTED_NODES]
    inputs: dict[str, list[ExplainedEdge]] = {}
    for edge in explanation.edges:  # strongest first
        if abs(edge.effect) >= 0.005:
            inputs.setdefault(edge.target, []).append(edge)
    longest = max((len(node.name) for node in shown), default=0)
    if shown:
        lines.append(f"        {'node':<{longest}}    value     mean   effect   inputs")
    for position, token in enumerate(explanation.tokens):
        here = [node for node in explanation.nodes if node.position == position and node in shown]
        lines += [f"  {position:>3}  {quoted(token.text)}"] if here else []
        for node in here:
            value = f"{node.activation:+.2f}" if node.activation else "off"
            arrows = ", ".join(_input(edge, position) for edge in inputs.get(node.id, [])[:LISTED_EDGES])
            lines.append(
                f"        {node.name:<{longest}}  {value:>7}  {node.mean:>+7.2f}  {node.effect or 0:>+7.2f}   {arrows}".rstrip()
            )
            lines += [f"            {node.label}"] if node.label else []
    last = len(explanation.tokens) - 1
    answer = [_input(edge, last) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    whole = ", ".join(text.replace(" ", "\u00a0") for text in answer[:8])  # a node and its effect on one line
    lines += [line.replace("\u00a0", " ") for line in _wrap("        D from ", whole, width)]
    if len(explanation.nodes) > len(shown):
        lines.append(f"        and {len(explanation.nodes) - len(shown):,} nodes of smaller effect, which the JSON lists")
    return lines


def _input(edge: ExplainedEdge, position: int) -> str:
    name, _, at = edge.source.partition("@")
    return f"{name}{'' if at == str(position) else '@' + at} {edge.effect:+.2f}"


def _render_attention(explanation: Explanation, width: int) -> list[str]:
    if not explanation.attention:
        return ["ATTENTION No head of the circuit does anything for D."]
    left = explanation.attention_left_out + max(0, len(explanation.attention) - LISTED_HEADS)
    head = "What D loses when a head's nodes are deleted at a token; by its pattern alone; by its values alone."
    lines = [
        *_wrap("ATTENTION ", f"{head} {left:,} more heads at tokens have some effect.", width),
        "        head         effect  pattern   values   sink   reads",
    ]
    for head in explanation.attention[:LISTED_HEADS]:
        numbers = f"{head.effect:>+7.2f}  {head.pattern_effect:>+7.2f}  {head.value_effect:>+7.2f}  {head.sink:>5.2f}"
        reads = ", ".join(_read(explanation, read) for read in head.reads[:3] if read.weight >= 0.05)
        lines.append(f"        {f'L{head.layer}.head {head.head}@{head.query}':<11}  {numbers}   {reads}".rstrip())
        for read in head.reads[:1]:
            why = ", ".join(f"q*k[{term.channel}] {term.product:+.2f}" for term in read.terms[:3])
            moved = ", ".join(
                f"{term.node.partition('.')[2].partition('@')[0]} {term.effect:+.2f}" for term in read.moved[:3] if term.effect
            )
            text = f"@{read.position} by {why or 'no channel'}; moves {moved or 'no node of the circuit'}"
            lines += textwrap.wrap(text, width, initial_indent=" " * 12, subsequent_indent=" " * 14)
    return lines


def _read(explanation: Explanation, read: Read) -> str:
    return f"{quoted(explanation.tokens[read.position].text)}@{read.position} {read.weight:.2f}"


def _render_evidence(explanation: Explanation, width: int) -> list[str]:
    faith, measures = explanation.faithfulness, explanation.faithfulness.measures
    if faith.profile_interval is not None:
        low, high = faith.profile_interval
        told = replace(faith.profile, note=f"95% interval {low:.2f} to {high:.2f}, p {faith.profile_p:.2g}; {faith.profile.note}")
        measures = tuple(told if measure is faith.profile else measure for measure in measures)
    return evidence(measures, width)


def _wrap(head: str, text: str, width: int, below: str | None = None) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head) if below is None else below)


def quoted(text: str) -> str:
    """Text as Python would write it, so that spaces, newlines and quotes can be seen."""
    return repr(text)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "\u2026"


# -- in a notebook ------------------------------------------------------------------------------------------------------------


def render_html(explanation: Explanation) -> str:
    """The explanation as a piece of HTML: answer, verdict, what D owes to nodes at each token, nodes, evidence."""
    faithfulness, counts = explanation.faithfulness, explanation.counts
    effects = [0.0] * len(explanation.tokens)
    for node in explanation.nodes:
        effects[node.position] += abs(node.effect or 0)
    most = max(effects) or 1.0
    shaded = "".join(display.token(each.text, effect / most) for each, effect in zip(explanation.tokens, effects, strict=True))
    strongest = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:LISTED_NODES]
    largest = max((abs(node.effect or 0) for node in strongest), default=0) or 1.0
    nodes = [
        (
            node.name,
            f"{node.position} {quoted(explanation.tokens[node.position].text)}",
            f"{node.activation:+.2f}",
            display.Cell(f"{node.effect or 0:+.2f}", (node.effect or 0) / largest),
            node.label or "",
        )
        for node in strongest
    ]
    answers = (
        _answer_row("dense", explanation.dense, explanation.dense_difference),
        _answer_row("sparse", explanation.sparse, explanation.sparse_difference),
    )
    size = f"circuit: {counts.nodes:,} nodes, {counts.edges:,} edges; the {len(nodes)} of largest effect"
    return display.card(
        _render_answer(explanation)[3].removeprefix("question").strip(),
        shaded,
        display.table(("", "answers", "D"), answers),
        f"{display.verdict(faithfulness.verdict)} {display.text(' '.join(faithfulness.reasons))}",
        display.fold(size, display.table(("node", "at", "value", "effect", ""), nodes)),
        display.fold("evidence", display.table(("", *EVIDENCE[1:]), (measure.row() for measure in faithfulness.measures))),
    )


def _answer_row(model: str, answers: tuple[Answer, ...], difference: float) -> tuple[str, str, str]:
    told = "  ".join(f"{quoted(each.token.text)} {each.probability:.1%}" for each in answers[:4])
    return model, told, f"{difference:+.2f}"
