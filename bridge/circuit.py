"""Circuits: which nodes of the sparse model are kept, and what stands in for the others.

With a_i the value of node i after AbsTopK, m_i its mean over a reference corpus, and C the nodes that are kept (Gao et al. 2025,
section 2.2 and appendix A.5), the circuit alone is the model S_C in which, in the order of the computation,

    a_i  <-  a_i   where i is in C,     m_i   elsewhere                                             mean ablation

so that S_C with every node kept is S itself. A mean that is missing is an error: zero is another model. A node that AbsTopK has
silenced has the value 0 when kept and m_i when not; it is a node like any other, kept or not kept.

For a prompt, nodes are (location, position, channel), and the circuit answers a Question: why `target` rather than `contrast`
comes next, read off as the logit difference D = logit[target] - logit[contrast] at the last position.

What flows between the kept nodes, the edges, `flow` tells.

Shape legend: b batch row, r masked copy of one prompt, t token, n nodes of a location, f all nodes of a prompt in one row
(location by location, position by position, channel by channel), s sparse width, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from bridge.copies import Copies
from bridge.kernels.cpu import tokens_contiguous
from bridge.kernels.products import tokens_inside
from bridge.kernels.top_k import choose
from bridge.residual import Enter, Trace
from bridge.sparse import ERROR, Gate, Location, SparseTransformer

EMBEDDING = Location(-1, "embedding")  # not node locations: never ablated, only the ends of edges
BIGRAM = Location(-1, "bigram")
EdgeKind = Literal["weight", "value", "score", "residual", "embedding", "unembedding", "bigram", "error"]
KINDS: tuple[EdgeKind, ...] = get_args(EdgeKind)
COUNTED: tuple[EdgeKind, ...] = ("weight", "value")
_ROW_TOKENS = 4096  # tokens in a batch of masked copies: large enough for the products, small enough for the caches
_ROW_NODES = 1 << 26  # and mask entries, which outnumber the tokens by the nodes of a token


@dataclass(frozen=True, order=True)
class Node:
    """A channel of a location, at one position of a prompt (None: at every position)."""

    location: Location
    index: int
    position: int | None = None

    @property
    def name(self) -> str:
        """The node without its position, as `L0.mlp_act[37]`; of an error its site, as `error[3]`."""
        if self.location.kind == ERROR:
            return f"error[{self.location.layer}]"
        layer = f"L{self.location.layer}." if self.location.layer >= 0 else ""
        return f"{layer}{self.location.kind}[{self.index}]"

    def __str__(self) -> str:
        return self.name if self.position is None else f"{self.name}@{self.position}"


@dataclass(frozen=True)
class Edge:
    """What the source adds to the target on this prompt: weight, signed; effect, the same in terms of the answer D.

    Of a task's circuit, whose ends are at every position: weight is the entry W_ji itself, effect the mean over prompts of what
    W_ji (a_i - m_i) does to the search's loss, to first order; below 0 where the edge helps.
    """

    source: Node
    target: Node
    kind: EdgeKind
    weight: float
    effect: float


@dataclass(frozen=True, eq=False)
class Question:
    """Why `target` rather than `contrast` follows tokens_t. Raises ValueError where there is nothing to ask."""

    tokens_t: Tensor
    target: int
    contrast: int

    def __post_init__(self) -> None:
        if self.tokens_t.dim() != 1 or not len(self.tokens_t):
            raise ValueError(f"a prompt is a row of at least one token, not a tensor of shape {tuple(self.tokens_t.shape)}")
        if self.target == self.contrast:
            raise ValueError(f"target and contrast are both token {self.target}; ask about two different tokens")

    def difference(self, logits_rv: Tensor) -> Tensor:
        """D, the logit of target minus that of contrast."""
        return logits_rv[..., self.target] - logits_rv[..., self.contrast]


@dataclass(frozen=True)
class NodeSpace:
    """Every node of a prompt in one row, and back."""

    sizes: Mapping[Location, int]
    n_tokens: int

    @cached_property
    def size(self) -> int:
        """Number of nodes of the prompt."""
        return self.n_tokens * sum(self.sizes.values())

    def split(self, x_rf: Tensor) -> dict[Location, Tensor]:
        """x_rtn per location of x_rf: views, of any number of leading axes."""
        lengths = [self.n_tokens * n for n in self.sizes.values()]
        parts = x_rf.split(lengths, -1)
        return {at: part.unflatten(-1, (self.n_tokens, n)) for (at, n), part in zip(self.sizes.items(), parts, strict=True)}

    def join(self, parts: Mapping[Location, Tensor]) -> Tensor:
        """x_rf of x_rtn per location."""
        return torch.cat([parts[location].flatten(-2) for location in self.sizes], -1)

    def places(self, node_k: Tensor) -> Iterator[tuple[Location, Tensor, Tensor]]:
        """(location, which of node_k are there, their places t * n + index) for the locations of some nodes."""
        start = 0
        for location, n in self.sizes.items():
            here_k = ((node_k >= start) & (node_k < start + self.n_tokens * n)).nonzero().flatten()
            if len(here_k):
                yield location, here_k, node_k[here_k] - start
            start += self.n_tokens * n

    def place(self, node: Node) -> int:
        """The place of a node in the row."""
        start = 0
        for location, n in self.sizes.items():
            if location == node.location:
                return start + (node.position or 0) * n + node.index
            start += self.n_tokens * n
        raise KeyError(f"there is no node {node}")

    def node(self, flat: int) -> Node:
        """The node at a place of the row."""
        for location, n in self.sizes.items():
            if flat < self.n_tokens * n:
                return Node(location, flat % n, flat // n)
            flat -= self.n_tokens * n
        raise IndexError(f"there are {self.size} nodes")


@dataclass(frozen=True, eq=False)
class Circuit:
    """The nodes kept for a question: kept_tn (bool) and corpus means_n per location, and the losses that were measured.

    A circuit of a task, which is named, keeps channels at every position alike: its masks are kept_1n. `edges` are the weights
    that it was pruned to, None where every weight between kept nodes stays. Raises ValueError where a location has no mean, or
    a mask does not fit the prompt.
    """

    explains: Question | str
    kept: Mapping[Location, Tensor]
    means: Mapping[Location, Tensor]
    losses: Mapping[str, float]
    edges: tuple[Edge, ...] | None = None

    def __post_init__(self) -> None:
        check_means(self.kept, self.means)
        length = 1 if isinstance(self.explains, str) else len(self.explains.tokens_t)
        for location, kept_tn in self.kept.items():
            if kept_tn.dtype != torch.bool or kept_tn.shape != (length, len(self.means[location])):
                wanted = f"bool of shape {(length, len(self.means[location]))}"
                raise ValueError(f"the mask at {location} is {kept_tn.dtype} of shape {tuple(kept_tn.shape)}, not {wanted}")

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The kept nodes, in the order of the computation."""
        return tuple(
            Node(location, index, None if isinstance(self.explains, str) else position)
            for location, kept_tn in self.kept.items()
            for position, index in kept_tn.nonzero().tolist()
        )

    @property
    def question(self) -> Question:
        """What is asked of a prompt. Raises ValueError for the circuit of a task, which has no prompt of its own."""
        if isinstance(self.explains, str):
            raise ValueError(f"the circuit of the task {self.explains!r} has no prompt; this is about circuits of prompts")
        return self.explains

    @property
    def gate(self) -> Gate:
        """The gate that makes the sparse model this circuit alone."""
        return ablation_gate(self.kept, self.means)


def ablation_gate(kept: Mapping[Location, Tensor], means: Mapping[Location, Tensor]) -> Gate:
    """A gate under which nodes outside the masks have their corpus mean; kept_tn, or kept_rtn with a mask for every row.

    Rows with masks of their own must be in the order in which they enter the model, because a sublayer sees only those that have.
    Raises ValueError where a location has no mean, KeyError where the model has a location without a mask.
    """
    check_means(kept, means)

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        return choose(_mask_for(kept[location], x_btn), x_btn, means[location])

    return gate


def _mask_for(kept: Tensor, x_btn: Tensor) -> Tensor:
    """The rows and positions of kept_tn or kept_rtn that a sublayer computes: of a narrow run the last position alone."""
    kept = kept[..., -x_btn.shape[1] :, :]
    return kept if kept.dim() == 2 else kept[: len(x_btn)]


def recording_gate(into: dict[Location, Tensor], gate: Gate | None = None) -> Gate:
    """A gate that keeps what every node becomes (under `gate`, if given) and changes nothing more."""

    def record(location: Location, x_btn: Tensor) -> Tensor:
        into[location] = x_btn if gate is None else gate(location, x_btn)
        return into[location]

    return record


@torch.no_grad()
def corpus_means(sparse: SparseTransformer, tokens_bt: Tensor) -> dict[Location, Tensor]:
    """means_n of every node over a reference corpus, from the model's own forward (after AbsTopK), and of the embedding.

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


class Ablations:
    """The sparse model on one prompt, with any of its nodes at their corpus means."""

    def __init__(self, sparse: SparseTransformer, question: Question, means: Mapping[Location, Tensor]) -> None:
        self.sparse, self.question, self.means = sparse, question, means
        self.space = NodeSpace(sparse.locations(), len(question.tokens_t))
        check_means(self.space.sizes, means)
        self.tokens_1t = question.tokens_t.to(sparse.device)[None]
        values: dict[Location, Tensor] = {}
        with torch.no_grad():
            logits_1v = sparse.run(self.tokens_1t, gate=recording_gate(values), last_only=True).logits_btv[:, -1]
        self.value_f = self.space.join(values)[0]
        self.mean_f = self.space.join({at: means[at].expand(self.space.n_tokens, -1) for at in self.space.sizes})
        self.logits_v = logits_1v[0]
        sites = {at: torch.full((self.space.n_tokens, n), sparse.site(at)) for at, n in self.space.sizes.items()}
        self.site_f = self.space.join(sites)

    @cached_property
    def copies(self) -> Copies | None:
        """The masked copies by compiled kernels alone, where these serve the model."""
        return Copies.of(self.sparse, self.tokens_1t, self.means)

    @property
    def rows(self) -> int:
        """How many masked copies make a batch of sensible size."""
        return max(1, min(_ROW_TOKENS // self.space.n_tokens, _ROW_NODES // self.space.size))

    def run(self, kept_rf: Tensor, enter: Enter | None = None, *, narrow: bool = False) -> Trace:
        """Run a masked copy for every row, whose masks are bool, or mix mean (0) and value (1); logits of the last position.

        With narrow, what cannot reach them is not computed (see `SparseTransformer.run`).
        """
        kept = self.space.split(kept_rf)

        def mix(location: Location, x_rtn: Tensor, /) -> Tensor:
            kept_rtn = _mask_for(kept[location], x_rtn)
            kept_rtn = tokens_inside(kept_rtn) if tokens_contiguous(x_rtn) else kept_rtn
            return torch.lerp(self.means[location].to(x_rtn.dtype), x_rtn, kept_rtn)

        gate = ablation_gate(kept, self.means) if kept_rf.dtype == torch.bool else mix
        return self._run(len(kept_rf), enter, gate, narrow)

    def _run(self, rows: int, enter: Enter | None, gate: Gate, narrow: bool) -> Trace:
        return self.sparse.run(self.tokens_1t.expand(rows, -1), enter, gate, last_only=True, narrow=narrow)

    @torch.no_grad()
    def logits(self, kept_rf: Tensor) -> Tensor:
        """logits_rv at the last position, of any number of masks."""
        if self.copies is not None and len(kept_rf):
            return torch.cat([self.copies.logits(rows_rf) for rows_rf in kept_rf.split(self.rows)])
        return torch.cat([self.run(rows_rf, narrow=True).logits_btv[:, -1] for rows_rf in kept_rf.split(self.rows)])

    @torch.no_grad()
    def logits_without(self, kept_f: Tensor, node_r: Tensor) -> Tensor:
        """logits_rv of a mask less one node, a row for each of node_r; a row starts where its node's sublayer reads."""
        site_r = self.site_f[node_r.cpu()]
        if self.copies is not None and len(node_r):
            return self.copies.logits_without(kept_f, node_r, site_r, self.rows)
        whole = self.run(kept_f[None], narrow=True)
        logits_rv = whole.logits_btv[:, -1].repeat(len(node_r), 1)
        late_r = site_r >= self.sparse.narrow_from  # there the stream is that of the last position alone
        for part_r in (late_r.logical_not().nonzero().flatten(), late_r.nonzero().flatten()):
            in_order_r = part_r[torch.argsort(site_r[part_r], stable=True)]
            for row_r in in_order_r.split(self.rows) if len(part_r) else ():
                x_rts = torch.cat([whole.residuals[site] for site in site_r[row_r].tolist()])
                gate = self._deleting(kept_f, node_r[row_r.to(node_r.device)])
                logits_rv[row_r] = self._run(len(row_r), Enter(site_r[row_r], x_rts), gate, True).logits_btv[:, -1]
        return logits_rv

    def _deleting(self, kept_f: Tensor, node_r: Tensor) -> Gate:
        """The gate of a mask under which every row loses one node more: what masks of their own would do, which are larger."""
        keep = ablation_gate(self.space.split(kept_f), self.means)
        lost = {location: (row_k, place_k) for location, row_k, place_k in self.space.places(node_r)}

        def gate(location: Location, x_rtn: Tensor) -> Tensor:
            y_rtn = keep(location, x_rtn)
            if location in lost:
                (row_k, place_k), n = lost[location], x_rtn.shape[2]
                position_k = place_k // n - (self.space.n_tokens - x_rtn.shape[1])
                row_k, place_k, position_k = (each_k[position_k >= 0] for each_k in (row_k, place_k, position_k))
                y_rtn[row_k, position_k, place_k % n] = self.means[location][place_k % n].to(y_rtn.dtype)
            return y_rtn

        return gate

    def slopes(self, kept_rf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """slope_rf and loss_r: how loss(logits_rv) changes with every entry of masks that mix mean (0) and value (1).

        Bool masks are such masks too, and their slopes take less time: those of the nodes, times what the mask chooses between.
        """
        if self.copies is not None:
            return self.copies.slopes(kept_rf, loss)
        if kept_rf.dtype != torch.bool:
            kept_rf = kept_rf.detach().requires_grad_()
            with torch.enable_grad():
                loss_r = loss(self.run(kept_rf, narrow=True).logits_btv[:, -1])
                return torch.autograd.grad(loss_r.sum(), kept_rf)[0], loss_r.detach()
        return self._slopes(kept_rf, loss)

    def _slopes(self, kept_rf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        chosen: dict[Location, Tensor] = {}
        change: dict[Location, Tensor] = {}
        keep = ablation_gate(self.space.split(kept_rf), self.means)

        def gate(location: Location, x_rtn: Tensor) -> Tensor:
            y_rtn = keep(location, x_rtn)
            chosen[location] = y_rtn if y_rtn.requires_grad else y_rtn.requires_grad_()
            change[location] = x_rtn.detach() - self.means[location].to(x_rtn.dtype)
            return chosen[location]

        with torch.enable_grad():
            loss_r = loss(self._run(len(kept_rf), None, gate, True).logits_btv[:, -1])
            slopes = torch.autograd.grad(loss_r.sum(), list(chosen.values()))
        slope_rf = torch.zeros(kept_rf.shape, dtype=loss_r.dtype, device=loss_r.device)
        into = self.space.split(slope_rf)
        for (location, change_rtn), y_slope_rtn in zip(change.items(), slopes, strict=True):
            into[location][:, -change_rtn.shape[1] :] = y_slope_rtn * change_rtn
        return slope_rf, loss_r.detach()

    def kl(self, logits_rv: Tensor) -> Tensor:
        """KL(S, .) of the next-token distribution at the last position, in nats."""
        return kl(self.logits_v, logits_rv)

    @cached_property
    def answer(self) -> float:
        """D of the whole sparse model, kept away from 0 so that shares of it are finite."""
        answer = float(self.question.difference(self.logits_v))
        return answer if abs(answer) >= 1e-3 else math.copysign(1e-3, answer)


def kl(from_v: Tensor, to_v: Tensor) -> Tensor:
    """KL of next-token distributions by their logits, in nats, over any leading axes."""
    from_v, to_v = from_v.log_softmax(-1), to_v.log_softmax(-1)
    return (from_v.exp() * (from_v - to_v)).sum(-1)


def check_means(locations: Iterable[Location], means: Mapping[Location, Tensor]) -> None:
    """Raise ValueError where a location has no mean: zero is none."""
    missing = [str(location) for location in locations if location not in means]
    if missing:
        raise ValueError(f"no corpus mean for {', '.join(missing)}; take them with corpus_means (zero is not a mean)")
