"""A model at the last position of a task's prompts, with any of its nodes at their means; and the weights between its nodes.

A task's node is a channel of a location, at every position. With C the kept nodes, S_C is the model in which

    a_i  <-  a_i   if i is in C,     m_i   otherwise                                                mean ablation

so S_C with every node kept is the model itself, exactly. An edge is a nonzero entry of a matrix between two kept nodes. Each
model defines its matrices, and which node each of their rows and columns belongs to.

Shape legend: b prompt (row), t token, n nodes of a location, f all nodes of the model in one row, j, i rows and columns of a
matrix, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bridge.circuits.masked_model import last_logits
from bridge.data.task_tokens import TokenPairs
from bridge.models.circuit import NodeSpace, ablation_gate
from bridge.models.sparse import Gate, Location, SparseTransformer, identity_gate


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix weight_ji between nodes: the location and node of every column (source_i) and of every row (target_j)."""

    source: Location
    target: Location
    weight_ji: Tensor
    source_i: Tensor
    target_j: Tensor

    def edges_between(self, kept: Mapping[Location, Tensor]) -> Tensor:
        """Return the mask of the entries_ji that are edges between nodes of the masks kept_1n."""
        source_i, target_j = kept[self.source][0][self.source_i], kept[self.target][0][self.target_j]
        return (self.weight_ji != 0) & target_j[:, None] & source_i


class Subject(Protocol):
    """A model with nodes, and matrices between them."""

    @property
    def space(self) -> NodeSpace:
        """Every node in one row."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        ...

    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix between nodes."""
        ...


class SparseSubject:
    """The weight-sparse model, and the means of its nodes."""

    def __init__(self, sparse: SparseTransformer, means: Mapping[Location, Tensor]) -> None:
        self.sparse, self.means, self.device = sparse, means, sparse.device
        self.space = NodeSpace(sparse.locations(), 1)

    def logits(self, pairs: TokenPairs, gate: Gate = identity_gate) -> Tensor:
        """Return logits_bv after the prompts, with every node passed through the gate."""
        trace = self.sparse.run(pairs.prompt_bt, gate=gate, last_only=True)
        return last_logits(self.sparse, pairs.prompt_bt, pairs.last_b, trace)

    def matrices(self) -> tuple[Matrix, ...]:
        """Return every matrix between nodes."""
        return tuple(
            Matrix(
                Location(layer, source), Location(layer, target), weight_ji, self.sparse.column_nodes(name),
                torch.arange(len(weight_ji), device=weight_ji.device),
            )
            for layer in range(len(self.sparse.blocks))
            for name, (source, target) in self.sparse.matrices.items()
            for weight_ji in [self.sparse.get_parameter(f"blocks.{layer}.{name}.weight").detach()]
        )  # fmt: skip


def masked_gate(subject: SparseSubject, kept_f: Tensor) -> Gate:
    """Return the gate of a mask kept_f, or kept_bf with one mask for every prompt."""
    return ablation_gate(subject.space.split(kept_f), subject.means)


def edge_count(subject: Subject, kept_f: Tensor) -> int:
    """Return the number of nonzero weights between kept nodes."""
    kept = subject.space.split(kept_f)
    return sum(int(matrix.edges_between(kept).sum()) for matrix in subject.matrices())


def sort_pairs(pairs: TokenPairs) -> TokenPairs:
    """Return the pairs sorted by their tokens, so that nothing depends on the order in which they came."""
    rows = zip(
        *(x.tolist() for x in (pairs.last_b, pairs.prompt_bt, pairs.counterfactual_bt, pairs.answer_bk, pairs.wrong_bk)),
        range(len(pairs)), strict=True,
    )  # fmt: skip
    return pairs.rows(torch.tensor([row[-1] for row in sorted(rows)], dtype=torch.long, device=pairs.last_b.device))
