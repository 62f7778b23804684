"""What flows through a prompt's circuit: its edges, with what each adds to its target and to the answer.

Edges are the ways in which one kept node reaches another directly, everything between being held as it is in S_C. The weight of
an edge is how much the source's deviation from its mean adds to what the target is before AbsTopK (for MLP neurons before GELU):

    weight = d target / d source * (a_source - m_source)

    weight       W_ji (a_i - m_i)            attn_in -> q, k, v;  mlp_in -> mlp_act;  mlp_act -> mlp_out           exact
    value        P_pp' W_ji (a_i - m_i)      v at p' -> attn_out at p, P the attention pattern of S_C              exact
    score        by gradient through P       q at p, k at p' -> attn_out at p, the values being held               first order
    residual     (a_i - m_i) / rms           attn_out, mlp_out -> attn_in, mlp_in of a later sublayer, same channel, rms held
    embedding    (E_i - mean E_i) / rms      the token's nonzero entry -> attn_in, mlp_in, same channel
    unembedding  (U_target - U_contrast)_i (a_i - m_i) / rms     a write (or embedding entry) at the last position -> answer
    bigram       B_target - B_contrast       the last token -> answer, in full and with the bias: it is part of every circuit

Only `weight` and `value` edges are nonzero weights between two nodes and are counted as edges; embedding, unembedding and bigram
entries are counted by their own names, the others drawn. `effect` is the weight times dD / d target, which makes edges into
different targets comparable; it is 0 into a target that AbsTopK silences in S_C. How a score splits into pairs of q and k
channels `attention` tells.

With S_C the circuit alone, a_i and m_i a node's value and mean, and D the question's logit difference, as in `circuit`.

Shape legend: b batch row, r masked copy of one prompt, t token, n nodes of a location, e edge, s sparse width, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.circuit import BIGRAM, EMBEDDING, KINDS, Circuit, Edge, EdgeKind, Node, check_means
from bridge.kernels.top_k import gelu
from bridge.residual import Enter
from bridge.sparse import Location, SparseTransformer, norm_scale

# which kinds read a kind through which matrix
_READERS = {
    "attn_in": (("q", "q"), ("k", "k"), ("v", "v")),
    "mlp_in": (("mlp_act", "up"),),
    "mlp_act": (("mlp_out", "down"),),
}
_ATTENTION_TARGETS = 32  # attn_out nodes whose slopes are taken at once


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """Edges of one prompt's circuit by columns, in which thousands are counted and ranked before any is made an `Edge`.

    kind_e counts in `KINDS`; source_e3 and target_e3 are (place in `locations`, index, position) of either end.
    """

    locations: tuple[Location, ...]
    kind_e: Tensor
    source_e3: Tensor
    target_e3: Tensor
    weight_e: Tensor
    effect_e: Tensor

    def strongest(self, most: int | None = None) -> tuple[Edge, ...]:
        """The edges with the largest effects on the answer, largest first; all of them by default."""
        size_e = self.effect_e.abs()
        if most is not None and most < len(size_e):  # of millions, to find a few is faster than to sort all
            least = size_e.topk(most).values[-1]
            few_k = (~(size_e < least)).nonzero().flatten()  # what is no number too
            order_e = few_k[size_e[few_k].argsort(descending=True, stable=True)][:most]
        else:
            order_e = size_e.argsort(descending=True, stable=True)
        columns = (self.kind_e, self.source_e3, self.target_e3, self.weight_e, self.effect_e)
        rows = zip(*(column[order_e].tolist() for column in columns), strict=True)
        return tuple(Edge(self._node(s), self._node(t), KINDS[kind], weight, effect) for kind, s, t, weight, effect in rows)

    def count(self, *kinds: EdgeKind) -> int:
        """How many edges are of some kinds."""
        return sum(run.stop - run.start for kind, _, run in self._runs if KINDS[kind] in kinds)

    def distinct(self, *kinds: EdgeKind) -> int:
        """How many weights the edges of some kinds have: a weight is one at whatever positions it is used."""
        runs: dict[tuple[int, int], list[slice]] = {}
        for kind, pair, run in self._runs:
            if KINDS[kind] in kinds:
                runs.setdefault(pair, []).append(run)
        total = 0
        for run_r in runs.values():
            ends = [(self.source_e3[run, 1], self.target_e3[run, 1]) for run in run_r]
            wide_i, wide_j = (1 + max(int(pair[side].max()) for pair in ends) for side in (0, 1))
            used_ij = torch.zeros(wide_i, wide_j, dtype=torch.bool, device=self.kind_e.device)
            for i_k, j_k in ends:
                used_ij[i_k, j_k] = True
            total += int(used_ij.sum())
        return total

    @cached_property
    def _runs(self) -> tuple[tuple[int, tuple[int, int], slice], ...]:
        """(kind, places of source and target, where) of edges in a row that share them, as the table was made."""
        from_e, to_e = self.source_e3[:, 0], self.target_e3[:, 0]
        new_e = (from_e.diff() != 0) | (to_e.diff() != 0) | (self.kind_e.diff() != 0)
        starts = [0, *(new_e.nonzero().flatten() + 1).tolist()]
        return tuple(
            (int(self.kind_e[start]), (int(from_e[start]), int(to_e[start])), slice(start, stop))
            for start, stop in zip(starts, [*starts[1:], len(from_e)], strict=True)
        )

    def _node(self, end: list[int]) -> Node:
        return Node(self.locations[end[0]], end[1], end[2])


def draw_edges(sparse: SparseTransformer, circuit: Circuit) -> tuple[Edge, ...]:
    """Every edge between the circuit's nodes (see the module's docstring), the largest effects on the answer first.

    Raises ValueError where the means lack those of the embedding (`corpus_means` gives them).
    """
    return edge_table(sparse, circuit).strongest()


@torch.no_grad()
def edge_table(sparse: SparseTransformer, circuit: Circuit) -> EdgeTable:
    """The same edges as a table, in no order."""
    check_means([EMBEDDING], circuit.means)
    flow = flow_through(sparse, circuit)
    answer = Location(len(sparse.blocks), "answer")
    locations = (*circuit.kept, EMBEDDING, BIGRAM, answer)
    place = {location: i for i, location in enumerate(locations)}
    parts: list[tuple[Tensor, ...]] = []
    for found in (_weight_edges, _attention_edges, _residual_edges, _answer_edges):
        for kind, source, source_e2, target, target_e2, weight_e, effect_e in found(flow):
            if len(weight_e):
                kind_e = torch.full_like(weight_e, KINDS.index(kind), dtype=torch.long)
                ends = (F.pad(e2, (1, 0), value=place[at]) for at, e2 in ((source, source_e2), (target, target_e2)))
                parts.append((kind_e, *ends, weight_e, effect_e))
    return EdgeTable(locations, *(torch.cat(column) for column in zip(*parts, strict=True)))


# (kind, source, (index, position) of each edge there, target, likewise, weight_e, effect_e)
_Edges = Iterator[tuple[EdgeKind, Location, Tensor, Location, Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class _Flow:
    """What runs through S_C, without the batch axis."""

    sparse: SparseTransformer
    circuit: Circuit
    value: Mapping[Location, Tensor]
    change: Mapping[Location, Tensor]  # value - mean, of the nodes and of the embedding
    slope: Mapping[Location, Tensor]  # dD / d what the node is before AbsTopK (and GELU)
    scale: list[Tensor]  # 1 / rms per token, at every site

    def weight(self, layer: int, name: str) -> Tensor:
        return self.sparse.get_parameter(f"blocks.{layer}.{name}.weight")

    def kept(self, location: Location, position: int) -> Tensor:
        """Indices of the kept nodes of a location at a position."""
        return self.circuit.kept[location][position].nonzero().flatten()

    def locations(self, *kinds: str) -> list[Location]:
        return [location for location in self.circuit.kept if location.kind in kinds]


def flow_through(sparse: SparseTransformer, circuit: Circuit) -> _Flow:
    """What runs through the circuit alone on its prompt: values, changes from the means, slopes of D."""
    value: dict[Location, Tensor] = {}
    probe: dict[Location, Tensor] = {}

    def probing(location: Location, x_btn: Tensor) -> Tensor:
        probe[location] = torch.zeros_like(x_btn).requires_grad_()  # adds nothing, and receives dD / d node
        value[location] = circuit.gate(location, x_btn) + probe[location]
        return value[location]

    with torch.enable_grad():
        trace = sparse.run(circuit.question.tokens_t.to(sparse.device)[None], gate=probing, last_only=True)
        answer = circuit.question.difference(trace.logits_btv[0, -1])
        slopes = torch.autograd.grad(answer, list(probe.values()))
    value = {location: value_1tn[0].detach() for location, value_1tn in value.items()}
    slope = {location: slope_1tn[0] * (value[location] != 0) for location, slope_1tn in zip(probe, slopes, strict=True)}
    for location in slope:
        if location.kind == "mlp_act":
            up = f"blocks.{location.layer}.up"
            with torch.enable_grad():
                read_tn = value[Location(location.layer, "mlp_in")]
                before_tn = F.linear(read_tn, sparse.get_parameter(f"{up}.weight"), sparse.get_parameter(f"{up}.bias"))
                before_tn = before_tn.detach().requires_grad_()
                slope[location] = slope[location] * torch.autograd.grad(gelu(before_tn).sum(), before_tn)[0]
    change = {location: value_tn - circuit.means[location] for location, value_tn in value.items()}
    change[EMBEDDING] = trace.residuals[0][0].detach() - circuit.means[EMBEDDING]
    scale = [norm_scale(x_btd.detach())[0, :, 0] for x_btd in trace.residuals]
    return _Flow(sparse, circuit, value, change, slope, scale)


def _weight_edges(flow: _Flow) -> _Edges:
    for source in flow.locations("attn_in", "mlp_in", "mlp_act"):
        for kind, name in _READERS[source.kind]:
            target, weight_ji = Location(source.layer, kind), flow.weight(source.layer, name)
            for position in range(len(flow.circuit.question.tokens_t)):
                i, j = flow.kept(source, position), flow.kept(target, position)
                kept_ji = weight_ji[j][:, i]
                row_e, column_e = kept_ji.nonzero().unbind(1)
                added_e = kept_ji[row_e, column_e] * flow.change[source][position, i[column_e]]
                ends = (torch.stack([k, torch.full_like(k, position)], 1) for k in (i[column_e], j[row_e]))
                source_e2, target_e2 = ends
                yield "weight", source, source_e2, target, target_e2, added_e, added_e * flow.slope[target][position, j[row_e]]


def _attention_edges(flow: _Flow) -> _Edges:
    for target in flow.locations("attn_out"):
        sources = [Location(target.layer, kind) for kind in ("q", "k", "v")]
        for nodes_2 in flow.circuit.kept[target].nonzero().split(_ATTENTION_TARGETS):
            for source, slope_rtn in zip(sources, _attention_slopes(flow, sources, nodes_2), strict=True):
                kind: EdgeKind = "value" if source.kind == "v" else "score"
                r, position, index = (slope_rtn * flow.circuit.kept[source]).nonzero().unbind(1)
                added_e = slope_rtn[r, position, index] * flow.change[source][position, index]
                to_e2 = nodes_2[r]
                effect_e = added_e * flow.slope[target][to_e2[:, 0], to_e2[:, 1]]
                yield kind, source, torch.stack([index, position], 1), target, to_e2.flip(1), added_e, effect_e


def _attention_slopes(flow: _Flow, sources: list[Location], nodes_2: Tensor) -> tuple[Tensor, ...]:
    """slope_rtn = d target / d node for q, k and v nodes, a row for each of the attn_out nodes (position, index).

    With target = sum_hs p_hs u_hs, p the pattern at its position and u_hs = v_hs . w_h what a head's value there would write,
    d target / d score_hs = p_hs (u_hs - sum_s' p_hs' u_hs'), the sink's u being 0.
    """
    sparse, layer, channels = flow.sparse, sources[0].layer, flow.sparse.shape.head_channels
    to_r, rows = nodes_2[:, 0], torch.arange(len(nodes_2), device=nodes_2.device)
    write_rhc = flow.weight(layer, "o")[nodes_2[:, 1]].unflatten(-1, (-1, channels))
    q_1tn, k_1tn, v_1tn = (flow.value[source][None] for source in sources)
    pattern_rhs = sparse.pattern(layer, q_1tn, k_1tn)[0].transpose(0, 1)[to_r]
    q_htc, k_hsc = sparse.heads(q_1tn, rotate=True)[0], sparse.heads(k_1tn, rotate=True)[0]
    v_hsc = sparse.heads(v_1tn, rotate=False)[0]
    u_rhs = torch.einsum("hsc,rhc->rhs", v_hsc, write_rhc)
    score_rhs = pattern_rhs * (u_rhs - (pattern_rhs * u_rhs).sum(-1, keepdim=True)) / math.sqrt(channels)
    slope_q_rhtc = torch.zeros(len(to_r), *q_htc.shape, dtype=q_htc.dtype, device=q_htc.device)
    slope_q_rhtc[rows, :, to_r] = torch.einsum("rhs,hsc->rhc", score_rhs, k_hsc)
    slope_k_rhsc = torch.einsum("rhs,rhc->rhsc", score_rhs, q_htc.transpose(0, 1)[to_r])
    slope_v_rhsc = torch.einsum("rhs,rhc->rhsc", pattern_rhs, write_rhc)
    slope_q_rtn, slope_k_rtn = sparse.nodes(slope_q_rhtc, rotated=True), sparse.nodes(slope_k_rhsc, rotated=True)
    return slope_q_rtn, slope_k_rtn, sparse.nodes(slope_v_rhsc, rotated=False)


def _residual_edges(flow: _Flow) -> _Edges:
    for target in flow.locations("attn_in", "mlp_in"):
        site, kept_tn = flow.sparse.site(target), flow.circuit.kept[target]
        for source, writes_tn in _writers(flow, site):
            position, index = (kept_tn & writes_tn).nonzero().unbind(1)
            added_e = flow.change[source][position, index] * flow.scale[site][position]
            kind: EdgeKind = "embedding" if source == EMBEDDING else "residual"
            ends_e2 = torch.stack([index, position], 1)
            yield kind, source, ends_e2, target, ends_e2, added_e, added_e * flow.slope[target][position, index]


def _writers(flow: _Flow, site: int) -> Iterator[tuple[Location, Tensor]]:
    """The embedding, where it has entries, and the kept writes that arrive at a site: which channels_tn each writes."""
    yield EMBEDDING, flow.sparse.embedding[flow.circuit.question.tokens_t] != 0
    for source in flow.locations("attn_out", "mlp_out"):
        if flow.sparse.site(source) < site:
            yield source, flow.circuit.kept[source]


def _answer_edges(flow: _Flow) -> _Edges:
    question, sparse, last_site = flow.circuit.question, flow.sparse, flow.sparse.n_sites - 1
    last = len(question.tokens_t) - 1
    answer = Location(len(sparse.blocks), "answer")
    read_s = sparse.unembedding.weight[question.target] - sparse.unembedding.weight[question.contrast]
    for source, writes_tn in _writers(flow, last_site):
        index = (writes_tn[last] & (read_s != 0)).nonzero().flatten()
        added_e = read_s[index] * flow.change[source][last, index] * flow.scale[last_site][last]
        from_e2, to_e2 = (torch.stack([k, torch.full_like(k, last)], 1) for k in (index, torch.full_like(index, question.target)))
        yield "unembedding", source, from_e2, answer, to_e2, added_e, added_e
    token_11 = question.tokens_t[-1:].to(sparse.device)[None]
    nothing_11s = torch.zeros(1, 1, sparse.width, device=sparse.device, dtype=sparse.embedding.dtype)
    added_1 = question.difference(sparse.run(token_11, Enter.at(last_site, nothing_11s)).logits_btv[0])
    from_12, to_12 = (torch.tensor([[k, last]], device=sparse.device) for k in (int(token_11), question.target))
    yield "bigram", BIGRAM, from_12, answer, to_12, added_1, added_1
