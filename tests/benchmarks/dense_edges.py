"""Find the weights that a prompt's circuit in a GPT-2-shaped dense model needs, by the pruning used for sparse models.

Every weight between two kept nodes is an edge: W_ji from read to query, key, value or neuron, and from neuron to write, at each
token; and from a value at p' to attention's write at p >= p' with the pattern P_pp'. Removing an edge subtracts W_ji (a_i - m_i),
times P_pp', before the target's nonlinearity. Edges are ranked by their first-order effects on the answer, and the fewest are
kept that reach F .9 alone and in the mean over supersets of random other edges (`graph/edge_pruning` does this for a coupling).

Shape legend: r masked copy with edges removed, e edge, t token, n nodes of a location, f all nodes in one row.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.dense_nodes import DenseSubject
from bridge.circuits.loss import CircuitLoss, Level, random_sets
from bridge.circuits.subject import Matrix
from bridge.models.sparse import Location

MODULES = {"c_attn": "attn.c_attn", "attn_out": "attn.c_proj", "mlp_act": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
_DENSITIES, _SIZES, _ROUNDS, _ROWS = np.array([0.25, 0.5, 0.75]), 8, 3, 8


@dataclass(frozen=True, eq=False)
class _Edges:
    """Edges of a matrix: their slice among all edges, and their ends."""

    matrix: Matrix
    where: slice
    weight_e: Tensor
    from_e: Tensor  # token and node of the source
    source_e: Tensor
    to_e: Tensor
    target_e: Tensor


class DenseEdges:
    """Circuit of the dense model with any of its weights removed."""

    def __init__(self, subject: DenseSubject, loss: CircuitLoss, kept_f: Tensor) -> None:
        self.subject, self.loss, self.kept_f = subject, loss, kept_f
        kept, self.parts, self.count = loss.masked.space.split(kept_f), list[_Edges](), 0
        for matrix in subject.matrices():
            source_k, target_k = (
                kept[matrix.source][:, matrix.source_i].nonzero(),
                kept[matrix.target][:, matrix.target_j].nonzero(),
            )
            from_te = source_k[:, 0][None] <= target_k[:, 0][:, None]
            same_te = source_k[:, 0][None] == target_k[:, 0][:, None]
            entry_te = matrix.weight_ji[target_k[:, 1][:, None], source_k[:, 1][None]]
            to, at = ((from_te if matrix.target.kind == "attn_out" else same_te) & (entry_te != 0)).nonzero(as_tuple=True)
            where = slice(self.count, self.count + len(to))
            self.count = where.stop
            if len(to):
                ends = source_k[at, 0], matrix.source_i[source_k[at, 1]], target_k[to, 0], target_k[to, 1]
                self.parts.append(_Edges(matrix, where, entry_te[to, at], *ends))

    def logits(self, kept_re: Tensor) -> Tensor:
        """Return logits_rv of the circuit with some of its edges; a fraction keeps a part of an edge."""
        rows, value, question = len(kept_re), dict[Location, Tensor](), self.loss.masked.question
        gate, _ = self.loss.masked.gates(self.kept_f.expand(rows, -1), torch.zeros(rows, dtype=torch.long))

        def recorded(at: Location, x_rtn: Tensor) -> Tensor:
            value[at] = gate(at, x_rtn)
            return value[at]

        def removing(edges: _Edges) -> Any:
            def hook(_module: Any, _args: Any, y_rtn: Tensor) -> Tensor:
                at = edges.matrix.source
                change_re = value[at][:, edges.from_e, edges.source_e] - self.subject.means[at][edges.source_e]
                change_re = change_re * edges.weight_e * (1 - kept_re[:, edges.where])
                if edges.matrix.target.kind == "attn_out":
                    pattern_rhtt, width = self._pattern(value[at])
                    head_e = (edges.source_e - 2 * width) // (width // pattern_rhtt.shape[1])
                    change_re = change_re * pattern_rhtt[:, head_e, edges.to_e, edges.from_e]
                flat_re = edges.to_e * y_rtn.shape[-1] + edges.target_e
                return y_rtn - torch.zeros_like(y_rtn).flatten(1).index_add(1, flat_re, change_re).view_as(y_rtn)

            return hook

        model: Any = self.subject.dense.model
        with ExitStack() as hooks:  # run before the gates' hooks, which are registered later
            for edges in self.parts:
                module = model.transformer.h[edges.matrix.target.layer].get_submodule(MODULES[edges.matrix.target.kind])
                hooks.enter_context(module.register_forward_hook(removing(edges)))
            return self.subject.run(question.prompt_bt.expand(rows, -1), recorded)[:, -1]

    def _pattern(self, qkv_rtn: Tensor) -> tuple[Tensor, int]:
        """Return the attention pattern_rhtt of some queries and keys, and the model's width."""
        config: Any = self.subject.dense.model.config
        q, k, _ = (x.unflatten(-1, (config.n_head, -1)).transpose(1, 2) for x in qkv_rtn.split(config.n_embd, -1))
        score_rhtt = q @ k.mT / q.shape[-1] ** 0.5
        future_tt = torch.ones(score_rhtt.shape[-2:], dtype=torch.bool).triu(1)
        return score_rhtt.masked_fill(future_tt, -torch.inf).softmax(-1), config.n_embd

    @torch.no_grad()
    def _miss(self, kept_re: Tensor) -> Tensor:
        return torch.cat([self.loss.miss(self.logits(some_re)) for some_re in kept_re.float().split(_ROWS)])

    def needed(self, level: Level) -> int:
        """Return the number of edges that the circuit needs at a level; all of them if no smaller number is found."""
        if not self.count:
            return 0
        mask_1e = torch.ones(1, self.count, requires_grad=True)
        with torch.enable_grad():
            (gradient_1e,) = torch.autograd.grad(self.loss.miss(self.logits(mask_1e)).sum(), mask_1e)
        order_e = gradient_1e[0].abs().argsort(descending=True, stable=True)
        generator, low, high = np.random.default_rng(0), -1, self.count
        for _ in range(_ROUNDS):
            tried = sorted({round(low + (high - low) * i / _SIZES) for i in range(_SIZES)})
            tried = [size for size in tried if low < size < high]
            if not tried:
                break
            kept_rue = torch.zeros(len(tried), 1 + len(_DENSITIES), self.count, dtype=torch.bool)
            for row_ue, size in zip(kept_rue, tried, strict=True):
                row_ue[1:] = random_sets(generator, _DENSITIES, self.count)
                row_ue[:, order_e[:size]] = True
            miss_ru = self._miss(kept_rue.flatten(0, 1)).view(len(tried), -1).abs()
            good = ((miss_ru[:, 0] <= level.allowed_miss) & (miss_ru.mean(1) <= level.allowed_miss)).tolist()
            first = next((place for place, each in enumerate(good) if each), None)
            low, high = (tried[-1], high) if first is None else (tried[first - 1] if first else low, tried[first])
        return high
