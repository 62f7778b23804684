"""Edges of a circuit's nodes, with what each adds to its target and to the answer.

An edge is a way in which one kept node reaches another directly, with everything between them held as it is in S_C. Its weight is
how much the source's change from its mean adds to the target's value before AbsTopK (for MLP neurons, or their gates, before the
nonlinearity). If a matrix's output goes through a norm, or is multiplied by a gate, that factor is held (`flow.output_factor`):

    weight = d target / d source * (a_source - m_source)

    weight       W_ji (a_i - m_i)            attn_in -> q, k, v;  mlp_in -> mlp_gate, mlp_act -> mlp_out           exact
    gate         (W_up r + b)_i (a_i - m_i)  mlp_gate -> mlp_act, same neuron, the output of up being held         exact
    value        P_pp' W_ji (a_i - m_i)      v at p' -> attn_out at p, P the attention pattern of S_C              exact
    score        by gradient through P       q at p, k at p' -> attn_out at p, the values being held               first order
    residual     (a_i - m_i) / rms           attn_out, mlp_out -> attn_in, mlp_in of a later sublayer, same channel, rms held
    embedding    (E_i - mean E_i) / rms      the token's nonzero entry -> attn_in, mlp_in, same channel
    error        (e_i - mean e_i) / rms      a kept error, one node for a site and token -> attn_in, mlp_in there and later
                 read_s . (e - mean e) / rms     an error at the last token -> answer;   read_v . (e - mean e)  on the logits
    unembedding  read_i (a_i - m_i) / rms    a write (or embedding entry) at the last position -> answer; in a span, at any, and
                                             read is dd / d the last residual through the rest of the dense model, first order
    bigram       read_v . B                  the last token -> answer, in full, because it is part of every circuit

read_v = dd / d logits in S_C and read_s = read_v U (`Flow.answer_ts`, which includes 1 / rms): against one other token they are
exact (U_answer - U_contrast), against all others first order (`flow`). Biases are constants and have no edges.

Only `weight` and `value` edges are nonzero weights between two nodes and are counted as edges. Embedding, unembedding and bigram
entries are counted by their own names, the others are only drawn. `effect` is the weight times dd / d target, which makes edges
into different targets comparable; it is 0 if AbsTopK makes the target 0 in S_C. `attention` splits a score into pairs of
channels.

Shape legend: r attn_out node, t token, n nodes of a location, e edge, s sparse width, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import spread_indices
from bridge.circuits.subject import SparseSubject
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.graph.flow import Flow, flow_through
from bridge.models.circuit import BIGRAM, COUNTED, EMBEDDING, KINDS, Edge, EdgeKind, Node, NodeSpace
from bridge.models.residual import Enter
from bridge.models.schema import ERROR, GATE, READ_KINDS, WRITE_KINDS
from bridge.models.sparse import Location

_ATTENTION_TARGETS = 512  # attn_out nodes that read a head, whose gradients are computed at once


class Ends:
    """Numbers for the ends of edges: first the indices of nodes and errors in one row, then embedding, bigram and answer."""

    def __init__(self, flow: Flow) -> None:
        space = flow.masked.space
        wide = {EMBEDDING: flow.sparse.width, BIGRAM: flow.sparse.vocabulary, flow.answer: flow.sparse.vocabulary}
        self.n_nodes, self.n_tokens = space.size, space.n_tokens
        self._space = NodeSpace({**space.sizes, **wide}, space.n_tokens)

    def number(self, location: Location, index_e: Tensor, position_e: Tensor) -> Tensor:
        """Return end_e of the channels index_e of a location at the positions position_e."""
        return self._space.first[location] + position_e * self._space.sizes[location] + index_e

    def without_position(self, end_e: Tensor) -> Tensor:
        """Return the numbers of ends without their positions, that is, of the same ends at position 0."""
        first_l, size_l = (torch.tensor([*of.values()], device=end_e.device) for of in (self._space.first, self._space.sizes))
        at_e = torch.searchsorted(first_l, end_e, right=True) - 1
        return first_l[at_e] + (end_e - first_l[at_e]) % size_l[at_e]

    def node(self, end: int) -> Node:
        """Return the node (or entry, or answer) with a number."""
        return self._space.node(end)

    def within(self, location: Location, end_e: Tensor) -> Tensor:
        """Return the mask of the ends that are in a location."""
        first = self._space.first[location]
        return (end_e >= first) & (end_e < first + self._space.sizes[location] * self.n_tokens)

    def parts(self, location: Location, end_e: Tensor) -> tuple[Tensor, Tensor]:
        """Return (position_e, index_e) of ends in a location."""
        place_e, n = end_e - self._space.first[location], self._space.sizes[location]
        return place_e // n, place_e % n

    def inputs(self, end_e: Tensor) -> Tensor:
        """Return token_e, the position whose embedding or bigram entry an end is; -1 for nodes, errors and the answer."""
        token_e = torch.full_like(end_e, -1)
        for location in (EMBEDDING, BIGRAM):
            position_e, _ = self.parts(location, end_e)
            token_e = torch.where(self.within(location, end_e), position_e, token_e)
        return token_e


@dataclass(frozen=True, eq=False)
class Edges:
    """Edges of one prompt's circuit in columns, the largest effects on the answer first; source_e and target_e are `Ends`.

    number counts the edges of each kind, including those weaker than the ones that were asked for; weights counts, for `COUNTED`
    kinds, the edges that differ by more than their positions: a weight counts once wherever it is used.
    """

    ends: Ends
    kind_e: Tensor
    source_e: Tensor
    target_e: Tensor
    weight_e: Tensor
    effect_e: Tensor
    number: Mapping[EdgeKind, int]
    weights: Mapping[EdgeKind, int]

    @cached_property
    def strongest(self) -> tuple[Edge, ...]:
        """The edges as `Edge` values."""
        nodes = {end: self.ends.node(end) for end in torch.cat([self.source_e, self.target_e]).unique().tolist()}
        columns = (self.kind_e, self.source_e, self.target_e, self.weight_e, self.effect_e)
        rows = zip(*(column_e.tolist() for column_e in columns), strict=True)
        return tuple(Edge(nodes[s], nodes[t], KINDS[kind], weight, effect) for kind, s, t, weight, effect in rows)

    def select(self, kept_e: Tensor | slice) -> Edges:
        """Return the edges of a mask or a slice; their counts are those of the listed edges."""
        kind_e, source_e, target_e, weight_e, effect_e = (
            column_e[kept_e] for column_e in (self.kind_e, self.source_e, self.target_e, self.weight_e, self.effect_e)
        )
        number: dict[EdgeKind, int] = {
            kind: int((kind_e == place).sum()) for place, kind in enumerate(KINDS) if kind in self.number
        }
        weights: dict[EdgeKind, int] = {}
        for kind in self.weights:
            ends = torch.stack([self.ends.without_position(end_e[kind_e == KINDS.index(kind)]) for end_e in (source_e, target_e)])
            weights[kind] = len(ends.unique(dim=1).T)
        return Edges(self.ends, kind_e, source_e, target_e, weight_e, effect_e, number, weights)

    def count(self, *kinds: EdgeKind) -> int:
        """Return the number of edges of some kinds."""
        return sum(self.number.get(kind, 0) for kind in kinds)

    def distinct(self, *kinds: EdgeKind) -> int:
        """Return the number of weights that the edges of some kinds have."""
        return sum(self.weights.get(kind, 0) for kind in kinds)


@torch.no_grad()
def draw_edges(flow: Flow, most: int | None = None, progress: OnProgress = ignore_progress) -> Edges:
    """Return every edge between the circuit's nodes (see the module's docstring), or the `most` with the largest effects.

    progress is called between two locations, and may raise to end the work.
    """
    drawing = _EdgeCollector(flow, most)
    parts = (_weight_edges(flow), _gate_edges(flow), _attention_edges(flow, drawing), _residual_edges(flow), _answer_edges(flow))
    for edges in chain.from_iterable(parts):
        progress(Phase("edges"))
        drawing.add(edges)
    return drawing.edges()


@torch.no_grad()
def task_edges(masked: MaskedModel, kept_f: Tensor, most: int = 16) -> tuple[Edge, ...]:
    """Return every weight between the nodes of a task's circuit, largest effect first; an edge's weight is the entry itself.

    effect is what the weight adds to d over all positions, averaged over at most `most` of the prompts.
    """
    rows = spread_indices(len(masked.question), most).tolist()
    added: dict[tuple[Location, Location], Tensor] = {}
    for row in rows:
        alone = masked.on_prompt(row, by_position=True)
        masks = {at: kept_1n.expand(alone.n_tokens, -1) for at, kept_1n in masked.space.split(kept_f).items()}
        flow = flow_through(alone, alone.space.join(masks))
        for some in (*_weight_edges(flow), *_attention_edges(flow, _EdgeCollector(flow, None))):
            if some.kind in COUNTED:
                (source, from_e, _), (target, to_e, _) = some.source, some.target
                sizes = masked.space.sizes[target], masked.space.sizes[source]
                into_ji = added.setdefault((source, target), torch.zeros(sizes, device=kept_f.device))
                into_ji.index_put_((to_e, from_e), some.effect_e / len(rows), accumulate=True)
    kept, found = masked.space.split(kept_f), []
    for matrix in SparseSubject(masked.sparse, masked.means).matrices():
        kind: EdgeKind = "value" if matrix.source.kind == "v" else "weight"
        effect_ji = added.get((matrix.source, matrix.target), torch.zeros_like(matrix.weight_ji))
        for j, i in matrix.edges_between(kept).nonzero().tolist():
            ends = Node(matrix.source, i), Node(matrix.target, j)
            found.append(Edge(*ends, kind, float(matrix.weight_ji[j, i]), float(effect_ji[j, i])))
    return tuple(sorted(found, key=lambda edge: -abs(edge.effect)))


_End = tuple[Location, Tensor, Tensor]  # location, index_e, position_e


@dataclass(frozen=True, eq=False)
class _EdgeBatch:
    """Edges of one kind between two locations, with what each adds to its target and to d.

    If only the strongest are asked for, weaker ones may be left out. `number` counts all of them (None: none was left out), and
    used holds the indices (source_k, target_k) of all that are weights.
    """

    kind: EdgeKind
    source: _End
    target: _End
    weight_e: Tensor
    effect_e: Tensor
    number: int | None = None
    used: tuple[Tensor, Tensor] | None = None


class _EdgeCollector:
    """The strongest of the added edges. There can be ten million edges, of which a page shows some thousands."""

    def __init__(self, flow: Flow, most: int | None) -> None:
        self.ends, self.most, self.least = Ends(flow), most, 0.0  # least: an effect below it cannot be among them
        no_end, no_weight = flow.tokens_t[:0], flow.read_v[:0]
        self.parts: list[tuple[Tensor, ...]] = [(no_end, no_end, no_end, no_weight, no_weight)]
        self.number: dict[EdgeKind, int] = {}
        self.used: dict[tuple[EdgeKind, Location, Location], list[Tensor]] = {}

    def strong(self, effect: Tensor) -> Tensor:
        """Return the mask of the effects that may be among the strongest, NaN included."""
        return ~(effect.abs() < self.least)

    def add(self, some: _EdgeBatch) -> None:
        """Count edges, and keep those that may be among the strongest."""
        self.number[some.kind] = self.number.get(some.kind, 0) + (len(some.weight_e) if some.number is None else some.number)
        if some.kind in COUNTED:
            from_k, to_k = some.used or (some.source[1], some.target[1])
            key = some.kind, some.source[0], some.target[0]
            self.used.setdefault(key, []).append((from_k << 32 | to_k).unique())
        strong_k = self.strong(some.effect_e).nonzero().flatten()
        if len(strong_k):
            from_e, to_e = (self.ends.number(at, index_e, p_e)[strong_k] for at, index_e, p_e in (some.source, some.target))
            kind_e = torch.full_like(strong_k, KINDS.index(some.kind))
            self.parts.append((kind_e, from_e, to_e, some.weight_e[strong_k], some.effect_e[strong_k]))
        if self.most is not None and sum(len(part[0]) for part in self.parts) > 4 * self.most:
            self._drop_weak_edges(self.most)

    def _drop_weak_edges(self, most: int) -> None:
        columns = self._columns()
        size_e = columns[-1].abs()
        self.least = float(size_e.nan_to_num(torch.inf).topk(most).values[-1])
        strong_k = self.strong(size_e).nonzero().flatten()
        self.parts = [tuple(column[strong_k] for column in columns)]

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(column) for column in zip(*self.parts, strict=True))

    def edges(self) -> Edges:
        """Return the strongest edges, largest effect first, as many as were asked for."""
        columns = self._columns()
        order_e = columns[-1].abs().argsort(descending=True, stable=True)[: self.most]
        weights: dict[EdgeKind, int] = {}
        for (kind, _, _), parts in self.used.items():
            weights[kind] = weights.get(kind, 0) + len(torch.cat(parts).unique())
        kind_e, source_e, target_e, weight_e, effect_e = (column[order_e] for column in columns)
        return Edges(self.ends, kind_e, source_e, target_e, weight_e, effect_e, self.number, weights)


def _weight_edges(flow: Flow) -> Iterator[_EdgeBatch]:
    for name, (kind, to) in flow.sparse.matrices.items():
        for source in flow.locations(kind) if name != "o" else ():
            target, weight_ji = Location(source.layer, to), flow.weight(source.layer, name)
            from_tn, to_tn, passed_tj = flow.kept[source], flow.kept[target], flow.output_factor(target)
            column_k, row_k = (kept_tn.any(0).nonzero().flatten() for kept_tn in (from_tn, to_tn))
            row_w, column_w = weight_ji[row_k[:, None], column_k].nonzero().unbind(1)
            row_w, column_w = row_k[row_w], column_k[column_w]
            position, w = (from_tn[:, column_w] & to_tn[:, row_w]).nonzero().unbind(1)
            i, j = column_w[w], row_w[w]
            added_e = weight_ji[j, i] * flow.change[source][position, i]
            added_e = added_e if passed_tj is None else added_e * passed_tj[position, j]
            ends = (source, i, position), (target, j, position)
            yield _EdgeBatch("weight", *ends, added_e, added_e * flow.gradient[target][position, j])


def _gate_edges(flow: Flow) -> Iterator[_EdgeBatch]:
    for source in flow.locations(GATE):
        target = Location(source.layer, "mlp_act")
        position, i = (flow.kept[source] & flow.kept[target]).nonzero().unbind(1)
        added_e = flow.matrix_output(source.layer, "up")[position, i] * flow.change[source][position, i]
        yield _EdgeBatch(
            "gate", (source, i, position), (target, i, position), added_e, added_e * flow.gradient[target][position, i]
        )


def _attention_edges(flow: Flow, drawing: _EdgeCollector) -> Iterator[_EdgeBatch]:
    sparse, channels, group = flow.sparse, flow.sparse.channels, flow.sparse.group
    for target in flow.locations("attn_out"):
        sources = [Location(target.layer, kind) for kind in ("q", "k", "v")]
        q_1tn, k_1tn = (flow.value[source][None] for source in sources[:2])
        pattern_hts, scores_hts = (of(target.layer, q_1tn, k_1tn)[0] for of in (sparse.pattern, sparse.scores))
        local_hts = pattern_hts * sparse.score_gradient(scores_hts) / math.sqrt(channels)
        to_position_r, to_index_r = flow.kept[target].nonzero().unbind(1)
        write_rhc = flow.weight(target.layer, "o")[to_index_r].unflatten(-1, (-1, channels))
        if (passed_tj := flow.output_factor(target)) is not None:
            write_rhc = write_rhc * passed_tj[to_position_r, to_index_r][:, None, None]
        for shared in range(sparse.heads_of_keys):  # one key-value head, and the heads that share it
            heads = slice(shared * group, (shared + 1) * group)
            first = {source: shared * channels * (group if source.kind == "q" else 1) for source in sources}
            here = {at: slice(start, start + channels * (group if at.kind == "q" else 1)) for at, start in first.items()}
            if not any(bool(flow.kept[source][:, here[source]].any()) for source in sources):
                continue
            heard_r = write_rhc[:, heads].flatten(1).any(-1).nonzero().flatten()  # few rows of a sparse matrix read these heads
            for row_r in heard_r.split(_ATTENTION_TARGETS) if len(heard_r) else ():
                at_r, index_r = to_position_r[row_r], to_index_r[row_r]
                patterns = pattern_hts[heads], local_hts[heads]
                gradients = _head_gradients(flow, sources, heads, shared, *patterns, at_r, write_rhc[row_r, heads])
                to_gradient_r11 = flow.gradient[target][at_r, index_r][:, None, None]
                for source, gradient_rtc in zip(sources, gradients, strict=True):
                    there_rtc = (gradient_rtc != 0) & flow.kept[source][:, here[source]]
                    added_rtc = gradient_rtc * flow.change[source][:, here[source]]
                    effect_rtc = added_rtc * to_gradient_r11
                    used = None
                    if source.kind == "v":  # one weight for each of the heads
                        used_r, used_h, used_c = (there_rtc.any(1)[:, None] & (write_rhc[row_r, heads] != 0)).nonzero().unbind(1)
                        used = (heads.start + used_h) * channels + used_c, index_r[used_r]
                    r, position, c = (there_rtc & drawing.strong(effect_rtc)).nonzero().unbind(1)
                    yield _EdgeBatch(
                        "value" if source.kind == "v" else "score", (source, first[source] + c, position),
                        (target, index_r[r], at_r[r]), added_rtc[r, position, c], effect_rtc[r, position, c],
                        int(there_rtc.sum()), used,
                    )  # fmt: skip


def _head_gradients(
    flow: Flow, sources: list[Location], heads: slice, shared: int, pattern_gts: Tensor, local_gts: Tensor, to_r: Tensor,
    write_rgc: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return gradient_rtc = d target / d node for the q, k and v nodes of heads that share keys and values.

    Each row is an attn_out node at to_r that reads them. With target = sum_s p_s u_s over heads, p the pattern at its position
    and u_s = v_s . w what the head writes of position s, d target / d score_s = p_s (u_s - sum_s' p_s' u_s'), with u = 0 for the
    sink.
    """
    sparse, rows, layer = flow.sparse, torch.arange(len(to_r), device=to_r.device), sources[0].layer
    q_gtc, k_1sc, v_1sc = (
        sparse.split_heads(layer, flow.value[source][None], rotate=source.kind != "v")[0, part]
        for source, part in zip(sources, (heads, slice(shared, shared + 1), slice(shared, shared + 1)), strict=True)
    )
    pattern_rgs, u_rgs = pattern_gts[:, to_r].transpose(0, 1), write_rgc @ v_1sc[0].T
    above_rgs = u_rgs - (pattern_rgs * u_rgs).sum(-1, keepdim=True)
    score_rgs = local_gts[:, to_r].transpose(0, 1) * above_rgs
    q_rgtc = torch.zeros(len(to_r), *q_gtc.shape, dtype=q_gtc.dtype, device=q_gtc.device)
    q_rgtc[rows, :, to_r] = score_rgs @ k_1sc[0]
    k_r1sc = torch.einsum("rgs,rgc->rsc", score_rgs, q_gtc[:, to_r].transpose(0, 1))[:, None]
    q_rtc, k_rsc = (sparse.merge_heads(layer, gradient, rotated=True) for gradient in (q_rgtc, k_r1sc))
    return q_rtc, k_rsc, torch.einsum("rgs,rgc->rsc", pattern_rgs, write_rgc)


def _residual_edges(flow: Flow) -> Iterator[_EdgeBatch]:
    for target in flow.locations(*READ_KINDS):
        site, kept_tn, gradient_tn = flow.sparse.site(target), flow.kept[target], flow.gradient[target]
        errors = [(at, flow.kept[at] & (flow.change[at] != 0)) for at in flow.locations(ERROR) if at.layer <= site]
        for source, writes_tn in chain(_writers(flow, site), errors):
            position, index = (kept_tn & writes_tn).nonzero().unbind(1)
            added_e = flow.change[source][position, index] * flow.scale[site][position]
            kind: EdgeKind = "embedding" if source == EMBEDDING else "error" if source.kind == ERROR else "residual"
            from_e = torch.zeros_like(index) if kind == "error" else index  # an error is one node
            ends = (source, from_e, position), (target, index, position)
            yield _EdgeBatch(kind, *ends, added_e, added_e * gradient_tn[position, index])


def _writers(flow: Flow, site: int) -> Iterator[tuple[Location, Tensor]]:
    """Yield the embedding and the kept writes that arrive at a site, each with the mask of the channels_tn that it writes."""
    yield EMBEDDING, flow.embedded_ts
    for source in flow.locations(*WRITE_KINDS):
        if flow.sparse.site(source) < site:
            yield source, flow.kept[source]


def _answer_edges(flow: Flow) -> Iterator[_EdgeBatch]:
    sparse, last_site, last_1 = flow.sparse, flow.sparse.n_sites - 1, torch.tensor([len(flow.tokens_t) - 1]).to(flow.tokens_t)
    answer_1 = torch.full_like(last_1, flow.masked.question.answer)

    def to_answer(kind: EdgeKind, source: Location, index_e: Tensor, position_e: Tensor, added_e: Tensor) -> _EdgeBatch:
        answer = flow.answer, answer_1.expand_as(index_e), last_1.expand_as(index_e)
        return _EdgeBatch(kind, (source, index_e, position_e), answer, added_e, added_e)

    for source, writes_tn in _writers(flow, last_site):
        position, index = (writes_tn & (flow.answer_ts != 0)).nonzero().unbind(1)
        yield to_answer("unembedding", source, index, position, (flow.answer_ts * flow.change[source])[position, index])
    for source in flow.locations(ERROR):
        read_ts = flow.answer_ts if source.layer <= last_site else flow.read_v[None]
        added_t = (flow.change[source] * read_ts).sum(-1)[-len(flow.tokens_t) :]
        (at_e,) = (flow.kept[source][-len(added_t) :, 0] & read_ts[-len(added_t) :].any(-1)).nonzero().unbind(1)
        position = at_e + len(flow.tokens_t) - len(added_t)
        yield to_answer("error", source, torch.zeros_like(position), position, added_t[at_e])
    if sparse.bigram:
        nothing_11s = torch.zeros_like(flow.change[EMBEDDING][:1])[None]
        token_1 = flow.tokens_t[-1:]
        entry_v = sparse.run(token_1[None], Enter.at(last_site, nothing_11s)).logits_btv[0, 0] - sparse.capped(
            sparse.unembedding.bias
        )
        yield to_answer("bigram", BIGRAM, token_1, last_1, (flow.read_v @ entry_v)[None])
