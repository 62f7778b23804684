"""A prompt -> an Explanation: what the dense model answers, the circuit of the sparse model that answers so, and the evidence.

    tokens      the prompt under the dense model's tokenizer; target and contrast, by default its first and second answer
    means       of every sparse node over the coupling's reference text
    search      `prune.find_circuit`: candidates, scores, masks, deletions
    edges       `circuit.edge_table`; and every node deleted alone from the circuit, for what it does there
    levels      `levels.nested_circuits`: smaller circuits within it
    attention   `attention.explain_attention`: what the circuit's heads read, why, and what they move
    evidence    `validate.validate`, on the sparse and on the dense model

Who waits is told before all is known: `explain` hands over an Answered at once, and a Drawn, the circuit with the first two
measures, before the slower evidence.

An Explanation cannot be made without its Faithfulness. Where the two models disagree the circuit is still shown, since one may
want to know what the sparse model does instead, but the verdict says first that it explains nothing of the dense model.

Shape legend: b batch row, t token, f all nodes of a prompt in one row, k the circuit's nodes, v vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from bridge import display
from bridge.attention import ExplainedHead, Read, explain_attention
from bridge.bridges import Coupling
from bridge.circuit import COUNTED, Ablations, EdgeKind, EdgeTable, Question, corpus_means, edge_table
from bridge.levels import Level, nested_circuits
from bridge.node_page import node_labels
from bridge.nodes import sparse_fingerprint, token_text
from bridge.prune import Found, find_circuit
from bridge.recipe import UserError
from bridge.validate import Faithfulness, Measure, validate

FORMAT = 1  # of the JSON: docs/explanation-json.md; counted up where a field goes or changes its meaning, not where one comes
REFERENCE_TOKENS = 4096  # of the reference text, over which means are taken: a second
DELETED_TOKENS = 2000  # of masked copies, in which nodes are deleted one by one
MOST_EDGES = 5000  # that an explanation holds, the strongest ones; what there is beyond is only counted
LISTED_NODES, LISTED_EDGES, LISTED_HEADS = 40, 2, 8  # in the rendered text


class ExplainError(UserError):
    """A prompt, target or coupling that cannot be explained, in one line that says what to change."""


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary."""

    id: int
    text: str


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
    """An edge between two nodes, named by their ids; see `circuit` for kinds, weights and effects."""

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
class Explanation:
    """Why the dense model answers as it does, as far as a circuit of the sparse model tells, with the evidence."""

    prompt: str
    tokens: tuple[Token, ...]
    target: Token
    contrast: Token
    dense: tuple[Answer, ...]
    sparse: tuple[Answer, ...]
    dense_difference: float
    sparse_difference: float
    faithfulness: Faithfulness
    nodes: tuple[ExplainedNode, ...]
    edges: tuple[ExplainedEdge, ...]
    attention: tuple[ExplainedHead, ...]
    attention_left_out: int
    counts: Counts
    searched: Searched
    levels: tuple[Level, ...]
    provenance: Provenance

    @property
    def agree(self) -> bool:
        """Whether the two models give the same answer."""
        return self.dense[0].token.id == self.sparse[0].token.id

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain JSON values, the verdict written out: the contract of docs/explanation-json.md."""
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        values["faithfulness"] |= {"verdict": self.faithfulness.verdict, "reasons": list(self.faithfulness.reasons)}
        return {"format": FORMAT, **values, "agree": self.agree}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Explanation:
        """The explanation that `to_json` wrote. Raises ExplainError for anything else."""
        try:
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            json.dumps(values, allow_nan=False)  # Python reads NaN, which is no JSON
            return _READER.validate_python(values)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise ExplainError(f"this is not an explanation that this version of bridge reads ({first}); explain again") from None

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        return render_html(self)


_READER = TypeAdapter(Explanation)


@torch.no_grad()
def explain(
    coupling: Coupling,
    prompt: str,
    *,
    target: str | None = None,
    contrast: str | None = None,
    seed: int = 0,
    reference_bt: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    stage: Callable[[Answered | Drawn], None] | None = None,
) -> Explanation:
    """Explain the dense model's next token after a prompt, or why it prefers `target` to `contrast`.

    reference_bt, tokens over which corpus means are taken, is by default the coupling's own; what is computed from them is kept
    with the coupling. progress is told the phases, stage what is known so far: an Answered, then a Drawn. Either may raise to
    end the work. Raises ExplainError.
    """
    say, hand_over = progress or (lambda _: None), stage or (lambda _: None)
    dense, sparse = coupling.dense, coupling.sparse
    reference_bt = coupling.reference_bt if reference_bt is None else reference_bt
    if reference_bt is None or not reference_bt.numel():
        raise ExplainError("the coupling holds no reference text to take corpus means over; pass reference_bt, blocks of tokens")
    tokens_t = prompt_tokens(coupling, prompt)
    say("tokens: both models' answers")
    dense_v = dense.run(tokens_t[None]).logits_btv[0, -1].float()
    sparse_v = sparse.run(tokens_t[None], last_only=True).logits_btv[0, -1]
    question = _question(coupling, tokens_t, dense_v, target, contrast)
    tokenizer = dense.tokenizer
    answered = Answered(
        prompt=prompt,
        tokens=tuple(token_of(tokenizer, token) for token in tokens_t.tolist()),
        target=token_of(tokenizer, question.target),
        contrast=token_of(tokenizer, question.contrast),
        dense=top_answers(tokenizer, dense_v),
        sparse=top_answers(tokenizer, sparse_v),
        dense_difference=float(question.difference(dense_v)),
        sparse_difference=float(question.difference(sparse_v)),
    )
    hand_over(answered)

    used_bt = reference_bt[: max(1, REFERENCE_TOKENS // reference_bt.shape[1])].to(sparse.device)
    say(f"means: {used_bt.numel():,} tokens of reference text")
    ablations = Ablations(sparse, question, coupling.once("means", used_bt, lambda: corpus_means(sparse, used_bt)))
    found = find_circuit(ablations, seed=seed, progress=say)
    say("edges")
    edges = edge_table(sparse, found.circuit)
    levels, level_f = nested_circuits(ablations, found.kept_f)
    circuit = {
        "nodes": _explained(ablations, found, level_f, node_labels(coupling, found.circuit.nodes)),
        "edges": tuple(
            ExplainedEdge(str(e.source), str(e.target), e.kind, e.weight, e.effect) for e in edges.strongest(MOST_EDGES)
        ),
        "counts": _counts(found, edges),
        "searched": Searched(found.n_active, found.n_candidates, found.silenced, found.complete),
        "levels": levels,
    }
    faithfulness = validate(
        coupling, ablations, found.circuit, used_bt, seed=seed, progress=say,
        sufficient=lambda *measures: hand_over(Drawn(**circuit, sufficiency=measures)),
    )  # fmt: skip
    say("attention")
    attention = explain_attention(sparse, found.circuit)
    return Explanation(
        **vars(answered),
        faithfulness=faithfulness,
        **circuit,
        attention=attention.heads,
        attention_left_out=attention.left_out,
        provenance=_provenance(coupling, used_bt, seed),
    )


def prompt_tokens(coupling: Coupling, prompt: str) -> Tensor:
    """tokens_t of a prompt under the dense model's tokenizer. Raises ExplainError where it is empty or too long."""
    tokenizer = coupling.dense.tokenizer
    if tokenizer is None:
        raise ExplainError(f"the dense model {coupling.dense.name!r} has no tokenizer, so no text can be read; load it with one")
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not any(token not in tokenizer.all_special_ids for token in ids):
        raise ExplainError("the prompt is empty; give the text whose next token is to be explained")
    limits = [limit for limit in (coupling.context, coupling.dense.context) if limit is not None]
    if len(ids) > min(limits):
        raise ExplainError(f"the prompt is {len(ids)} tokens long, and the context is {min(limits)}; give its last part only")
    return torch.tensor(ids, device=coupling.dense.device)


def _question(coupling: Coupling, tokens_t: Tensor, dense_v: Tensor, target: str | None, contrast: str | None) -> Question:
    first, second = dense_v.topk(2).indices.tolist()
    chosen = first if target is None else one_token(coupling, target, "target")
    against = (second if chosen == first else first) if contrast is None else one_token(coupling, contrast, "contrast")
    if chosen == against:
        whose = "the dense model's own answer" if target is None else f"both {target!r}"
        raise ExplainError(f"target and contrast are {whose}; name two different tokens")
    return Question(tokens_t, chosen, against)


def one_token(coupling: Coupling, text: str, role: str) -> int:
    """The id of a text that is a single token; role is what it is called where it is refused. Raises ExplainError."""
    tokenizer = coupling.dense.tokenizer
    assert tokenizer is not None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if len(ids) != 1:
        pieces = " ".join(_shown(token_of(tokenizer, token).text) for token in ids) or "none"
        remedy = f"; give one, such as {_shown(token_of(tokenizer, ids[0]).text)}" if ids else "; give one"
        raise ExplainError(f"{role} {text!r} is {len(ids)} tokens ({pieces}), and only a single token can be explained{remedy}")
    if ids[0] == tokenizer.unk_token_id:
        raise ExplainError(f"{role} {text!r} is not in the dense model's vocabulary; give one of its tokens")
    return ids[0]


def token_of(tokenizer: Any, token: int) -> Token:
    """A token with its text."""
    return Token(token, token_text(tokenizer, token))


def top_answers(tokenizer: Any, logits_v: Tensor) -> tuple[Answer, ...]:
    """The likeliest next tokens, at most 5."""
    best = logits_v.softmax(-1).topk(5)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Answer(token_of(tokenizer, token), probability) for token, probability in pairs)


def _explained(ablations: Ablations, found: Found, level_f: Tensor, labels: dict[str, str]) -> tuple[ExplainedNode, ...]:
    question, kept_f = found.circuit.question, found.kept_f
    place_k = kept_f.nonzero().flatten()
    if not len(place_k):
        return ()
    slope_1f, _ = ablations.slopes(kept_f[None], question.difference)
    most = max(1, 2 * DELETED_TOKENS // ablations.space.n_tokens)  # a deletion runs half of the model, on average
    measured_k = slope_1f[0, place_k].abs().argsort(descending=True, stable=True)[:most]
    whole_1v, without_kv = ablations.logits(kept_f[None]), ablations.logits_without(kept_f, place_k[measured_k])
    rise_k = (ablations.kl(without_kv) - ablations.kl(whole_1v)).tolist()
    lost_k = (question.difference(whole_1v) - question.difference(without_kv)).tolist()
    measured = dict(zip(measured_k.tolist(), zip(rise_k, lost_k, strict=True), strict=True))
    columns = (each_f[place_k].tolist() for each_f in (ablations.value_f, ablations.mean_f, level_f))
    nodes = []
    for k, (node, value, mean, level) in enumerate(zip(found.circuit.nodes, *columns, strict=True)):
        at, position = node.location, node.position or 0
        importance, effect = measured.get(k, (None, None))
        where = (str(node), node.name, at.layer, at.kind, node.index, position)
        label = labels.get(f"{'+' if value > 0 else '-' if value < 0 else ''}{node.name}", labels.get(node.name))
        nodes.append(ExplainedNode(*where, value, mean, importance, effect, level, label))
    return tuple(nodes)


def _counts(found: Found, edges: EdgeTable) -> Counts:
    entries = (edges.count("embedding"), edges.count("unembedding"), edges.count("bigram"))
    return Counts(len(found.circuit.nodes), edges.count(*COUNTED), edges.distinct(*COUNTED), *entries)


def _provenance(coupling: Coupling, used_bt: Tensor, seed: int) -> Provenance:
    digest = hashlib.sha256(used_bt.cpu().to(torch.int32).numpy().tobytes()).hexdigest()
    source = coupling.recipe.data.source
    return Provenance(
        dense=coupling.dense.name,
        dense_fingerprint=coupling.dense.fingerprint(),
        coupling=coupling.path,
        l0=coupling.recipe.sparsity.l0,
        seed=seed,
        version=version("bridge"),
        reference=f"{used_bt.numel()} tokens of held-out text ({source}), sha256 {digest[:12]}",
        coupling_fingerprint=sparse_fingerprint(coupling.sparse),
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
        *((_render_answer(explanation),) if answer else ()),
        _wrap("VERDICT   ", f"{explanation.faithfulness.verdict.upper()}. {' '.join(explanation.faithfulness.reasons)}", width),
        _render_circuit(explanation, width),
        _render_attention(explanation, width),
        _render_evidence(explanation),
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
    return "\n".join(_cut(line, width) for line in _render_answer(answered))


def _render_answer(explanation: Answered | Explanation) -> list[str]:
    def listed(answers: tuple[Answer, ...]) -> str:
        return "  ".join(f"{_shown(each.token.text)} {each.probability:.1%}" for each in answers[:4])

    differences = explanation.dense_difference, explanation.sparse_difference
    own = "" if explanation.target.id == explanation.dense[0].token.id else ", which is not the dense model's answer"
    return [
        f"prompt    {_shown(explanation.prompt)}  ({len(explanation.tokens)} tokens)",
        f"dense     {listed(explanation.dense)}",
        f"sparse    {listed(explanation.sparse)}  {'agrees' if explanation.agree else 'DISAGREES'}",
        f"question  why {_shown(explanation.target.text)} rather than {_shown(explanation.contrast.text)}{own}",
        "          D is {:+.2f} in the dense model, {:+.2f} in the sparse one".format(*differences),
    ]


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
        lines += [f"  {position:>3}  {_shown(token.text)}"] if here else []
        for node in here:
            value = f"{node.activation:+.2f}" if node.activation else "off"
            arrows = ", ".join(_input(edge, position) for edge in inputs.get(node.id, [])[:LISTED_EDGES])
            lines.append(
                f"        {node.name:<{longest}}  {value:>7}  {node.mean:>+7.2f}  {node.effect or 0:>+7.2f}   {arrows}".rstrip()
            )
            lines += [f"            {node.label}"] if node.label else []
    last = len(explanation.tokens) - 1
    answer = [_input(edge, last) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    lines += _wrap("        D from ", ", ".join(answer[:8]), width)
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
    return f"{_shown(explanation.tokens[read.position].text)}@{read.position} {read.weight:.2f}"


def _render_evidence(explanation: Explanation) -> list[str]:
    faithfulness = explanation.faithfulness
    rows = [("EVIDENCE", "here", "control", "aim", "met"), *(_evidence(measure) for measure in faithfulness.measures)]
    sizes = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(f"{cell:<{size}}" for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    if faithfulness.profile_interval is not None:
        low, high = faithfulness.profile_interval
        interval = f"95% interval {low:.2f} to {high:.2f}, p {faithfulness.profile_p:.2g}"
        lines.append(f"    {interval}; {faithfulness.profile.note}")
    return lines


def _evidence(measure: Measure) -> tuple[str, str, str, str, str]:
    control = measure.control
    beside = "none" if control is None else f"{control.what} {control.mean:.3f}"
    if control is not None and control.bar_is != "mean":
        beside += f" ({control.bar_is} {control.bar:.3f})"
    value = "-" if measure.value is None else f"{measure.value:.3f}"
    return f"  {measure.name}", value, beside, measure.aim, {True: "yes", False: "NO", None: "?"}[measure.passed]


def _wrap(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))


def _shown(text: str) -> str:
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
            f"{node.position} {_shown(explanation.tokens[node.position].text)}",
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
        display.fold("evidence", display.table(("", "here", "control", "aim", "met"), map(_evidence, faithfulness.measures))),
    )


def _answer_row(model: str, answers: tuple[Answer, ...], difference: float) -> tuple[str, str, str]:
    told = "  ".join(f"{_shown(each.token.text)} {each.probability:.1%}" for each in answers[:4])
    return model, told, f"{difference:+.2f}"
