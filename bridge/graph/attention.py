"""Attention heads of a prompt's circuit: what they read, why, what they move, and what that does to the answer.

Everything is measured in S_C, the sparse model with every node and error outside the circuit at its mean (`flow`). For a head
with channels c, at a query position p, with P its pattern and v, m the values and means of its v channels:

    score      S_pp' = sum over c of q_pc k_p'c / sqrt(channels)           a `ScoreTerm` per channel; exact, they sum to the score
    weight     P_pp' = exp S_pp' / (exp sink + sum over p'' <= p of exp S_pp'')     `sink` is the share that goes nowhere
    moved      z_p = sum over p' of P_pp' v_p', which W_o passes on to attn_out

With rotary positions, q and k are taken as they are multiplied: rotated, so that a channel mixes with its partner. Scores are
taken before ALiBi and a soft cap. Keys and values that heads share are ablated for one head at a time. A `ValueTerm` is what a v
channel at p' adds to d: P_pp' (v_p'c - m_c) times the gradient of d along W_o's column, summed over the circuit's attn_out nodes
at p. It is exact up to attn_out, first order from there on, and the sum of the channel's `value` edges (`attribution`).

The effect of a head at p on d is measured by intervening. Its circuit nodes are ablated, q and k (the pattern becomes P') or v
(the values become v') or both, at every position, but the result is used at p alone, and S_C runs on from there:

    effect          d(P, v) - d(P', v')          both ablated
    pattern_effect  d(P, v) - d(P', v)           the pattern alone; values frozen
    value_effect    d(P, v) - d(P, v')           the values alone; pattern frozen
    interaction     effect - pattern_effect - value_effect

Only some heads and positions are measured: those whose largest first-order effect of the three is largest. `left_out` is the
number of others that have any.

Shape legend: b batch row, r row that is intervened on, t token, n nodes of a location, h head, c channel of a head, s sparse
width; p pairs of a head and a query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.graph.flow import Flow
from bridge.models.circuit import Node
from bridge.models.residual import Enter, Trace
from bridge.models.sparse import Location

HEADS = 16  # (head, query) pairs that are measured
READS = 4  # positions listed for each head, those with the largest weights
TERMS = 6  # channels listed for each score, and for what is moved
_N_ABLATIONS = 3  # ways of ablating: both, the pattern, the values


@dataclass(frozen=True)
class ScoreTerm:
    """A channel's share of a score: query value times key value by the root of the number of channels. `channel` is the index of
    the q node, and of the k node if heads do not share keys.
    """

    channel: int
    query_value: float
    key_value: float
    product: float


@dataclass(frozen=True)
class ValueTerm:
    """A v node of the circuit that is moved: its value, and what it adds to d through this head at this query."""

    node: str
    value: float
    effect: float


@dataclass(frozen=True)
class Read:
    """A position that a head reads: its weight, its score with the score's terms, largest first, and what is moved from there.

    others is what unlisted channels add to the score, effect what everything that is moved from there adds to d.
    """

    position: int
    weight: float
    score: float
    terms: tuple[ScoreTerm, ...]
    moved: tuple[ValueTerm, ...]
    others: float
    effect: float


@dataclass(frozen=True)
class ExplainedHead:
    """A head at a query position: what it reads, largest weight first, and what d loses when it is ablated, in nats."""

    layer: int
    head: int
    query: int
    sink: float
    reads: tuple[Read, ...]
    effect: float
    pattern_effect: float
    value_effect: float
    interaction: float


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer's attention in S_C: pattern, rotated q and k, v minus its mean, the gradient of d along z (gradient_thc), z itself,
    z by each way of ablating (ablated_3htc), and the first-order effects of these (first_order_3th).
    """

    q_htc: Tensor
    k_htc: Tensor
    pattern_htt: Tensor
    change_thc: Tensor
    gradient_thc: Tensor
    z_htc: Tensor
    ablated_3htc: Tensor
    first_order_3th: Tensor


@torch.no_grad()
def explain_attention(flow: Flow, *, most: int = HEADS) -> tuple[tuple[ExplainedHead, ...], int]:
    """Return the heads with the largest effects on the answer, largest first, and how many more (head, query) pairs have any."""
    layers = {at.layer: _layer(flow, at.layer) for at in flow.locations("attn_out")}
    sizes = [
        (size, layer, head, query)
        for layer, its in layers.items()
        for query, size_h in enumerate(its.first_order_3th.abs().amax(0).tolist())
        for head, size in enumerate(size_h)
        if size > 0
    ]
    pairs = [pair for _, *pair in sorted(sizes, reverse=True)[:most]]
    effects = _effects(flow, layers, pairs)
    heads = [
        _explain_head(flow, layers[layer], layer, head, query, its)
        for (layer, head, query), its in zip(pairs, effects, strict=True)
    ]
    heads.sort(key=lambda each: -max(abs(each.effect), abs(each.pattern_effect), abs(each.value_effect)))
    return tuple(heads), len(sizes) - len(pairs)


def attention_reads(flow: Flow, nodes: Sequence[Node]) -> Tensor:
    """Return read_t: what the heads bring to some attn_out nodes from every position, beyond the means, in terms of d."""
    read_t = torch.zeros(len(flow.tokens_t), device=flow.kept_f.device)
    for layer in sorted({node.location.layer for node in nodes}):
        its, out = _layer(flow, layer), Location(layer, "attn_out")
        for node in nodes:
            if node.location == out and node.position is not None:
                write_hc = flow.weight(layer, "o")[node.index].view(its.change_thc.shape[1:])
                added_ht = its.pattern_htt[:, node.position] * (its.change_thc * write_hc).sum(-1).T
                read_t += added_ht.sum(0) * flow.gradient[out][node.position, node.index]
    return read_t


def _layer(flow: Flow, layer: int) -> _Layer:
    sparse, value = flow.sparse, flow.value
    channels = sparse.channels
    q, k, v, out = (Location(layer, kind) for kind in ("q", "k", "v", "attn_out"))
    mean = {at: flow.masked.means[at].to(value[at].dtype).expand_as(value[at]) for at in (q, k, v)}
    pattern_htt, ablated_htt = (sparse.pattern(layer, of[q][None], of[k][None])[0] for of in (value, mean))
    gradient_ts = flow.output_gradient(out) * flow.kept[out]
    gradient_thc = (gradient_ts @ flow.weight(layer, "o")).unflatten(-1, (-1, channels))
    v_htc, mean_htc = (
        sparse.repeat_shared_heads(sparse.split_heads(layer, of[v][None], rotate=False))[0] for of in (value, mean)
    )
    z_htc = pattern_htt @ v_htc
    ablated_3htc = torch.stack([ablated_htt @ mean_htc, ablated_htt @ v_htc, pattern_htt @ mean_htc])
    first_order_3th = ((z_htc - ablated_3htc).transpose(1, 2) * gradient_thc).sum(-1)
    q_htc = sparse.split_heads(layer, value[q][None], rotate=True)[0]
    k_htc = sparse.repeat_shared_heads(sparse.split_heads(layer, value[k][None], rotate=True))[0]
    change_thc = (v_htc - mean_htc).transpose(0, 1)
    return _Layer(q_htc, k_htc, pattern_htt, change_thc, gradient_thc, z_htc, ablated_3htc, first_order_3th)


def _effects(flow: Flow, layers: dict[int, _Layer], pairs: list[list[int]]) -> list[list[float]]:
    """Return the loss of d for each layer, head and query of `pairs`, by each way of ablating."""
    if not pairs:
        return []
    sparse, masked = flow.sparse, flow.masked
    whole = _run(flow, 1)
    keep, _ = masked.gates(flow.kept_f.expand(_N_ABLATIONS, -1))
    site_r, x_rts = [], []
    for layer, head, query in pairs:
        site, its = sparse.site(Location(layer, "attn_out")), layers[layer]
        z_3htc = its.z_htc.repeat(_N_ABLATIONS, 1, 1, 1)
        z_3htc[:, head, query] = its.ablated_3htc[:, head, query]
        before_1ts, after_3ts = (
            sparse.write_nodes(layer, "o", keep, z_bhtc.transpose(1, 2).flatten(2)) for z_bhtc in (its.z_htc[None], z_3htc)
        )
        x_3ts = whole.residuals[site + 1].repeat(_N_ABLATIONS, 1, 1)
        x_3ts[:, query] += (after_3ts - before_1ts)[:, query]
        site_r += [site + 1] * _N_ABLATIONS
        x_rts.append(x_3ts)
    order_r = torch.tensor(site_r).argsort(stable=True)
    lost_r = torch.empty(len(site_r), dtype=torch.float64)
    for some_r in order_r.split(masked.rows_per_batch):
        enter = Enter(torch.tensor(site_r)[some_r], torch.cat(x_rts)[some_r])
        logits_rv = _run(flow, len(some_r), enter).logits_btv[:, -1]
        lost_r[some_r] = (flow.difference - masked.question.difference(logits_rv)).cpu().double()
    return lost_r.unflatten(0, (-1, _N_ABLATIONS)).tolist()


def _run(flow: Flow, rows: int, enter: Enter | None = None) -> Trace:
    """Run S_C on some copies of the prompt; the logits are those of the last position."""
    gate, correct = flow.masked.gates(flow.kept_f.expand(rows, -1))
    return flow.sparse.run(flow.tokens_t.expand(rows, -1), enter, gate, correct=correct, last_only=True)


def _explain_head(flow: Flow, its: _Layer, layer: int, head: int, query: int, effects: list[float]) -> ExplainedHead:
    weight_t = its.pattern_htt[head, query]
    channels = flow.sparse.channels
    v, first, own = Location(layer, "v"), head * channels, head // flow.sparse.group * channels
    reads = []
    for position in weight_t[: query + 1].topk(min(READS, query + 1)).indices.tolist():
        query_c, key_c = its.q_htc[head, query], its.k_htc[head, position]
        product_c = query_c * key_c / math.sqrt(len(query_c))
        listed = [c for c in product_c.abs().topk(min(TERMS, len(product_c))).indices.tolist() if product_c[c] != 0]
        terms = tuple(ScoreTerm(first + c, float(query_c[c]), float(key_c[c]), float(product_c[c])) for c in listed)
        effect_c = weight_t[position] * its.change_thc[position, head] * its.gradient_thc[query, head]
        nodes = flow.kept[v][position, own : own + channels].nonzero().flatten().tolist()
        moved = sorted(
            (
                ValueTerm(str(Node(v, own + c, position)), float(flow.value[v][position, own + c]), float(effect_c[c]))
                for c in nodes
            ),
            key=lambda term: -abs(term.effect),
        )[:TERMS]
        score = float(product_c.sum())
        others = score - sum(term.product for term in terms)
        reads.append(Read(position, float(weight_t[position]), score, terms, tuple(moved), others, float(effect_c.sum())))
    effect, pattern_effect, value_effect = effects
    sink, interaction = max(0.0, 1 - float(weight_t.sum())), effect - pattern_effect - value_effect
    return ExplainedHead(layer, head, query, sink, tuple(reads), effect, pattern_effect, value_effect, interaction)
