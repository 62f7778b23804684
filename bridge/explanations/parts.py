"""The parts of an Explanation as values: tokens, nodes, edges, groups, and all of it without its JSON and its rendering.

d is the question's log-odds in nats: of the answer against all other tokens, or against one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bridge.circuits.loss import SearchConfig
from bridge.evidence.measures import Report
from bridge.evidence.sufficiency import Backup, NestedCircuit
from bridge.graph.attention import ExplainedHead
from bridge.graph.groups import GroupEdge
from bridge.huggingface.prompts import shown
from bridge.models.circuit import EdgeKind


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary: its id, and the text that names it and no other (`Prompts.text`)."""

    id: int
    text: str

    def __str__(self) -> str:
        """The text as Python would write it, and the id."""
        return shown(self.text, self.id)


@dataclass(frozen=True)
class Answer:
    """A next token and its probability."""

    token: Token
    probability: float


@dataclass(frozen=True)
class ExplainedNode:
    """A node of the opening circuit or of the one above it, in the order of the computation; an error is a node of kind `error`.

    activation and mean are its value in the smaller of the two circuits that has it, and its mean over text, which replaces it
    elsewhere (of an error the length of its vector, and of its mean); effect is what d loses, in nats, when the node alone is
    ablated from the opening circuit, None where it is not of it, or was not measured: in a circuit of thousands only the nodes
    that matter most are. level is the place of the first of the nested circuits that has the node; group that of its group among
    the groups, None for nodes above the opening circuit. An error's layer is its site. label is a few words on the
    channel, where `bridge nodes` was run.
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
    """An edge between two nodes of the opening circuit, named by their ids; `graph/flow` has kinds, weights and effects."""

    source: str
    target: str
    kind: EdgeKind
    weight: float
    effect: float


@dataclass(frozen=True)
class ExplainedGroup:
    """Nodes of the opening circuit that do one job: what they are, and what ablating all of them together does.

    effect is what d loses in the circuit, in nats, by intervention; sparse_effect what it loses in the sparse model with all its
    nodes, dense_effect in the dense model when that is transported through the bridge, at the site after the last of them. name
    is made by rule of what its members read and write; label is a person's or a language model's words.
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

    Edges are those that it was pruned to, out of edges_before, and edges_faithfulness is that of the circuit with these alone;
    None where there were too many to prune. Embedding, unembedding and bigram entries are no edges, and counted apart; active are
    all nodes of the prompt that are not 0.
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
    """Origin of an explanation; coupling_fingerprint is that of the sparse weights, blocks the span that was coupled, or None."""

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

    contrast is None where the question is why this answer rather than any other. dense_d, sparse_d are d of the dense model and
    of the sparse one by itself; nothing_d is d with every node and every error at its mean; span is dense_d less that.
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
        """Logit difference to explain, in nats."""
        return self.dense_d - self.nothing_d

    @property
    def agree(self) -> bool:
        """Whether the sparse model by itself gives the dense model's answer."""
        return self.dense[0].token.id == self.sparse[0].token.id


@dataclass(frozen=True)
class Drawn:
    """The part that is known before the evidence: the opening circuit, drawn; sizes are the nodes of each of the nested circuits.

    Effects of groups in the dense model are not known yet.
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
    """Why the dense model answers as it does: nested circuits of the sparse model that follow it, with the evidence.

    opening is the place, among nested, of the circuit that is drawn. replacement and completeness are those of attribution
    graphs: the share of the paths from input to answer, and of the inputs of nodes weighted by their influence, that flow
    through nodes rather than errors. backup is None where deleting the circuit takes enough of the span.
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
        """Pearson's correlation over the groups of what d loses by them in the sparse model and in the dense one.

        None of fewer than three groups, or where either is the same for all of them.
        """
        pairs = ((group.sparse_effect, group.dense_effect) for group in self.groups)
        loss_g2 = np.array([pair for pair in pairs if None not in pair], dtype=float)
        return float(np.corrcoef(loss_g2.T)[0, 1]) if len(loss_g2) >= 3 and np.ptp(loss_g2, axis=0).all() else None

    @property
    def circuit(self) -> NestedCircuit:
        """The nested circuit that the explanation opens at."""
        return self.nested[self.opening]
