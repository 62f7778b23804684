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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.circuit import BIGRAM, COUNTED, EMBEDDING, KINDS, Circuit, Edge, EdgeKind, Node, check_means
from bridge.kernels.top_k import gelu
from bridge.residual import Enter
from bridge.sparse import Location, SparseTransformer, norm_scale

# which kinds read a kind through which matrix
_READERS = {
    "attn_in": (("q", "q"), ("k", "k"), ("v", "v")),
    "mlp_in": (("mlp_act", "up"),),
    "mlp_act": (("mlp_out", "down"),),
}
_ATTENTION_TARGETS = 512  # attn_out nodes that read a head, whose slopes are taken at once


@dataclass(frozen=True)
class Edges:
    """Edges of one prompt's circuit, the largest effects on the answer first; and of each kind how many there are in all.

    `weights` counts, of `COUNTED` kinds, those that differ by more than their positions: a weight is one wherever it is used.
    """

    strongest: tuple[Edge, ...]
    number: Mapping[EdgeKind, int]
    weights: Mapping[EdgeKind, int]

    def count(self, *kinds: EdgeKind) -> int:
        """How many edges are of some kinds."""
        return sum(self.number.get(kind, 0) for kind in kinds)

    def distinct(self, *kinds: EdgeKind) -> int:
        """How many weights the edges of some kinds have."""
        return sum(self.weights.get(kind, 0) for kind in kinds)


@torch.no_grad()
def draw_edges(
    sparse: SparseTransformer, circuit: Circuit, most: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> Edges:
    """Every edge between the circuit's nodes (see the module's docstring), or the `most` with the largest effects.

    progress is told between two locations, and may raise to end the work.
    Raises ValueError where the means lack those of the embedding (`corpus_means` gives them).
    """
    check_means([EMBEDDING], circuit.means)
    flow = flow_through(sparse, circuit)
    answer = Location(len(sparse.blocks), "answer")
    drawing = _Drawing(circuit, (*circuit.kept, EMBEDDING, BIGRAM, answer), most)
    for found in (_weight_edges(flow), _attention_edges(flow, drawing), _residual_edges(flow), _answer_edges(flow)):
        for edges in found:
            progress("edges")
            drawing.add(edges)
    return drawing.edges()


@dataclass(frozen=True, eq=False)
class _Some:
    """Edges of one kind between two locations: (index, position) of either end, and what each adds to its target and to D.

    Where only the strongest are asked for, weaker ones may be left out; `number` counts them, and used_2k holds the indices of
    the nodes (source, target) of all.
    """

    kind: EdgeKind
    source: Location
    target: Location
    source_e2: Tensor
    target_e2: Tensor
    weight_e: Tensor
    effect_e: Tensor
    number: int
    used_2k: Tensor

    @staticmethod
    def all(
        kind: EdgeKind, source: Location, source_e2: Tensor, target: Location, target_e2: Tensor, weight_e: Tensor,
        effect_e: Tensor,
    ) -> _Some:  # fmt: skip
        """Edges of which none was left out."""
        used_2k = torch.stack([source_e2[:, 0], target_e2[:, 0]])
        return _Some(kind, source, target, source_e2, target_e2, weight_e, effect_e, len(weight_e), used_2k)


class _Drawing:
    """The strongest of the edges that are added. There can be ten million, of which a page shows some thousands."""

    def __init__(self, circuit: Circuit, locations: tuple[Location, ...], most: int | None) -> None:
        self.kept = circuit.kept
        self.locations, self.most, self.least = locations, most, 0.0  # the effect of the weakest that can be among them
        self.place = {location: i for i, location in enumerate(locations)}
        self.parts: list[tuple[Tensor, ...]] = []
        self.number: dict[EdgeKind, int] = {}
        self.used: dict[tuple[EdgeKind, Location, Location], Tensor] = {}

    def strong(self, effect: Tensor) -> Tensor:
        """Which effects may be among the strongest: also what is no number."""
        return ~(effect.abs() < self.least)

    def add(self, some: _Some) -> None:
        """Count edges, and keep those that may be among the strongest."""
        self.number[some.kind] = self.number.get(some.kind, 0) + some.number
        if some.kind in COUNTED:
            key = (some.kind, some.source, some.target)
            if key not in self.used:
                wide_i, wide_j = (self.kept[at].shape[1] for at in (some.source, some.target))
                self.used[key] = torch.zeros(wide_i, wide_j, dtype=torch.bool, device=some.used_2k.device)
            self.used[key][some.used_2k[0], some.used_2k[1]] = True
        strong_k = self.strong(some.effect_e).nonzero().flatten()
        if len(strong_k):
            kind_e = torch.full_like(strong_k, KINDS.index(some.kind))
            ends = ((some.source, some.source_e2), (some.target, some.target_e2))
            from_e3, to_e3 = (F.pad(e2[strong_k], (1, 0), value=self.place[at]) for at, e2 in ends)
            self.parts.append((kind_e, from_e3, to_e3, some.weight_e[strong_k], some.effect_e[strong_k]))
        if self.most is not None and sum(len(part[0]) for part in self.parts) > 4 * self.most:
            self._weed(self.most)

    def _weed(self, most: int) -> None:
        columns = self._columns()
        size_e = columns[-1].abs()
        self.least = float(size_e.nan_to_num(torch.inf).topk(most).values[-1])
        strong_k = self.strong(size_e).nonzero().flatten()
        self.parts = [tuple(column[strong_k] for column in columns)]

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(column) for column in zip(*self.parts, strict=True))

    def edges(self) -> Edges:
        """What was asked for."""
        columns = self._columns()
        order_e = columns[-1].abs().argsort(descending=True, stable=True)[: self.most]
        nodes: dict[tuple[int, ...], Node] = {}

        def node(end: list[int]) -> Node:
            key = tuple(end)
            if key not in nodes:
                nodes[key] = Node(self.locations[end[0]], end[1], end[2])
            return nodes[key]

        rows = zip(*(column[order_e].tolist() for column in columns), strict=True)
        strongest = tuple(Edge(node(s), node(t), KINDS[kind], weight, effect) for kind, s, t, weight, effect in rows)
        weights: dict[EdgeKind, int] = {}
        for (kind, _, _), used_ij in self.used.items():
            weights[kind] = weights.get(kind, 0) + int(used_ij.sum())
        return Edges(strongest, self.number, weights)


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


def _weight_edges(flow: _Flow) -> Iterator[_Some]:
    for source in flow.locations("attn_in", "mlp_in", "mlp_act"):
        for kind, name in _READERS[source.kind]:
            target, weight_ji = Location(source.layer, kind), flow.weight(source.layer, name)
            row_w, column_w = weight_ji.nonzero().unbind(1)
            from_tn, to_tn = flow.circuit.kept[source], flow.circuit.kept[target]
            position, w = (from_tn[:, column_w] & to_tn[:, row_w]).nonzero().unbind(1)
            i, j = column_w[w], row_w[w]
            added_e = weight_ji[j, i] * flow.change[source][position, i]
            source_e2, target_e2 = (torch.stack([k, position], 1) for k in (i, j))
            yield _Some.all("weight", source, source_e2, target, target_e2, added_e, added_e * flow.slope[target][position, j])


def _attention_edges(flow: _Flow, drawing: _Drawing) -> Iterator[_Some]:
    sparse, channels = flow.sparse, flow.sparse.shape.head_channels
    for target in flow.locations("attn_out"):
        sources = [Location(target.layer, kind) for kind in ("q", "k", "v")]
        pattern_hts = sparse.pattern(target.layer, *(flow.value[source][None] for source in sources[:2]))[0]
        to_all_2 = flow.circuit.kept[target].nonzero()
        write_rhc = flow.weight(target.layer, "o")[to_all_2[:, 1]].unflatten(-1, (-1, channels))
        for head in range(write_rhc.shape[1]):  # few rows of a sparse matrix write from it
            here = slice(head * channels, (head + 1) * channels)
            heard_r = write_rhc[:, head].any(-1).nonzero().flatten()
            for row_r in heard_r.split(_ATTENTION_TARGETS) if len(heard_r) else ():
                nodes_2 = to_all_2[row_r]
                slopes = _head_slopes(flow, sources, head, pattern_hts[head], nodes_2[:, 0], write_rhc[row_r, head])
                to_slope_r11 = flow.slope[target][nodes_2[:, 0], nodes_2[:, 1]][:, None, None]
                for source, slope_rtc in zip(sources, slopes, strict=True):
                    kind: EdgeKind = "value" if source.kind == "v" else "score"
                    there_rtc = (slope_rtc != 0) & flow.circuit.kept[source][:, here]
                    added_rtc = slope_rtc * flow.change[source][:, here]
                    effect_rtc = added_rtc * to_slope_r11
                    number = int(there_rtc.sum())
                    used_2k = there_rtc.any(1).nonzero().T if kind in COUNTED else nodes_2.new_empty(2, 0)
                    r, position, c = (there_rtc & drawing.strong(effect_rtc)).nonzero().unbind(1)
                    yield _Some(
                        kind, source, target, torch.stack([here.start + c, position], 1), nodes_2[r].flip(1),
                        added_rtc[r, position, c], effect_rtc[r, position, c], number,
                        torch.stack([here.start + used_2k[1], nodes_2[used_2k[0], 1]]),
                    )  # fmt: skip


def _head_slopes(
    flow: _Flow, sources: list[Location], head: int, pattern_ts: Tensor, to_r: Tensor, write_rc: Tensor
) -> tuple[Tensor, ...]:
    """slope_rtc = d target / d node for a head's q, k and v nodes, a row for each attn_out node, at to_r, that reads the head.

    With target = sum_s p_s u_s over heads, p the pattern at its position and u_s = v_s . w what the head's value there would
    write, d target / d score_s = p_s (u_s - sum_s' p_s' u_s'), the sink's u being 0.
    """
    sparse, rows = flow.sparse, torch.arange(len(to_r), device=to_r.device)
    q_tc, k_sc, v_sc = (
        sparse.heads(flow.value[source][None], rotate=source.kind != "v")[0, head] for source in sources
    )  # fmt: skip
    pattern_rs, u_rs = pattern_ts[to_r], write_rc @ v_sc.T
    score_rs = pattern_rs * (u_rs - (pattern_rs * u_rs).sum(-1, keepdim=True)) / math.sqrt(sparse.shape.head_channels)
    slope_q_rtc = torch.zeros(len(to_r), *q_tc.shape, dtype=q_tc.dtype, device=q_tc.device)
    slope_q_rtc[rows, to_r] = score_rs @ k_sc
    slope_k_rsc = score_rs[:, :, None] * q_tc[to_r][:, None]
    slope_q_rtc, slope_k_rsc = (sparse.nodes(slope[:, None], rotated=True) for slope in (slope_q_rtc, slope_k_rsc))
    return slope_q_rtc, slope_k_rsc, pattern_rs[:, :, None] * write_rc[:, None]


def _residual_edges(flow: _Flow) -> Iterator[_Some]:
    for target in flow.locations("attn_in", "mlp_in"):
        site, kept_tn = flow.sparse.site(target), flow.circuit.kept[target]
        for source, writes_tn in _writers(flow, site):
            position, index = (kept_tn & writes_tn).nonzero().unbind(1)
            added_e = flow.change[source][position, index] * flow.scale[site][position]
            kind: EdgeKind = "embedding" if source == EMBEDDING else "residual"
            ends_e2 = torch.stack([index, position], 1)
            yield _Some.all(kind, source, ends_e2, target, ends_e2, added_e, added_e * flow.slope[target][position, index])


def _writers(flow: _Flow, site: int) -> Iterator[tuple[Location, Tensor]]:
    """The embedding, where it has entries, and the kept writes that arrive at a site: which channels_tn each writes."""
    yield EMBEDDING, flow.sparse.embedding[flow.circuit.question.tokens_t] != 0
    for source in flow.locations("attn_out", "mlp_out"):
        if flow.sparse.site(source) < site:
            yield source, flow.circuit.kept[source]


def _answer_edges(flow: _Flow) -> Iterator[_Some]:
    question, sparse, last_site = flow.circuit.question, flow.sparse, flow.sparse.n_sites - 1
    last = len(question.tokens_t) - 1
    answer = Location(len(sparse.blocks), "answer")
    read_s = sparse.unembedding.weight[question.target] - sparse.unembedding.weight[question.contrast]
    for source, writes_tn in _writers(flow, last_site):
        index = (writes_tn[last] & (read_s != 0)).nonzero().flatten()
        added_e = read_s[index] * flow.change[source][last, index] * flow.scale[last_site][last]
        from_e2, to_e2 = (torch.stack([k, torch.full_like(k, last)], 1) for k in (index, torch.full_like(index, question.target)))
        yield _Some.all("unembedding", source, from_e2, answer, to_e2, added_e, added_e)
    token_11 = question.tokens_t[-1:].to(sparse.device)[None]
    nothing_11s = torch.zeros(1, 1, sparse.width, device=sparse.device, dtype=sparse.embedding.dtype)
    added_1 = question.difference(sparse.run(token_11, Enter.at(last_site, nothing_11s)).logits_btv[0])
    from_12, to_12 = (torch.tensor([[k, last]], device=sparse.device) for k in (int(token_11), question.target))
    yield _Some.all("bigram", BIGRAM, from_12, answer, to_12, added_1, added_1)
