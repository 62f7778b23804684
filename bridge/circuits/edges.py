"""The edges of a task's circuit, pruned as its nodes were: which nonzero weights between kept nodes are needed.

A weight W_ji from node i to node j that is removed carries its mean in place of its value,

    W_ji a_i  ->  W_ji m_i,            so        W_ji <- 0,   b_j <- b_j + W_ji m_i

which is the same model with other weights and biases, run as ever. m_i is the mean that stands in for the node itself; for the
weights that read values through the attention pattern, the mean over the corpus of what they read. Weights with an end outside
the circuit stay: their sources are at their means already, and with none removed this is the circuit of the nodes, exactly.

1. scores      To first order, removing an edge takes  (d loss / d j) W_ji (a_i - m_i), summed over positions and prompts, from
               the loss: the gradients of W and b at the circuit give it for all edges at once.
2. bisection   The fewest edges by the magnitude of their score that keep the loss within the bound, alone and in company.
3. deletions   Scores again, at what is left; as many of the cheapest together as the bound allows; over and over.

Embedding, unembedding and bigram entries are no edges, and neither is a residual write that a later sublayer reads.

Shape legend: e edges in one row, c circuit, k some edges by their place, f all nodes in one row, j, i rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridge.circuit import Edge, Node
from bridge.circuits.masks import GIVEN_UP, ROWS, Goal, masked_loss
from bridge.circuits.subject import ATTENDED, Matrix, SparseSubject
from bridge.kernels.products import Compact, source_of
from bridge.prune import deleted, fewest
from bridge.sparse import Location


@dataclass(frozen=True, eq=False)
class FoundEdges:
    """The edges that are left of how many there were, the loss with them, and whether deletions ran to their end."""

    edges: tuple[Edge, ...]
    n_before: int
    loss: float
    complete: bool


class Pruned:
    """A sparse model of which single weights carry their mean; `subject` is what is left of it, changed in place."""

    def __init__(self, subject: SparseSubject) -> None:
        self.before = {matrix.name: matrix for matrix in subject.matrices()}
        self.subject = SparseSubject(copy.deepcopy(subject.sparse).requires_grad_(False), subject.means)
        self.patterns = {name: matrix.pattern for name, matrix in subject.sparse.compact.items()}
        self.bias = {name: self._linear(name).bias.detach().clone() for name in self.before}

    def _linear(self, name: str) -> nn.Linear:
        linear = self.subject.sparse.get_submodule(f"blocks.{name}")
        assert isinstance(linear, nn.Linear)
        return linear

    def mean(self, matrix: Matrix) -> Tensor:
        """mean_i of what each column reads. Raises ValueError where there is none."""
        at = Location(matrix.source.layer, ATTENDED) if matrix.source.kind == "v" else matrix.source
        if at not in self.subject.means:
            raise ValueError(f"no corpus mean for {at}; take them with SparseSubject.over (zero is not a mean)")
        return self.subject.means[at]

    @torch.no_grad()
    def remove(self, removed: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Remove the entries (row_k, column_k) of each matrix, and put back all others."""
        for name, matrix in self.before.items():
            linear = self._linear(name)
            linear.weight.copy_(matrix.weight_ji)
            linear.bias.copy_(self.bias[name])
            if name in removed and len(removed[name][0]):
                row_k, column_k = removed[name]
                linear.bias.index_add_(0, row_k, matrix.weight_ji[row_k, column_k] * self.mean(matrix)[column_k])
                linear.weight[row_k, column_k] = 0
            self._repack(f"blocks.{name}.weight", linear.weight)

    def _repack(self, name: str, weight_ji: Tensor) -> None:
        """The same pattern, with zeros where edges are gone: to find the nonzeros anew would take longer than to run them."""
        if pattern := self.patterns.get(name):
            value_p = weight_ji.detach().reshape(-1)[pattern.index_p]
            self.subject.sparse.compact[name] = Compact(pattern, value_p, source=source_of(weight_ji))

    def slopes(self, goal: Goal, kept_f: Tensor, entries: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """slope_k: how the loss changes with how much each entry is there (1) rather than its mean (0)."""
        linears = {name: self._linear(name) for name in entries}
        parameters = [parameter for linear in linears.values() for parameter in (linear.weight, linear.bias)]
        mask_f = kept_f.to(parameters[0].dtype)
        for parameter in parameters:
            parameter.requires_grad_()
        try:
            with torch.enable_grad():
                for row_b in torch.arange(len(goal.pairs), device=kept_f.device).split(ROWS):
                    loss = masked_loss(goal, mask_f, row_b, goal.company_bf[row_b])
                    (loss * len(row_b) / len(goal.pairs)).backward()
            slopes = {}
            for name, (row_k, column_k) in entries.items():
                linear, matrix = linears[name], self.before[name]
                assert linear.weight.grad is not None and linear.bias.grad is not None
                slope_k = linear.weight.grad[row_k, column_k] - linear.bias.grad[row_k] * self.mean(matrix)[column_k]
                slopes[name] = slope_k * matrix.weight_ji[row_k, column_k]
            return slopes
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


def pruned_to(subject: SparseSubject, edges: Iterable[Edge], kept_f: Tensor) -> SparseSubject:
    """The model in which, of the weights between kept nodes, those that are no edges carry their mean."""
    wanted: dict[tuple[Location, Location], list[tuple[int, int]]] = {}
    for edge in edges:
        wanted.setdefault((edge.source.location, edge.target.location), []).append((edge.target.index, edge.source.index))
    pruned, kept = Pruned(subject), subject.space.split(kept_f)
    removed = {}
    for name, matrix in pruned.before.items():
        gone_ji = matrix.inside(kept)
        if (matrix.source, matrix.target) in wanted:
            row_k, column_k = torch.tensor(wanted[matrix.source, matrix.target], device=gone_ji.device).unbind(1)
            gone_ji[row_k, column_k] = False
        removed[name] = _places(gone_ji)
    pruned.remove(removed)
    return pruned.subject


class EdgeGoal:
    """What `fewest` and `deleted` ask about sets of edges of a circuit."""

    def __init__(self, goal: Goal, kept_f: Tensor) -> None:
        assert isinstance(goal.subject, SparseSubject)
        self.kept_f, self.bound, self.left = kept_f, goal.bound, goal.left
        self.pruned = Pruned(goal.subject)
        self.goal = copy.copy(goal)
        self.goal.subject = self.pruned.subject
        kept = goal.subject.space.split(kept_f)
        self.entries = {name: _places(matrix.inside(kept)) for name, matrix in self.pruned.before.items()}
        self.sizes = [len(row_k) for row_k, _ in self.entries.values()]

    def _parts(self, x_e: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.entries, x_e.split(self.sizes), strict=True))

    def _set(self, kept_e: Tensor) -> None:
        parts = self._parts(kept_e)
        self.pruned.remove({name: (rows[~parts[name]], columns[~parts[name]]) for name, (rows, columns) in self.entries.items()})

    def loss(self, kept_e: Tensor) -> float:
        """The loss of the circuit with some of its edges."""
        self._set(kept_e)
        value = float(self.goal.loss(self.kept_f[None]))
        self.left = self.goal.left
        return value

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some sets of edges, smaller ones first, that is within the bound where the one before is not."""
        low, high = -1, len(kept_cf)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.loss(kept_cf[middle]) <= self.bound else (middle, high)
        return high

    def slopes(self, kept_e: Tensor) -> Tensor:
        """slope_e of the loss at some of the edges."""
        self._set(kept_e)
        self.goal.left -= 3 * self.goal.terms * self.goal.tokens * self.goal.subject.cost
        self.left = self.goal.left
        slopes = self.pruned.slopes(self.goal, self.kept_f, self.entries)
        return torch.cat([slopes[name] for name in self.entries])

    def cost(self, n: int) -> float:
        """The work of `without`."""
        return 4.0 * self.goal.terms * self.goal.tokens * self.goal.subject.cost

    def without(self, kept_f: Tensor, node_k: Tensor) -> Tensor:
        """loss_k without each of some edges, to first order."""
        return self.loss(kept_f) - self.slopes(kept_f)[node_k]

    def edges(self, kept_e: Tensor) -> tuple[Edge, ...]:
        """The edges of a mask, with their weights and what they do to the loss, the largest first."""
        slopes, parts = self._parts(self.slopes(kept_e)), self._parts(kept_e)
        found = []
        for name, (row_k, column_k) in self.entries.items():
            matrix = self.pruned.before[name]
            kind = "value" if matrix.source.kind == "v" else "weight"
            for row, column, effect in zip(
                row_k[parts[name]].tolist(), column_k[parts[name]].tolist(), slopes[name][parts[name]].tolist(), strict=True
            ):
                ends = Node(matrix.source, column), Node(matrix.target, row)
                found.append(Edge(*ends, kind, float(matrix.weight_ji[row, column]), effect))
        return tuple(sorted(found, key=lambda edge: (-abs(edge.effect), edge.source.location, edge.source.index)))


def find_edges(goal: Goal, kept_f: Tensor, progress: Callable[[str], None] | None = None) -> FoundEdges:
    """The edges of a task's circuit, by the search that the module describes, within the goal's work."""
    say = progress or (lambda _: None)
    judge = EdgeGoal(goal, kept_f)
    whole_e = torch.ones(sum(judge.sizes), dtype=torch.bool, device=kept_f.device)
    say(f"edges: {len(whole_e):,} weights between nodes")
    if not len(whole_e):
        return FoundEdges((), 0, judge.loss(whole_e), True)
    order_e = judge.slopes(whole_e).abs().argsort(descending=True, stable=True)
    kept_e = fewest(judge, torch.zeros_like(whole_e), order_e, max(1, len(order_e) // 3))
    kept_e, complete = deleted(judge, kept_e, lambda text: say(text.replace("nodes", "edges")), GIVEN_UP)
    return FoundEdges(judge.edges(kept_e), len(whole_e), judge.loss(kept_e), complete)


def _places(mask_ji: Tensor) -> tuple[Tensor, Tensor]:
    """(row_k, column_k) of the entries of a mask."""
    row_k, column_k = mask_ji.nonzero().unbind(1)
    return row_k, column_k
