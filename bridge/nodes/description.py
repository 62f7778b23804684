"""The page of a node: its contexts in the text, its weights, the dense direction that it writes, and a one-line summary.

A node's write w is the vector that one unit of it adds to the residual stream, without later AbsTopKs and the scale of a norm:

    attn_out, mlp_out    the unit vector of its channel           arrives at the site after its sublayer's
    mlp_act, v           its column of W_down, W_o                arrives at the same site
    attn_in, mlp_in      no write; w is the unit vector of the channel that the node reads, at its sublayer's own site
    q, k, mlp_gate       no write: they decide which positions are attended to, and which neurons pass

    promotes     tokens of the largest and the smallest entries of U w, U the sparse unembedding
                 (none if the sparse model is a span, because then only the dense model has an embedding and an unembedding)
    embedded     for attn_in and mlp_in instead: tokens of such entries of E_i, which the embedding writes to channel i
    dense        d = decode_change(w) by the bridge at that site, and its logit lens V d, V the dense model's output embedding
                 (without the final norm's gain, which cannot be found generically), if the model gives access to V

Links are nonzero weights into and out of the node, strongest first, then links without a weight: `residual`, a channel written
and read later (also by the embedding and the unembedding); `score`, q and k channels that are multiplied; `gate`, a neuron and
its gate.

The summary is made by rule, from the contexts of the sign whose values are larger in sum: the token that two and at least half of
them share at, before or after the position, else the kind of token at it; then the promoted tokens. It is no evidence beyond this
text.

Shape legend: n nodes of a location, s sparse width, d dense width, v vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.display.columns import wrap
from bridge.huggingface.prompts import Prompts
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import EMBEDDING, Node
from bridge.models.schema import GATE, KEY_KINDS, READ_KINDS, WRITE_KINDS
from bridge.models.span import SparseSpan
from bridge.models.sparse import Location
from bridge.models.store import as_json
from bridge.nodes.statistics import Context, NodeFacts, stored_facts

TOKENS = 6  # number of promoted, demoted or embedded tokens that are listed
LINKS = 8  # number of links listed in each direction
BEFORE, AFTER = 12, 5  # number of tokens of a context on each side of the position


@dataclass(frozen=True)
class TokenScore:
    """A token of the vocabulary and its score."""

    id: int
    text: str
    score: float


@dataclass(frozen=True)
class Excerpt:
    """A context as text: the node's value at `token`, and its quantile among the node's nonzero values (None: an extreme)."""

    value: float
    quantile: float | None
    row: int
    position: int
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Link:
    """A link into or out of a node, and the name of the node at its other end; `weight` is None if it has none."""

    node: str
    kind: str
    weight: float | None


@dataclass(frozen=True)
class DenseDirection:
    """The dense residual direction of a node's write, its site, and its tokens by the dense unembedding (None if not found)."""

    site: int
    read_by: str
    direction: tuple[float, ...]
    promotes: tuple[TokenScore, ...] | None
    demotes: tuple[TokenScore, ...] | None


@dataclass(frozen=True)
class NodePage:
    """All that is known about a node; `tokens` is "promoted" or "embedded", the kind of the listed tokens, or "none"."""

    name: str
    head: int | None
    n_tokens: int
    mean: float
    deviation: float
    active: float
    high: tuple[Excerpt, ...]
    low: tuple[Excerpt, ...]
    quantiles: tuple[Excerpt, ...]
    tokens: str
    promotes: tuple[TokenScore, ...]
    demotes: tuple[TokenScore, ...]
    dense: DenseDirection | None
    inputs: tuple[Link, ...]
    outputs: tuple[Link, ...]
    n_inputs: int
    n_outputs: int
    label: str
    summary: str

    def to_json(self) -> dict[str, Any]:
        """Return the page as plain JSON values."""
        return as_json(self)

    def __str__(self) -> str:
        return render_page(self)


@torch.no_grad()
def describe_node(coupling: CoupledModels, facts: NodeFacts, node: Node) -> NodePage:
    """Make the page of a node from the facts collected on text and from the coupling's weights."""
    sparse, prompts = coupling.sparse, coupling.dense.prompts
    at, index = node.location, node.index
    mean, second = (float(x_n[index]) for x_n in (facts.mean(at), facts.second_moment(at)))
    kind, promotes, demotes = _tokens(coupling, node)
    inputs, outputs = (sorted(links, key=_strength) for links in (_inputs(coupling, node), _outputs(coupling, node)))
    label, summary = _summary(coupling, facts, node)
    contexts = {"high": facts.extremes(node, "high"), "low": facts.extremes(node, "low"), "quantiles": facts.quantiles(node)}
    return NodePage(
        name=node.name,
        head=index // sparse.channels if at.kind == "q" or (at.kind in KEY_KINDS and sparse.group == 1) else None,
        n_tokens=facts.n_tokens,
        mean=mean,
        deviation=max(0.0, second - mean * mean) ** 0.5,
        active=float(facts.active(at)[index]),
        **{name: tuple(_excerpt(prompts, facts.tokens_bt, each) for each in found) for name, found in contexts.items()},
        tokens=kind,
        promotes=promotes,
        demotes=demotes,
        dense=_dense(coupling, node),
        inputs=tuple(inputs[:LINKS]),
        outputs=tuple(outputs[:LINKS]),
        n_inputs=len(inputs),
        n_outputs=len(outputs),
        label=label,
        summary=summary,
    )


@torch.no_grad()
def node_labels(coupling: CoupledModels, nodes: Iterable[Node]) -> dict[str, str]:
    """Return a short label for each channel, by name without position, from facts stored with the coupling; {} if none are.

    Labels made from a channel's positive or negative values alone have + or - before the name, if the channel had such values.
    """
    facts = stored_facts(coupling)
    if facts is None:
        return {}
    channels = {Node(node.location, node.index) for node in nodes if node.location in facts.parts}
    labels: dict[str, str] = {}
    for node in sorted(channels):
        labels[node.name] = _summary(coupling, facts, node)[0]
        if facts.extremes(node, "high"):
            labels[f"+{node.name}"] = _summary(coupling, facts, node, "high")[0]
        if facts.extremes(node, "low"):
            labels[f"-{node.name}"] = _summary(coupling, facts, node, "low")[0]
    return labels


# -- writes, reads and links --------------------------------------------------------------------------------------------------


def write_vector(coupling: CoupledModels, node: Node) -> tuple[int, Tensor] | None:
    """Return (site, write_s), the vector that one unit of a node adds to the sparse residual or reads; None for q, k and gates.

    A write that passes through a norm is given up to that norm's scale.
    """
    sparse, at, index = coupling.sparse, node.location, node.index
    site = sparse.site(at)
    if at.kind in ("q", "k", GATE):
        return None
    if at.kind in ("mlp_act", "v"):
        matrix, kind = ("down", "mlp_out") if at.kind == "mlp_act" else ("o", "attn_out")
        weight_ji = sparse.get_parameter(f"blocks.{at.layer}.{matrix}.weight")
        write_s = weight_ji[:, sparse.column_nodes(matrix) == index].sum(1)  # heads that share a value are summed
        gain = sparse.get_parameter(f"blocks.{at.layer}.gains.{kind}") if sparse.has_write_norm(at.layer, kind) else 1
        return site + 1, write_s * gain
    unit_s = torch.zeros(sparse.width, device=sparse.device, dtype=sparse.unembedding.weight.dtype)
    unit_s[index] = 1
    return site + (at.kind in WRITE_KINDS), unit_s


def _tokens(coupling: CoupledModels, node: Node) -> tuple[str, tuple[TokenScore, ...], tuple[TokenScore, ...]]:
    """Return the kind of tokens, those with the largest scores above 0, and those with the smallest scores below 0."""
    sparse, prompts = coupling.sparse, coupling.dense.prompts
    if isinstance(sparse, SparseSpan):
        return "none", (), ()
    if node.location.kind in READ_KINDS:
        return "embedded", *_ends(prompts, sparse.embedding[:, node.index])
    found = write_vector(coupling, node)
    return ("none", (), ()) if found is None else ("promoted", *_ends(prompts, sparse.unembedding.weight @ found[1]))


def _dense(coupling: CoupledModels, node: Node) -> DenseDirection | None:
    found = write_vector(coupling, node)
    if found is None:
        return None
    site, write_s = found
    direction_d = coupling.bridges[site].decode_change(write_s.to(coupling.bridges[site].decoder.weight)).float()
    lens_vd = _output_embedding(coupling)
    lens_v = None if lens_vd is None else lens_vd.float() @ direction_d.to(lens_vd.device)
    promotes, demotes = (None, None) if lens_v is None else _ends(coupling.dense.prompts, lens_v)
    return DenseDirection(site, coupling.dense.readers[site], tuple(direction_d.tolist()), promotes, demotes)


def _output_embedding(coupling: CoupledModels) -> Tensor | None:
    """Return the dense model's output embedding, a row per token; None if the model gives no such matrix of its width."""
    try:
        weight = getattr(coupling.dense.model.get_output_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != coupling.dense.width:
        return None
    return weight.detach()[: coupling.dense.vocabulary]


def _ends(prompts: Prompts, score_v: Tensor) -> tuple[tuple[TokenScore, ...], tuple[TokenScore, ...]]:
    """Return the tokens with the largest scores above 0 and those with the smallest below 0; among equals, lower ids first."""
    ends = []
    for sign in (1, -1):
        id_k = (sign * score_v).argsort(descending=True, stable=True)[:TOKENS].tolist()
        scored = [(token, float(score_v[token])) for token in id_k]
        ends.append(tuple(TokenScore(token, prompts.text(token), s) for token, s in scored if s * sign > 0))
    return ends[0], ends[1]


def _strength(link: Link) -> float:
    return -abs(link.weight) if link.weight is not None else 0.0


def _entries(weight_n: Tensor, location: Location, node_n: Tensor | None = None) -> Iterator[Link]:
    index_k = weight_n.nonzero().flatten()
    node_k = index_k if node_n is None else node_n[index_k]
    for index, weight in zip(node_k.tolist(), weight_n[index_k].tolist(), strict=True):
        yield Link(Node(location, index).name, "weight", weight)


def _inputs(coupling: CoupledModels, node: Node) -> Iterator[Link]:
    sparse, at = coupling.sparse, node.location
    for name, (source, target) in sparse.matrices.items():
        if target == at.kind:
            weight_i = sparse.get_parameter(f"blocks.{at.layer}.{name}.weight")[node.index]
            yield from _entries(weight_i, Location(at.layer, source), sparse.column_nodes(name))
    if at.kind == "mlp_act" and sparse.form.gated:
        yield Link(Node(Location(at.layer, GATE), node.index).name, "gate", None)
    if at.kind in READ_KINDS:
        if isinstance(sparse, SparseSpan) or sparse.embedding[:, node.index].any():
            yield Link(Node(EMBEDDING, node.index).name, "residual", None)
        for other in sparse.locations():
            if other.kind in WRITE_KINDS and sparse.site(other) < sparse.site(at):
                yield Link(Node(other, node.index).name, "residual", None)


def _outputs(coupling: CoupledModels, node: Node) -> Iterator[Link]:
    sparse, at = coupling.sparse, node.location
    for name, (source, target) in sparse.matrices.items():
        if source == at.kind:
            weight_ji = sparse.get_parameter(f"blocks.{at.layer}.{name}.weight")
            for column in (sparse.column_nodes(name) == node.index).nonzero().flatten().tolist():
                yield from _entries(weight_ji[:, column], Location(at.layer, target))
    if at.kind == GATE:
        yield Link(Node(Location(at.layer, "mlp_act"), node.index).name, "gate", None)
    if at.kind in ("q", "k"):
        head, channel = divmod(node.index, sparse.channels)
        pairs = len(sparse.frequencies(at.layer))
        partners = {channel, (channel + pairs) % (2 * pairs)} if channel < 2 * pairs else {channel}
        other = Location(at.layer, "k" if at.kind == "q" else "q")
        heads = [head // sparse.group] if at.kind == "q" else range(head * sparse.group, (head + 1) * sparse.group)
        for with_head in heads:
            for partner in sorted(partners):
                yield Link(Node(other, with_head * sparse.channels + partner).name, "score", None)
    if at.kind in WRITE_KINDS:
        for other in sparse.locations():
            if other.kind in READ_KINDS and sparse.site(other) > sparse.site(at):
                yield Link(Node(other, node.index).name, "residual", None)
        if sparse.unembedding.weight[:, node.index].any():
            yield Link(f"unembedding[{node.index}]", "residual", None)


# -- summary --------------------------------------------------------------------------------------------------------------------


def _summary(coupling: CoupledModels, facts: NodeFacts, node: Node, side: str | None = None) -> tuple[str, str]:
    """Return (label, summary), short and long, of the contexts on one side (default: the stronger) and the node's effect."""
    prompts = coupling.dense.prompts
    high, low = facts.extremes(node, "high"), facts.extremes(node, "low")
    if not high and not low:
        return "never active", f"never active in {facts.n_tokens:,} tokens"
    negative = side == "low" or (side is None and sum(context.value for context in (*high, *low)) < 0)
    contexts = low if negative else high
    shared: list[tuple[str, int]] = []  # a phrase, and the number of contexts for which it is true
    for word, offset in (("at ", 0), ("after ", -1), ("before ", 1)):
        tokens = (_token_at(facts.tokens_bt, context, offset) for context in contexts)
        known = Counter(token for token in tokens if token is not None)
        token, count = min(known.items(), key=lambda item: (-item[1], item[0]), default=(0, 0))
        if count >= 2 and 2 * count >= len(contexts):
            shared.append((f"{word}{prompts.text(token)!r}", count))
        elif not offset and (sort := _token_kind([prompts.text(token) for token in known])):
            shared.append((f"at {sort}", len(contexts)))
    if len(contexts) > 1 and len({context.position for context in contexts}) == 1:
        shared.append((f"at position {contexts[0].position}", len(contexts)))
    kind, promotes, demotes = _tokens(coupling, node)
    does = [repr(each.text) for each in (demotes if negative else promotes)]
    verb = {"promoted": "promotes", "embedded": "embedded by", "none": ""}[kind]
    sign = "negative " if negative else ""
    seen = " ".join(phrase for phrase, _ in shared) or "no common token"
    label = f"{sign}{seen}{f'; {verb} {does[0]}' if does else ''}"
    context = ", ".join(f"{phrase} ({count}/{len(contexts)})" for phrase, count in shared) or "no common token"
    tail = f"; {verb} {', '.join(does[:3])}" if does else ""
    share = float(facts.active(node.location)[node.index])
    return label, f"{sign}{context}{tail}; active at {share:.1%} of {facts.n_tokens:,} tokens"


def _token_kind(texts: list[str]) -> str:
    """Return the kind of token that all the texts are, or '' if there is none."""
    sorts = (
        ("whitespace", lambda text: not text.strip()),
        ("numbers", lambda text: text.strip().isdigit()),
        ("words", lambda text: text[:1] == " " and text.strip().isidentifier()),
        ("parts of words", lambda text: text.isidentifier()),
        ("names", lambda text: text.strip().isidentifier()),
        ("punctuation", lambda text: bool(text.strip()) and not any(letter.isalnum() for letter in text)),
    )
    return next((name for name, fits in sorts if texts and all(map(fits, texts))), "")


def _token_at(tokens_bt: Tensor, context: Context, offset: int) -> int | None:
    place = context.position + offset
    return int(tokens_bt[context.row, place]) if 0 <= place < tokens_bt.shape[1] else None


def _excerpt(prompts: Prompts, tokens_bt: Tensor, context: Context) -> Excerpt:
    row, position = tokens_bt[context.row].tolist(), context.position
    texts = [prompts.text(token) for token in row[max(0, position - BEFORE) : position + 1 + AFTER]]
    at = min(position, BEFORE)
    before, after = "".join(texts[:at]), "".join(texts[at + 1 :])
    return Excerpt(context.value, context.quantile, context.row, position, before, texts[at], after)


# -- as text ----------------------------------------------------------------------------------------------------------------


def render_page(page: NodePage, width: int = 100, description: str | None = None) -> str:
    """Return a node's page for a terminal of `width` columns; text from models, corpora and endpoints is escaped as in Python."""
    head = "" if page.head is None else f"  (head {page.head})"
    lines = [f"{page.name}{head}", *wrap("what      ", page.summary, width)]
    if description is not None:
        lines += wrap("described ", repr(description), width)
    lines.append(f"values    mean {page.mean:+.3g}, deviation {page.deviation:.3g}, nonzero at {page.active:.1%} of tokens")
    for name, excerpts in (("highest", page.high), ("lowest", page.low), ("quantiles", page.quantiles)):
        for place, excerpt in enumerate(excerpts):
            quantile = "" if excerpt.quantile is None else f" {excerpt.quantile:.0%}"
            start = f"{'' if place else name:<10}{excerpt.value:>+9.3g}{quantile}  "
            lines.append(start + _shown(excerpt, width - len(start)))
    if page.tokens != "none":
        more, less = ("promotes", "demotes") if page.tokens == "promoted" else ("embedded+", "embedded-")
        lines += _listed(f"{more:<10}", _scores(page.promotes), width) + _listed(f"{less:<10}", _scores(page.demotes), width)
    if page.dense is not None:
        length = sum(x * x for x in page.dense.direction) ** 0.5
        lines.append(f"dense     direction of length {length:.3g} at site {page.dense.site}, read by {page.dense.read_by}")
        if page.dense.promotes is None:
            lines.append("          no tokens, because the dense model does not give its output embedding")
        else:
            lines += _listed("        + ", _scores(page.dense.promotes), width)
            lines += _listed("        - ", _scores(page.dense.demotes or ()), width)
    for name, links, count in (("from", page.inputs, page.n_inputs), ("to", page.outputs, page.n_outputs)):
        links_text = [f"{link.node} {link.kind if link.weight is None else f'{link.weight:+.2g}'}" for link in links]
        more = [f"and {count - len(links):,} more"] if count > len(links) else []
        lines += _listed(f"{name:<10}", [*links_text, *more], width)
    return "\n".join(lines)


def _shown(excerpt: Excerpt, width: int) -> str:
    """Return before, token and after as Python literals; before is cut from the left, and after from the right, to fit."""
    token, before, after = repr(excerpt.token), excerpt.before, excerpt.after
    while len(repr(before)) + len(token) + len(repr(after)) + 8 > width and (before or after):
        before, after = (before[1:], after) if len(before) >= len(after) else (before, after[:-1])
    return f"{before!r} >>{token}<< {after!r}"


def _scores(tokens: tuple[TokenScore, ...]) -> list[str]:
    return [f"{each.text!r} {each.score:+.2g}" for each in tokens]


def _listed(head: str, items: list[str], width: int) -> list[str]:
    """Return lines with the items after the head; no item is broken across lines."""
    lines = [head]
    for item in items or ["nothing"]:
        if len(lines[-1]) + len(item) + 2 > width and lines[-1].strip():
            lines.append(" " * 10)
        lines[-1] += item if len(lines[-1]) <= len(head) else f"  {item}"
    return lines
