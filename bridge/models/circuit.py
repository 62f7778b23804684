"""Circuits: which nodes of the sparse model are kept, and what replaces the others.

With a_i the value of node i after AbsTopK, m_i its mean over a reference corpus, and C the nodes that are kept (Gao et al. 2025,
section 2.2 and appendix A.5), the circuit alone is the model S_C in which, in the order of the computation,

    a_i  <-  a_i   if i is in C,     m_i   otherwise                                                mean ablation

With every node kept, S_C is S itself. A missing mean is an error, because zero in its place would give another model. A node that
AbsTopK leaves inactive has the value 0 if it is kept and m_i if not; it counts as a node like any other.

A node of a prompt is (location, position, channel); a node of a task is (location, channel), the same at every position. Circuits
of prompts are masks over the single row of a NodeSpace (`circuits/masked_model`).

Shape legend: b batch row, r row, t token, n nodes of a location, f all nodes of a prompt in one row (location by location,
position by position, channel by channel), s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from bridge.kernels.top_k import choose
from bridge.models.schema import ERROR
from bridge.models.sparse import Gate, Location, SparseTransformer

EMBEDDING = Location(-1, "embedding")  # these two are no node locations: never ablated, only ends of edges
BIGRAM = Location(-1, "bigram")
EdgeKind = Literal["weight", "value", "score", "gate", "residual", "embedding", "unembedding", "bigram", "error"]
KINDS: tuple[EdgeKind, ...] = get_args(EdgeKind)
COUNTED: tuple[EdgeKind, ...] = ("weight", "value")
_ROW_TOKENS = 4096  # tokens of the corpus in a batch: large enough for the products, small enough for the caches


@dataclass(frozen=True, order=True)
class Node:
    """A channel of a location, at one position of a prompt (None: at every position)."""

    location: Location
    index: int
    position: int | None = None

    @property
    def name(self) -> str:
        """The node without its position, as `L0.mlp_act[37]`; an error node has its site, as `error[3]`."""
        if self.location.kind == ERROR:
            return f"error[{self.location.layer}]"
        layer = f"L{self.location.layer}." if self.location.layer >= 0 else ""
        return f"{layer}{self.location.kind}[{self.index}]"

    def __str__(self) -> str:
        return self.name if self.position is None else f"{self.name}@{self.position}"


@dataclass(frozen=True)
class Edge:
    """Contribution of the source to the target on this prompt: weight, signed; effect, the same in terms of the question's d.

    For a task's circuit, whose nodes are at every position, weight is the entry W_ji itself, and effect the mean over prompts of
    what W_ji (a_i - m_i) adds to d at all positions, to first order.
    """

    source: Node
    target: Node
    kind: EdgeKind
    weight: float
    effect: float


@dataclass(frozen=True)
class NodeSpace:
    """Every node of a prompt in one row: maps from locations to the row, and back."""

    sizes: Mapping[Location, int]
    n_tokens: int

    @cached_property
    def size(self) -> int:
        """Number of nodes of the prompt."""
        return self.n_tokens * sum(self.sizes.values())

    @cached_property
    def first(self) -> dict[Location, int]:
        """Index of the first node of every location."""
        return dict(zip(self.sizes, accumulate((self.n_tokens * n for n in self.sizes.values()), initial=0), strict=False))

    def split(self, x_rf: Tensor) -> dict[Location, Tensor]:
        """Return x_rtn per location, as views of x_rf, which may have any number of leading axes."""
        lengths = [self.n_tokens * n for n in self.sizes.values()]
        parts = x_rf.split(lengths, -1)
        return {at: part.unflatten(-1, (self.n_tokens, n)) for (at, n), part in zip(self.sizes.items(), parts, strict=True)}

    def join(self, parts: Mapping[Location, Tensor]) -> Tensor:
        """Return x_rf from x_rtn per location."""
        return torch.cat([parts[location].flatten(-2) for location in self.sizes], -1)

    def repeat_by_location(self, values: Iterable[int]) -> Tensor:
        """Return x_f with one value for all nodes of a location; the values are given in the order of the locations."""
        return torch.tensor(list(values)).repeat_interleave(torch.tensor([self.n_tokens * n for n in self.sizes.values()]))

    def indices_by_location(self, node_k: Tensor) -> Iterator[tuple[Location, Tensor, Tensor]]:
        """Yield (location, which of node_k are there, their places t * n + index) for each location of some nodes."""
        for location, first in self.first.items():
            here_k = ((node_k >= first) & (node_k < first + self.n_tokens * self.sizes[location])).nonzero().flatten()
            if len(here_k):
                yield location, here_k, node_k[here_k] - first

    def index_of(self, node: Node) -> int:
        """Return the index of a node in the row."""
        return self.first[node.location] + (node.position or 0) * self.sizes[node.location] + node.index

    def node(self, flat: int) -> Node:
        """Return the node at an index of the row."""
        if flat >= self.size:
            raise IndexError(f"there are {self.size} nodes")
        location = next(at for at in reversed(self.first) if self.first[at] <= flat)
        position, index = divmod(flat - self.first[location], self.sizes[location])
        return Node(location, index, position)


@dataclass(frozen=True, eq=False)
class Circuit:
    """The channels kept for a task, named in `explains`: kept_1n (bool) and corpus means_n per location.

    `edges` are all weights between kept nodes, none pruned; None if they were not computed. Raises ValueError if a location has
    no mean, or if a mask is not one row of bools for all positions.
    """

    explains: str
    kept: Mapping[Location, Tensor]
    means: Mapping[Location, Tensor]
    edges: tuple[Edge, ...] | None = None

    def __post_init__(self) -> None:
        check_means(self.kept, self.means)
        for location, kept_tn in self.kept.items():
            if kept_tn.dtype != torch.bool or kept_tn.shape != (1, len(self.means[location])):
                wanted = f"bool of shape {(1, len(self.means[location]))}"
                raise ValueError(f"the mask at {location} is {kept_tn.dtype} of shape {tuple(kept_tn.shape)}, not {wanted}")

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The kept nodes, in the order of the computation."""
        return tuple(
            Node(location, index)
            for location, kept_tn in self.kept.items()
            for index in kept_tn.any(0).nonzero().flatten().tolist()
        )


def ablation_gate(kept: Mapping[Location, Tensor], means: Mapping[Location, Tensor]) -> Gate:
    """Return a gate that sets nodes outside the masks to their corpus mean; masks are kept_tn, or kept_rtn with one per row.

    Rows with their own masks must be in the order in which they enter the model, because a sublayer sees only rows that have
    entered. Raises ValueError if a location has no mean. The gate raises KeyError at a location without a mask.
    """
    check_means(kept, means)

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        here = kept[location][..., -x_btn.shape[1] :, :]  # a narrow run has the last position only
        return choose(here if here.dim() == 2 else here[: len(x_btn)], x_btn, means[location])

    return gate


def recording_gate(into: dict[Location, Tensor], gate: Gate | None = None) -> Gate:
    """Return a gate that stores every node's value in `into` (after `gate`, if given) and changes nothing else."""

    def record(location: Location, x_btn: Tensor) -> Tensor:
        into[location] = x_btn if gate is None else gate(location, x_btn)
        return into[location]

    return record


@torch.no_grad()
def corpus_means(sparse: SparseTransformer, tokens_bt: Tensor) -> dict[Location, Tensor]:
    """Return means_n of every node over a reference corpus, from the model's forward pass (after AbsTopK), and of the embedding.

    Raises ValueError for a corpus without tokens.
    """
    if not tokens_bt.numel():
        raise ValueError("corpus means need reference tokens, and there are none; give at least one block")
    sums: dict[Location, Tensor] = {}

    def add(location: Location, x_btn: Tensor) -> Tensor:
        total_n = x_btn.double().sum((0, 1)) if x_btn.device.type != "mps" else x_btn.sum((0, 1))
        sums[location] = sums[location] + total_n if location in sums else total_n
        return x_btn

    for rows_bt in tokens_bt.to(sparse.device).split(max(1, _ROW_TOKENS // tokens_bt.shape[1])):
        add(EMBEDDING, sparse.run(rows_bt, gate=add, last_only=True).residuals[0])
    return {location: (total_n / tokens_bt.numel()).to(sparse.embedding.dtype) for location, total_n in sums.items()}


def kl(from_v: Tensor, to_v: Tensor) -> Tensor:
    """Return KL(from, to), in nats, of next-token distributions given as logits, for any leading axes."""
    from_v, to_v = from_v.log_softmax(-1), to_v.log_softmax(-1)
    return (from_v.exp() * (from_v - to_v)).sum(-1)


def check_means(locations: Iterable[Location], means: Mapping[Location, Tensor]) -> None:
    """Raise ValueError if a location has no mean; zero does not replace one."""
    missing = [str(location) for location in locations if location not in means]
    if missing:
        raise ValueError(f"no corpus mean for {', '.join(missing)}; compute it with corpus_means (zero does not replace a mean)")
