"""The edges that a prompt's circuit needs: the fewest whose contributions alone, all others at their means, keep its answer.

A `weight` edge adds W_ji (a_i - m_i) to its target before AbsTopK (of neurons before GELU), a `value` edge P_pp' W_ji (a_i - m_i)
with P the attention pattern. Removed, that is taken away, so that the edge says what it says in the mean; a and P are those of
the run with all such edges removed, in which every node and error outside the circuit is at its mean as well. Embedding entries,
scores, residual identities and what leads to the answer are not weights between two nodes, and stay.

Edges are taken in the order of their effects (`attribution`), and as few as are found to be within what the circuit is held to:
F alone, and the same in the mean over supersets of random other edges, without which removals may cancel each other.

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

_DENSITIES = np.array([0.25, 0.5, 0.75])  # of the other edges that supersets have
_SIZES = 8  # tried at a time
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class PrunedEdges:
    """Edges of a circuit, those that are no weights among them; before is how many of the others there were.

    faithfulness is that of the circuit with these alone, None where they are not pruned: there are too many to list.
    """

    edges: Edges
    before: int
    faithfulness: float | None


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The edges of one matrix: which they are, and what they lead from and to."""

    edge_e: Tensor
    weight_e: Tensor
    source: Location
    source_position_e: Tensor
    source_index_e: Tensor
    position_e: Tensor
    index_e: Tensor


@torch.no_grad()
def prune_edges(loss: CircuitLoss, flow: Flow, edges: Edges, level: Level, seed: int = 0) -> PrunedEdges:
    """The edges of a circuit without the weights that it does not need at a level."""
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
        good = (miss_rc[:, 0].abs() <= level.allowed) & (miss_rc.abs().mean(1) <= level.allowed)
        first = next((place for place, each in enumerate(good.tolist()) if each), None)
        if first is None:
            low = tried[-1]
        else:
            low, high, best = tried[first - 1] if first else low, tried[first], miss_rc[first, 0]
    kept_e = ~is_weight_e
    kept_e[weight_k[:high]] = True
    return PrunedEdges(edges.some(kept_e), before, 1 - float(best.abs()))


class EdgeMaskedModel:
    """The circuit of a flow with any of its weights between nodes removed; removable_e marks the edges that can be."""

    def __init__(self, loss: CircuitLoss, flow: Flow, edges: Edges) -> None:
        self.loss, self.flow = loss, flow
        self.removable_e = torch.zeros_like(edges.kind_e, dtype=torch.bool)
        self.matrices: dict[tuple[int, str], _Matrix] = {}
        for layer in range(len(flow.sparse.blocks)):
            for name, (source, target) in flow.sparse.matrices.items():
                if name == "o" and flow.sparse.heads_of_keys != flow.sparse.heads_of_queries:
                    continue  # a value that heads share is several columns, and is not removed head by head
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
        """miss_r of the circuit with some of its edges; what is no weight between nodes is always kept."""
        return torch.cat([self._miss(some_re) for some_re in kept_re.split(self.loss.masked.rows)])

    def _miss(self, kept_re: Tensor) -> Tensor:
        flow, value = self.flow, dict[Location, Tensor]()
        gate, correct = flow.masked.gates(flow.kept_f.expand(len(kept_re), -1))
        with ExitStack() as hooks:
            for layer, name in self.matrices:
                module = flow.sparse.get_submodule(f"blocks.{layer}.{name}")
                hooks.enter_context(module.register_forward_hook(partial(self._without, layer, name, value, ~kept_re)))
            recording = recording_gate(value, gate)
            trace = flow.sparse.run(flow.tokens_t.expand(len(kept_re), -1), gate=recording, correct=correct, last_only=True)
        first_r = torch.zeros(len(kept_re), dtype=torch.long, device=kept_re.device)
        return self.loss.miss(trace.logits_btv[:, -1], first_r)

    def _without(
        self, layer: int, name: str, value: dict[Location, Tensor], removed_re: Tensor, _module: Any, _given: Any, y_rtm: Tensor
    ) -> Tensor:
        """A forward hook: a matrix's outputs less what its removed edges add to them, beyond the mean."""
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
