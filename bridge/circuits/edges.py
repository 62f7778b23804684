"""The edges of a task's circuit, pruned as its nodes were: which nonzero weights between kept nodes are needed.

A weight W_ji from node i to node j that is removed carries its mean in place of its value,

    W_ji a_i  ->  W_ji m_i,            so        W_ji <- 0,   b_j <- b_j + W_ji m_i

which is the same model with other weights and biases, run as ever. m_i is the mean that stands in for the node itself; for the
weights that read values through the attention pattern, the mean over the corpus of what they read. The dense model's edges are
pruned in the same way, between its own nodes. Weights with an end outside the circuit stay: their sources are at their means
already, and with none removed this is the circuit of the nodes, exactly.

1. scores      To first order, removing an edge takes  (d loss / d j) W_ji (a_i - m_i), summed over positions and prompts, from
               the loss: the gradients of W and b give it for all edges at once, for those that are removed as well.
2. masks       The descent of `descent.descend` with these slopes, on the prompts that the nodes were learnt from.
3. threshold   The fewest edges by tau that keep the loss within the bound on other prompts, alone and in company.
4. deletions   Scores again, at what is left; as many of the cheapest together as the bound allows; over and over.

Embedding, unembedding and bigram entries are no edges, and neither is a residual write that a later sublayer reads.

Shape legend: e edges in one row, c circuit, k some edges by their place, f all nodes in one row, j, i rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bridge.circuit import Edge, Node
from bridge.circuits.descent import descend
from bridge.circuits.masks import GIVEN_UP, ROWS, Goal, backward, drawn
from bridge.circuits.subject import ATTENDED, Matrix, SparseSubject, Subject
from bridge.fewest import bisected, deleted, fewest
from bridge.kernels.products import Compact, source_of
from bridge.sparse import Location

STEPS, FEWEST_STEPS = 300, 30
DESCENT_SHARE = 0.8  # of the work


@dataclass(frozen=True, eq=False)
class FoundEdges:
    """How many edges are left of how many there were, the loss with them, whether deletions ran to their end; and themselves."""

    n: int
    n_before: int
    loss: float
    complete: bool
    edges: tuple[Edge, ...]


Entries = tuple[Tensor, Tensor]  # (row_k, column_k) of a matrix


class Pruned:
    """A model of which single weights carry their mean; `subject` is what is left of it, changed in place."""

    def __init__(self, subject: Subject) -> None:
        self.before = {matrix.name: matrix for matrix in subject.matrices()}
        self.subject = subject.copied()
        self.bias = {name: self._linear(name).bias.detach().clone() for name in self.before}
        self.all_inputs = {
            name for name, matrix in self.before.items() if matrix.input_i.tolist() == [*range(self._inputs(name))]
        }
        # where the model is run through its nonzeros, their places; to find them anew would take longer than to run them
        compact = subject.sparse.compact if isinstance(subject, SparseSubject) else {}
        self.patterns = {name: compact[key].pattern for name in self.before if (key := _key(self.before[name])) in compact}

    def _linear(self, name: str) -> Any:
        return self.subject.linear(self.before[name].path)

    def _inputs(self, name: str) -> int:
        return _weight(self._linear(name)).shape[1]

    def mean(self, matrix: Matrix) -> Tensor:
        """mean_i of what each column reads. Raises ValueError where there is none."""
        attended = matrix.target.kind == "attn_out"
        at = Location(matrix.source.layer, ATTENDED) if attended else matrix.source
        if at not in self.subject.means:
            raise ValueError(f"no corpus mean for {at}; take them over the corpus with the subject (zero is not a mean)")
        return self.subject.means[at][matrix.input_i if attended else matrix.source_i]

    @torch.no_grad()
    def remove(self, removed: Mapping[str, Entries]) -> None:
        """Remove the entries (row_k, column_k) of each matrix, and put back all others."""
        for name in self.before:  # first, since several matrices may be columns of one map
            self._linear(name).bias.copy_(self.bias[name])
        for name, matrix in self.before.items():
            linear, weight_ji = self._linear(name), _weight(self._linear(name))
            if name in self.all_inputs:
                weight_ji.copy_(matrix.weight_ji)
            else:
                weight_ji[:, matrix.input_i] = matrix.weight_ji
            if name in removed and len(removed[name][0]):
                row_k, column_k = removed[name]
                linear.bias.index_add_(0, row_k, matrix.weight_ji[row_k, column_k] * self.mean(matrix)[column_k])
                weight_ji[row_k, matrix.input_i[column_k]] = 0
            if (pattern := self.patterns.get(name)) is not None:
                value_p = weight_ji.reshape(-1)[pattern.index_p]
                assert isinstance(self.subject, SparseSubject)
                self.subject.sparse.compact[_key(matrix)] = Compact(pattern, value_p, source=source_of(linear.weight))

    def slopes(
        self, goal: Goal, kept_f: Tensor, entries: Mapping[str, Entries], parts: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[float, dict[str, Tensor]]:
        """(loss, slope_k): how the loss changes with how much each entry is there (1) rather than its mean (0).

        The loss is the mean over the prompts row_b of all parts, each with its company_bf.
        """
        mask_f = kept_f.to(torch.get_default_dtype())
        weights = {name: self._values(name) for name in entries}
        biases = {name: self._linear(name).bias for name in entries}
        wanted = [*weights.values(), *biases.values()]
        for parameter in wanted:
            parameter.requires_grad_()
        try:
            loss = backward(goal, mask_f, parts)
            slopes = {}
            for name, (row_k, column_k) in entries.items():
                matrix, gradient, bias = self.before[name], weights[name].grad, biases[name].grad
                assert gradient is not None and bias is not None
                gradient_k = self._at(name, gradient, row_k, column_k)
                slopes[name] = (gradient_k - bias[row_k] * self.mean(matrix)[column_k]) * matrix.weight_ji[row_k, column_k]
            return loss, slopes
        finally:
            for parameter in wanted:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _values(self, name: str) -> Tensor:
        """What holds a matrix's weights: its nonzeros' values, or all of the linear map's."""
        if name not in self.patterns:
            return self._linear(name).weight
        assert isinstance(self.subject, SparseSubject)
        return self.subject.sparse.compact[_key(self.before[name])].value_p

    def _at(self, name: str, gradient: Tensor, row_k: Tensor, column_k: Tensor) -> Tensor:
        """Of the gradient of `_values` those at some entries."""
        if (pattern := self.patterns.get(name)) is not None:
            return gradient[torch.searchsorted(pattern.index_p, row_k * pattern.shape[1] + column_k)]
        gradient_ji = gradient.T if isinstance(self._linear(name), Conv1D) else gradient
        return gradient_ji[row_k, self.before[name].input_i[column_k]]


def _key(matrix: Matrix) -> str:
    return f"{matrix.path}.weight"


def _weight(linear: Any) -> Tensor:
    """weight_ji of a linear map, as a view that may be written to."""
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()


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
    assert isinstance(pruned.subject, SparseSubject)
    return pruned.subject


class EdgeGoal:
    """What `fewest` and `deleted` ask about sets of edges of a circuit."""

    def __init__(self, goal: Goal, kept_f: Tensor) -> None:
        self.kept_f, self.bound, self.left = kept_f, goal.bound, goal.left
        self.pruned = Pruned(goal.subject)
        self.goal = copy.copy(goal)
        self.goal.subject = self.pruned.subject
        kept = goal.subject.space.split(kept_f)
        self.entries = {name: _places(matrix.inside(kept)) for name, matrix in self.pruned.before.items()}
        self.sizes = [len(row_k) for row_k, _ in self.entries.values()]

    @property
    def n_edges(self) -> int:
        """How many edges there are to choose from."""
        return sum(self.sizes)

    def _parts(self, x_e: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.entries, x_e.split(self.sizes), strict=True))

    def set_to(self, kept_e: Tensor) -> None:
        """Let the model have some of the edges."""
        parts = self._parts(kept_e)
        self.pruned.remove({name: (rows[~parts[name]], columns[~parts[name]]) for name, (rows, columns) in self.entries.items()})

    def loss(self, kept_e: Tensor) -> float:
        """The loss of the circuit with some of its edges."""
        self.set_to(kept_e)
        value = float(self.goal.loss(self.kept_f[None]))
        self.left = self.goal.left
        return value

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some sets of edges, smaller ones first, that is within the bound where the one before is not."""
        return bisected(lambda kept_e: self.loss(kept_e) <= self.bound, kept_cf)

    def slopes(self, kept_e: Tensor) -> Tensor:
        """slope_e of the loss at some of the edges."""
        self.set_to(kept_e)
        self.goal.left -= self.goal.cost_of_slopes
        self.left = self.goal.left
        rows = torch.arange(len(self.goal.pairs), device=kept_e.device).split(ROWS)
        return self.slopes_on(self.goal, [(row_b, self.goal.company_bf[row_b]) for row_b in rows])[1]

    def slopes_on(self, goal: Goal, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
        """(loss, slope_e) on some prompts row_b of a goal, in company_bf, at the edges that the model has."""
        loss, slopes = self.pruned.slopes(goal, self.kept_f, self.entries, parts)
        return loss, torch.cat([slopes[name] for name in self.entries])

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
            kind = "value" if matrix.target.kind == "attn_out" else "weight"
            kept_k = parts[name]
            row_k, column_k = row_k[kept_k], column_k[kept_k]
            for source, target, weight, effect in zip(
                matrix.source_i[column_k].tolist(), matrix.target_j[row_k].tolist(), matrix.weight_ji[row_k, column_k].tolist(),
                slopes[name][kept_k].tolist(), strict=True,
            ):  # fmt: skip
                found.append(Edge(Node(matrix.source, source), Node(matrix.target, target), kind, weight, effect))
        return tuple(sorted(found, key=lambda edge: (-abs(edge.effect), edge.source.location, edge.source.index)))


class EdgeLessons:
    """Edges, to a descent: the loss of a mask on some of a goal's prompts, in company of its own at every step."""

    def __init__(self, judge: EdgeGoal, goal: Goal, work: float) -> None:
        self.judge, self.goal = judge, copy.copy(goal)
        self.goal.subject = judge.pruned.subject
        self.rows = min(ROWS, len(goal.pairs))
        per_step = goal.cost_of_slopes / len(goal.pairs) * self.rows
        self.steps = max(FEWEST_STEPS, min(STEPS, int(work / per_step)))

    def slopes_at(self, kept_f: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        """(loss, slope_e) at a mask."""
        self.judge.set_to(kept_f)
        return self.judge.slopes_on(self.goal, [drawn(self.goal, self.rows, generator)])


def find_edges(
    goal: Goal,
    lessons: Goal,
    kept_f: Tensor,
    *,
    seed: int = 0,
    listed: bool = True,
    progress: Callable[[str], None] | None = None,
) -> FoundEdges:
    """The edges of a task's circuit, by the search that the module describes, within the goal's work.

    Masks are learnt from the prompts of `lessons` and held to those of `goal`. Edges that are only to be counted need not be
    `listed`.
    """
    say = progress or (lambda _: None)
    judge = EdgeGoal(goal, kept_f)
    whole_e = torch.ones(judge.n_edges, dtype=torch.bool, device=kept_f.device)
    say(f"edges: {len(whole_e):,} weights between nodes")
    if not len(whole_e):
        return FoundEdges(0, 0, judge.loss(whole_e), True, ())
    learning = EdgeLessons(judge, lessons, DESCENT_SHARE * goal.left)
    learnt = descend(
        learning, judge.loss, whole_e, goal.bound, learning.steps, seed=seed,
        watch=lambda step, tau_e, loss: say(
            f"edges: step {step} of {learning.steps}, {int((tau_e > 0).sum()):,} edges, loss {loss:.3f}"
        ),
    )  # fmt: skip
    judge.goal.left = judge.left = (1 - DESCENT_SHARE) * goal.left
    order_e, above = learnt.tau_f.argsort(descending=True, stable=True), int((learnt.tau_f > 0).sum())
    kept_e = fewest(judge, torch.zeros_like(whole_e), order_e[:above] if learnt.met else order_e, max(1, above))
    kept_e, complete = deleted(judge, kept_e, lambda text: say(text.replace("nodes", "edges")), GIVEN_UP)
    edges = judge.edges(kept_e) if listed else ()
    return FoundEdges(int(kept_e.sum()), len(whole_e), judge.loss(kept_e), complete, edges)


def _places(mask_ji: Tensor) -> tuple[Tensor, Tensor]:
    """(row_k, column_k) of the entries of a mask."""
    row_k, column_k = mask_ji.nonzero().unbind(1)
    return row_k, column_k
