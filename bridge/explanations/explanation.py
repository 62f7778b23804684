"""An Explanation as a value, and its JSON: what the dense model answers, the nested circuits that answer so, and the evidence.

It cannot be made without its Report. What is explained is the dense model's own answer, always: errors make the sparse model
follow the dense one on the prompt, and how much of the answer flows through them is said (`circuits/error_nodes`).

d is the question's log-odds in nats: of the answer against all other tokens, or against one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bridge.circuits.loss import SearchConfig
from bridge.errors import UserError
from bridge.evidence.measures import Report
from bridge.evidence.sufficiency import Backup, NestedCircuit
from bridge.graph.attention import ExplainedHead
from bridge.graph.groups import GroupEdge
from bridge.huggingface.prompts import shown
from bridge.models.bridges import Coupling
from bridge.models.circuit import EdgeKind
from bridge.models.schema import ERROR, KINDS
from bridge.models.store import CheckpointError, read_json, refused_unless_read
from bridge.nodes.statistics import sparse_fingerprint

FORMAT = 3  # of the JSON: docs/explanation-json.md; counted up where a field goes or changes its meaning, not where one comes


class ExplainError(UserError):
    """A prompt, answer or coupling that cannot be explained, in one line that says what to change."""


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

    effect is what d loses in the circuit, in nats, by intervention; dense_effect what it loses in the dense model when their
    ablation is transported through the bridge, at the site after the last of them. name is made by rule of what its members read
    and write; label is a person's or a language model's words.
    """

    id: int
    name: str
    nodes: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    kind: str
    effect: float
    dense_effect: float | None
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
    """Origin of an explanation; coupling_fingerprint is that of the sparse weights."""

    dense: str
    dense_fingerprint: str
    coupling: str | None
    l0: float
    seed: int
    version: str
    reference: str
    coupling_fingerprint: str | None = None


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
class Explanation(Answered):
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
    def circuit(self) -> NestedCircuit:
        """The nested circuit that the explanation opens at."""
        return self.nested[self.opening]

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain JSON values, the verdict written out: the contract of docs/explanation-json.md."""
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        values["report"] |= {"verdict": self.report.verdict, "reasons": list(self.report.reasons)}
        for measure, written in zip(self.report.measures, values["report"]["measures"], strict=True):
            written["passed"] = measure.passed
        return {"format": FORMAT, **values, "agree": self.agree, "span": self.span}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Explanation:
        """The explanation that `to_json` wrote. Raises ExplainError for anything else."""
        with refused_unless_read("this", "explanation", "explain again", ExplainError):
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            json.dumps(values, allow_nan=False)  # Python reads NaN, which is no JSON
            return _consistent(_READER.validate_python(values))

    def __str__(self) -> str:
        return _rendering().render_text(self)

    def _repr_html_(self) -> str:
        return _rendering().render_html(self)


def _rendering() -> Any:
    """The module that renders explanations, which needs them first."""
    return import_module("bridge.explanations.text")


_READER = TypeAdapter(Explanation)


def _consistent(explanation: Explanation) -> Explanation:
    """An explanation that was read, if its parts fit each other. Raises ValueError."""
    for name in ("tokens", "dense", "sparse"):
        if not getattr(explanation, name):
            raise ValueError(f"{name} is empty")
    length = len(explanation.tokens)
    for node in explanation.nodes:
        if not 0 <= node.position < length:
            raise ValueError(f"node {node.id!r} is at token {node.position} of {length}")
        if node.kind not in (kinds := (*KINDS, ERROR)):
            raise ValueError(f"node {node.id!r} is of kind {node.kind!r}, not one of {', '.join(kinds)}")
        if node.group is not None and not 0 <= node.group < len(explanation.groups):
            raise ValueError(f"node {node.id!r} is of group {node.group} of {len(explanation.groups)}")
    if not 0 <= explanation.opening < len(explanation.nested):
        raise ValueError(f"it opens at circuit {explanation.opening} of {len(explanation.nested)}")
    for head in explanation.attention:
        if not all(0 <= position < length for position in (head.query, *(read.position for read in head.reads))):
            raise ValueError(f"head {head.head} of layer {head.layer} reads beyond the {length} tokens")
    return explanation


def read_explanation(path: str | Path) -> Explanation:
    """The explanation in a JSON file. Raises ExplainError where there is none."""
    if not Path(path).is_file():
        raise ExplainError(f"there is no file {str(path)!r}", remedy="name one that `bridge explain` wrote")
    try:
        return Explanation.from_json(read_json(Path(path)))
    except ExplainError as error:
        raise ExplainError(f"{str(path)!r}: {error.what}", error.rule, error.remedy) from None
    except CheckpointError as error:
        raise ExplainError(
            f"{str(path)!r}", f"holds no explanation ({error.rule})", "name a file that `bridge explain` wrote"
        ) from None


@dataclass(frozen=True)
class Fingerprints:
    """Digests of a coupling's dense and sparse model; every weight is read for them."""

    dense: str
    sparse: str

    @staticmethod
    def of(coupling: Coupling) -> Fingerprints:
        """Digests of a coupling as it is now."""
        return Fingerprints(coupling.dense.fingerprint(), sparse_fingerprint(coupling.sparse))


def check_coupling(explanation: Explanation, coupling: Coupling, known: Fingerprints | None = None) -> None:
    """Raise ExplainError where an explanation is not of a coupling: of another dense model, or of other sparse weights.

    `known` are the coupling's fingerprints, where it is one that does not change.
    """
    made, where = explanation.provenance, coupling.path or "this coupling"
    known = Fingerprints.of(coupling) if known is None else known
    if known.dense != made.dense_fingerprint:
        raise ExplainError("the explanation", f"is not of {coupling.dense.name!r}, to which {where!r} is coupled", "name its own")
    if made.coupling_fingerprint not in (None, known.sparse):
        raise ExplainError(
            "the explanation", f"is of {made.coupling!r} with other weights than {where!r} has", "name its own, or explain again"
        )
