"""The values that an Explanation consists of (tokens, nodes, edges, groups), and Explained, which lacks only JSON and rendering.

d is the question's log-odds in nats: of the answer against all other tokens, or against one other token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bridge.circuits.loss import SearchConfig
from bridge.evidence.measures import Report
from bridge.evidence.sufficiency import Backup, NestedCircuit
from bridge.graph.attention import ExplainedHead
from bridge.graph.groups import GroupEdge
from bridge.huggingface.prompts import describe_token
from bridge.models.circuit import EdgeKind


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary: its id, and a text that names only this token (`Prompts.text`)."""

    id: int
    text: str

    def __str__(self) -> str:
        """Return the text as a Python literal, and the id."""
        return describe_token(self.text, self.id)


@dataclass(frozen=True)
class Answer:
    """A next token and its probability."""

    token: Token
    probability: float


@dataclass(frozen=True)
class ExplainedNode:
    """A node of the opening circuit or of the next larger one, in the order of the computation; an error has kind `error`.

    activation is the node's value in the smaller of the two circuits that has it. mean is its mean over text, which replaces the
    value elsewhere. For an error, both are lengths of vectors. effect is the loss of d in nats when only this node is ablated
    from the opening circuit; None if the node is not in it, or was not measured (among thousands, only the nodes that matter most
    are). level is the index of the smallest nested circuit that has the node; group is the index of its group, None for nodes
    outside the opening circuit. An error's layer is its site. label is a few words on the channel, if `bridge nodes` was run.
    """

    id: str
    name: str
    layer: int
    kind: str
    index: int
    position: int
    activation: float
    mean: float
    effect: float | None
    level: int
    group: int | None
    label: str | None = None


@dataclass(frozen=True)
class ExplainedEdge:
    """An edge between two nodes of the opening circuit, given by their ids; `graph/flow` defines kinds, weights and effects."""

    source: str
    target: str
    kind: EdgeKind
    weight: float
    effect: float


@dataclass(frozen=True)
class ExplainedGroup:
    """Nodes of the opening circuit that do one job, and the effects of ablating all of them together.

    effect is the loss of d in nats when they are ablated from the circuit, sparse_effect when they are ablated from the sparse
    model with all its nodes, dense_effect in the dense model when the latter change is transported through the bridge at the site
    after the last node. name follows by rule from what the nodes read and write; a person or a language model writes label.
    """

    id: int
    name: str
    nodes: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    kind: str
    effect: float
    dense_effect: float | None
    sparse_effect: float | None = None
    label: str | None = None


@dataclass(frozen=True)
class Counts:
    """Sizes of the opening circuit: nodes (errors among them), edges (nonzero weights between two nodes), distinct weights.

    edges counts the edges that are left of edges_before after pruning, edges_faithfulness is that of the circuit with only these
    edges, None if there were too many to prune. Embedding, unembedding and bigram entries do not count as edges, and are counted
    separately. active is the number of nodes of the prompt that are not 0.
    """

    nodes: int
    errors: int
    edges: int
    edges_before: int
    edges_faithfulness: float | None
    weights: int
    embedding: int
    unembedding: int
    bigram: int
    active: int


@dataclass(frozen=True)
class Provenance:
    """Origin of an explanation. coupling_fingerprint is that of the sparse weights; blocks is the coupled span, or None."""

    dense: str
    dense_fingerprint: str
    coupling: str | None
    l0: float
    seed: int
    version: str
    reference: str
    coupling_fingerprint: str | None = None
    blocks: str | None = None


@dataclass(frozen=True)
class Answered:
    """The first part of an explanation: the question and both models' answers.

    contrast is None if the question is why this answer rather than any other. dense_d and sparse_d are d of the dense model, and
    of the sparse model by itself; nothing_d is d with every node and every error at its mean; span is dense_d - nothing_d.
    """

    prompt: str
    tokens: tuple[Token, ...]
    answer: Token
    contrast: Token | None
    dense: tuple[Answer, ...]
    sparse: tuple[Answer, ...]
    dense_d: float
    sparse_d: float
    nothing_d: float

    @property
    def span(self) -> float:
        """Part of d to explain, in nats."""
        return self.dense_d - self.nothing_d

    @property
    def agree(self) -> bool:
        """Whether the sparse model by itself gives the dense model's answer."""
        return self.dense[0].token.id == self.sparse[0].token.id


@dataclass(frozen=True)
class Drawn:
    """The part that is known before the evidence: the opening circuit as drawn, and sizes, the number of nodes by circuit.

    Effects of groups in the sparse model with all nodes and in the dense model are not known yet.
    """

    nodes: tuple[ExplainedNode, ...]
    edges: tuple[ExplainedEdge, ...]
    groups: tuple[ExplainedGroup, ...]
    group_edges: tuple[GroupEdge, ...]
    counts: Counts
    sizes: tuple[int, ...]
    opening: int


@dataclass(frozen=True)
class Explained(Answered):
    """Explanation of the dense model's answer by nested circuits of the sparse model, with the evidence.

    opening is the index in nested of the circuit that is drawn. replacement and completeness are defined as for attribution
    graphs: the share of the paths from input to answer, and of the nodes' inputs weighted by the nodes' influence, that flow
    through nodes rather than errors. backup is None if deleting the circuit alone removes enough of the span.
    """

    report: Report
    nested: tuple[NestedCircuit, ...]
    opening: int
    nodes: tuple[ExplainedNode, ...]
    edges: tuple[ExplainedEdge, ...]
    groups: tuple[ExplainedGroup, ...]
    group_edges: tuple[GroupEdge, ...]
    attention: tuple[ExplainedHead, ...]
    attention_left_out: int
    counts: Counts
    replacement: float
    completeness: float
    backup: Backup | None
    config: SearchConfig
    provenance: Provenance

    @property
    def group_correlation(self) -> float | None:
        """Pearson's correlation over the groups between the losses of d in the sparse and in the dense model.

        None if there are fewer than three groups, or all have the same loss in one of the models.
        """
        pairs = ((group.sparse_effect, group.dense_effect) for group in self.groups)
        loss_g2 = np.array([pair for pair in pairs if None not in pair], dtype=float)
        return float(np.corrcoef(loss_g2.T)[0, 1]) if len(loss_g2) >= 3 and np.ptp(loss_g2, axis=0).all() else None

    @property
    def circuit(self) -> NestedCircuit:
        """The nested circuit that is drawn."""
        return self.nested[self.opening]

    @property
    def opening_nodes(self) -> list[ExplainedNode]:
        """The nodes of the opening circuit with its errors; nodes of larger circuits are listed, but not drawn."""
        return [node for node in self.nodes if node.level <= self.opening]
