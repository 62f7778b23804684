"""The edges that a prompt's circuit needs: the fewest that keep its answer with all other contributions at their means.

A `weight` edge adds W_ji (a_i - m_i) to its target before AbsTopK (for neurons before GELU); a `value` edge, with P the attention
pattern, adds P_pp' W_ji (a_i - m_i). Removing an edge subtracts this, so the edge contributes its mean. a and P are those of the
run in which the edges are removed, and every node and error outside the circuit is at its mean as well. Embedding entries,
scores, residual identities and edges into the answer are not weights between two nodes, and stay.

Edges are taken in the order of their effects (`attribution`). The smallest number is kept that is found to meet the circuit's
bounds: F alone, and F in the mean over supersets of random other edges, without which removals may cancel each other.

Shape legend: r masked copy with edges removed, e edge, f all nodes in one row, t token, n nodes of a location, h head.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, Level, random_sets
from bridge.graph.attribution import Edges
from bridge.graph.flow import Flow
from bridge.models.circuit import COUNTED, KINDS, recording_gate
from bridge.models.sparse import Location

_DENSITIES = np.array([0.25, 0.5, 0.75])  # share of the other edges in each superset
_SIZES = 8  # sizes tried at a time
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class PrunedEdges:
    """Edges of a circuit, including those that are not weights; before is the number of `COUNTED` edges before pruning.

    faithfulness is that of the circuit with these edges alone; None if nothing was pruned: no weights, or too many edges to list.
    """

    edges: Edges
    before: int
    faithfulness: float | None


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The edges of one matrix: their indices and weights, and the nodes from and to which they lead."""

    edge_e: Tensor
    weight_e: Tensor
    source: Location
    source_position_e: Tensor
    source_index_e: Tensor
    position_e: Tensor
    index_e: Tensor


@torch.no_grad()
def prune_edges(loss: CircuitLoss, flow: Flow, edges: Edges, level: Level, seed: int = 0) -> PrunedEdges:
    """Return the edges of a circuit without the weights that it does not need at a level."""
    before = edges.count(*COUNTED)
    is_weight_e = torch.isin(edges.kind_e, torch.tensor([KINDS.index(kind) for kind in COUNTED], device=edges.kind_e.device))
    if not before or int(is_weight_e.sum()) < before:
        return PrunedEdges(edges, before, None)
    model = EdgeMaskedModel(loss, flow, edges)
    is_weight_e &= model.removable_e
    weight_k = is_weight_e.nonzero().flatten()  # largest effect first, as the edges are
    count = len(weight_k)
    generator = np.random.default_rng(seed + 5_000_011)
    high, low, best = count, -1, model.miss(torch.ones(1, len(is_weight_e), dtype=torch.bool))[0]
    for _ in range(_ROUNDS):
        tried = sorted({round(low + (high - low) * i / _SIZES) for i in range(_SIZES)})
        tried = [size for size in tried if low < size < high]
        if not tried:
            break
        kept_re = (~is_weight_e).repeat(len(tried), 1 + len(_DENSITIES), 1)
        for row_re, size in zip(kept_re, tried, strict=True):
            row_re[1:, weight_k] = random_sets(generator, _DENSITIES, count).to(row_re.device)
            row_re[:, weight_k[:size]] = True
        miss_rc = model.miss(kept_re.flatten(0, 1)).view(len(tried), -1)
        good = (miss_rc[:, 0].abs() <= level.allowed_miss) & (miss_rc.abs().mean(1) <= level.allowed_miss)
        first = next((place for place, each in enumerate(good.tolist()) if each), None)
        if first is None:
            low = tried[-1]
        else:
            low, high, best = tried[first - 1] if first else low, tried[first], miss_rc[first, 0]
    kept_e = ~is_weight_e
    kept_e[weight_k[:high]] = True
    return PrunedEdges(edges.select(kept_e), before, 1 - float(best.abs()))


class EdgeMaskedModel:
    """The circuit of a flow with any of its weights between nodes removed; removable_e marks the edges that can be removed."""

    def __init__(self, loss: CircuitLoss, flow: Flow, edges: Edges) -> None:
        self.loss, self.flow = loss, flow
        self.removable_e = torch.zeros_like(edges.kind_e, dtype=torch.bool)
        self.matrices: dict[tuple[int, str], _Matrix] = {}
        for layer in range(len(flow.sparse.blocks)):
            for name, (source, target) in flow.sparse.matrices.items():
                if name == "o" and flow.sparse.heads_of_keys != flow.sparse.heads_of_queries:
                    continue  # a value that heads share has several columns, which are not removed head by head
                kind = KINDS.index("value" if name == "o" else "weight")
                ends = Location(layer, source), Location(layer, target)
                here_e = (edges.kind_e == kind) & edges.ends.within(ends[0], edges.source_e)
                edge_e = (here_e & edges.ends.within(ends[1], edges.target_e)).nonzero().flatten()
                if len(edge_e):
                    self.removable_e[edge_e] = True
                    from_position_e, from_e = edges.ends.parts(ends[0], edges.source_e[edge_e])
                    position_e, to_e = edges.ends.parts(ends[1], edges.target_e[edge_e])
                    weight_e = flow.weight(layer, name)[to_e, from_e]
                    self.matrices[layer, name] = _Matrix(edge_e, weight_e, ends[0], from_position_e, from_e, position_e, to_e)

    @torch.no_grad()
    def miss(self, kept_re: Tensor) -> Tensor:
        """Return miss_r of the circuit with some of its edges; edges that are not weights between nodes are always kept."""
        return torch.cat([self._miss(some_re) for some_re in kept_re.split(self.loss.masked.rows_per_batch)])

    def _miss(self, kept_re: Tensor) -> Tensor:
        flow, value = self.flow, dict[Location, Tensor]()
        gate, correct = flow.masked.gates(flow.kept_f.expand(len(kept_re), -1))
        with ExitStack() as hooks:
            for layer, name in self.matrices:
                module = flow.sparse.get_submodule(f"blocks.{layer}.{name}")
                hooks.enter_context(module.register_forward_hook(partial(self._without, layer, name, value, ~kept_re)))
            recording = recording_gate(value, gate)
            trace = flow.sparse.run(flow.tokens_t.expand(len(kept_re), -1), gate=recording, correct=correct, last_only=True)
        return self.loss.miss(trace.logits_btv[:, -1])

    def _without(
        self, layer: int, name: str, value: dict[Location, Tensor], removed_re: Tensor, _module: Any, _given: Any, y_rtm: Tensor
    ) -> Tensor:
        """Subtract from a matrix's outputs what its removed edges add beyond the mean (a forward hook)."""
        its, masked = self.matrices[layer, name], self.flow.masked
        change_re = value[its.source][:, its.source_position_e, its.source_index_e] - masked.means[its.source][its.source_index_e]
        added_re = removed_re[:, its.edge_e] * its.weight_e * change_re
        if name == "o":
            pattern_rhtt = self.flow.sparse.pattern(layer, *(value[Location(layer, kind)] for kind in ("q", "k")))
            head_e = its.source_index_e // self.flow.sparse.channels
            added_re = added_re * pattern_rhtt[:, head_e, its.position_e, its.source_position_e]
        rows, _, wide = y_rtm.shape
        added_rf = torch.zeros(rows, y_rtm.shape[1] * wide, device=y_rtm.device)
        return y_rtm - added_rf.index_add_(1, its.position_e * wide + its.index_e, added_re).view(y_rtm.shape)
