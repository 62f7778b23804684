"""A model whose nodes can be set to their means, asked at the last position of a task's prompts: a sparse or a dense one.

A node of a task is a channel of a location, at every position. With C the kept nodes, S_C is the model in which

    a_i  <-  a_i   where i is in C,     m_i   elsewhere                                             mean ablation

and S_C with every node kept is the model itself, exactly. Masks may also be numbers between mean (0) and value (1), and every
prompt may have a mask of its own, which is how random company is kept and how gradients are taken.

An edge is a nonzero entry of a matrix between two nodes; which matrices there are, and which node each of their rows and columns
belongs to, is for the model to say.

Shape legend: b prompt (row), t token, n nodes of a location, f all nodes of the model in one row, j, i rows and columns of a
matrix, s residual width, v vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bridge.circuit import NodeSpace, ablation_gate, corpus_means, recording_gate
from bridge.kernels.top_k import mix
from bridge.residual import Enter, Trace
from bridge.sparse import Gate, Location, SparseTransformer, identity_gate
from bridge.tasks.tokens import TokenPairs

ATTENDED = "attended"
_CORPUS_ROWS = 16

# Measured on two slow cores, forwards and backwards, in both models: a node is normalised, gated, and held by AbsTopK.
NODE_COST = 128  # entries of a dense matrix
NONZERO_COST = 8


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix weight_ji between nodes: the location and node of every column (source_i) and of every row (target_j).

    It is held by the linear map at `path`, of whose inputs input_i are its columns.
    """

    name: str
    source: Location
    target: Location
    weight_ji: Tensor
    source_i: Tensor
    target_j: Tensor
    path: str
    input_i: Tensor

    def inside(self, kept: Mapping[Location, Tensor]) -> Tensor:
        """Which entries_ji are edges between nodes of the masks kept_1n."""
        source_i, target_j = kept[self.source][0][self.source_i], kept[self.target][0][self.target_j]
        return (self.weight_ji != 0) & target_j[:, None] & source_i


class Subject(Protocol):
    """A model with nodes, their corpus means, and its next-token logits after a task's prompts."""

    @property
    def space(self) -> NodeSpace:
        """Every node in one row."""
        ...

    @property
    def means(self) -> Mapping[Location, Tensor]:
        """means_n of every location, from the model's own forward."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def cost(self) -> int:
        """What a token costs, in entries of dense matrices that it passes through: the unit in which work is counted."""
        ...

    def logits(self, pairs: TokenPairs, gate: Gate = identity_gate) -> Tensor:
        """logits_bv after the prompts, every node through the gate."""
        ...

    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix between nodes."""
        ...

    def linear(self, path: str) -> nn.Module:
        """The linear map at a path."""
        ...

    def copied(self) -> Subject:
        """The same model with weights of its own, which may be changed; every linear map between nodes has a bias."""
        ...


@dataclass(frozen=True, eq=False)
class SparseSubject:
    """The weight-sparse model."""

    sparse: SparseTransformer
    means: Mapping[Location, Tensor]

    @staticmethod
    def over(sparse: SparseTransformer, corpus_bt: Tensor) -> SparseSubject:
        """The model with its means over a corpus. Raises ValueError for a corpus without tokens."""
        return SparseSubject(sparse, {**corpus_means(sparse, corpus_bt), **attended_means(sparse, corpus_bt)})

    @property
    def space(self) -> NodeSpace:
        """Every node in one row."""
        return NodeSpace(self.sparse.locations(), 1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sparse.device

    @property
    def cost(self) -> int:
        """Entries of the blocks' matrices, or several for each nonzero where that is less; and the nodes.

        Which of the two is multiplied is measured when a model is loaded, and differs from day to day; the work must not.
        """
        return self._entries + NODE_COST * self.space.size

    @cached_property
    def _entries(self) -> int:
        weights = self.sparse.blocks.parameters()
        return sum(min(weight.numel(), NONZERO_COST * int(weight.count_nonzero())) for weight in weights)

    def logits(self, pairs: TokenPairs, gate: Gate = identity_gate) -> Tensor:
        """logits_bv after the prompts, every node through the gate."""
        return self.last_logits(pairs, self.sparse.run(pairs.prompt_bt, gate=gate, last_only=True))

    def last_logits(self, pairs: TokenPairs, trace: Trace) -> Tensor:
        """logits_bv after the prompts, of a run of them that was asked for those of the last position alone."""
        if bool((pairs.last_b == pairs.prompt_bt.shape[1] - 1).all()):
            return trace.logits_btv[:, -1]
        # prompts of several lengths: what is at their last tokens enters at the last site, as rows of one token
        row_b = torch.arange(len(pairs), device=pairs.last_b.device)
        x_b1s = trace.residuals[-1].permute(2, 0, 1)[:, row_b, pairs.last_b].t()[:, None]  # so gradients lie as it does
        token_b1 = pairs.prompt_bt[row_b, pairs.last_b][:, None]
        return self.sparse.run(token_b1, Enter.at(self.sparse.n_sites - 1, x_b1s)).logits_btv[:, 0]

    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix between nodes."""
        return tuple(
            Matrix(
                f"{layer}.{name}", Location(layer, source), Location(layer, target), weight_ji, self.sparse.column_nodes(name),
                torch.arange(len(weight_ji), device=weight_ji.device), f"blocks.{layer}.{name}",
                torch.arange(weight_ji.shape[1], device=weight_ji.device),
            )
            for layer in range(len(self.sparse.blocks))
            for name, (source, target) in self.sparse.matrices.items()
            for weight_ji in [self.sparse.get_parameter(f"blocks.{layer}.{name}.weight").detach()]
        )  # fmt: skip

    def linear(self, path: str) -> nn.Module:
        """The linear map at a path."""
        return self.sparse.get_submodule(path)

    def copied(self) -> SparseSubject:
        """The same model with weights of its own, which may be changed."""
        return SparseSubject(copy.deepcopy(self.sparse).requires_grad_(False), self.means)


@torch.no_grad()
def attended_means(sparse: SparseTransformer, corpus_bt: Tensor) -> dict[Location, Tensor]:
    """means_n, at (layer, attended), of what attention hands to its output matrix: values under the pattern, no nodes."""
    sums: dict[Location, Tensor] = {}

    def add(location: Location, _module: nn.Module, args: tuple[Tensor]) -> None:
        total_n = args[0].sum((0, 1), dtype=torch.float64 if args[0].device.type != "mps" else None)
        sums[location] = sums.get(location, 0) + total_n

    with ExitStack() as hooks:
        for layer in range(len(sparse.blocks)):
            at = Location(layer, ATTENDED)
            hooks.enter_context(sparse.get_submodule(f"blocks.{layer}.o").register_forward_pre_hook(partial(add, at)))
        for rows_bt in corpus_bt.to(sparse.device).split(_CORPUS_ROWS):
            sparse.run(rows_bt, last_only=True)
    return {location: (total_n / corpus_bt.numel()).to(sparse.embedding.dtype) for location, total_n in sums.items()}


def masked_gate(subject: Subject, kept_f: Tensor) -> Gate:
    """The gate of a mask kept_f, or kept_bf with one for every prompt: bool, or numbers that mix mean (0) and value (1)."""
    kept = subject.space.split(kept_f)
    if kept_f.dtype == torch.bool:
        return ablation_gate(kept, subject.means)

    return lambda location, x_btn: mix(kept[location].squeeze(-2), x_btn, subject.means[location])


def recorded(subject: Subject, pairs: TokenPairs, gate: Gate = identity_gate) -> dict[Location, Tensor]:
    """value_btn of every node on some prompts, under a gate."""
    values: dict[Location, Tensor] = {}
    with torch.no_grad():
        subject.logits(pairs, recording_gate(values, gate))
    return values


def edge_count(subject: Subject, kept_f: Tensor) -> int:
    """Number of nonzero weights between kept nodes."""
    kept = subject.space.split(kept_f)
    return sum(int(matrix.inside(kept).sum()) for matrix in subject.matrices())


def in_order(pairs: TokenPairs) -> TokenPairs:
    """The pairs in an order of their own, so that nothing depends on the one in which they came."""
    rows = zip(
        *(x.tolist() for x in (pairs.last_b, pairs.prompt_bt, pairs.counterfactual_bt, pairs.answer_bk, pairs.wrong_bk)),
        range(len(pairs)), strict=True,
    )  # fmt: skip
    return pairs.rows(torch.tensor([row[-1] for row in sorted(rows)], dtype=torch.long, device=pairs.last_b.device))
