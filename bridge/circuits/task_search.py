"""The nested circuits of a task by the search that prompts have, channels shared over positions, in the sparse or dense model.

Nodes are channels, kept at every token of every prompt or at none. Prompts are members of pairs, as many first as second ones,
and the question is the right answer against the wrong one. The prompts are divided into

    train       scores and descents use them, some of them at each step
    validation  every circuit is judged on them during the search
    test        the test split, which the search does not use: reported measures are over it

Train and validation prompts are taken from both splits of those names, which have different templates. The circuit explains the
dense model's answer, which errors make the sparse model give; they are at their means unless a level needs them.

Shape legend: b prompt, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bridge.circuits.dense_nodes import DenseSubject, MaskedDense
from bridge.circuits.error_nodes import follow_dense
from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.masked_model import Masked, MaskedModel
from bridge.circuits.question import Question, spread_indices
from bridge.circuits.search import NestedMasks, find_nested
from bridge.circuits.subject import sort_pairs
from bridge.data.task_tokens import Resolved, TokenPairs
from bridge.display.progress import OnProgress, ignore_progress
from bridge.errors import UserError
from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location

# each step draws other prompts: var_if keeps 371 nodes with 8 at a step, 260 with 16
TASK_SEARCH = SearchConfig(attempts=3, steps=400, prompts=16)
TRAIN, VALIDATION, TEST = 128, 32, 32  # prompts


class SearchError(UserError):
    """A task whose circuit cannot be searched for; the message says in one line what to change."""


class NoCircuitError(SearchError):
    """A task on which a model's answers leave nothing to explain."""


@dataclass(frozen=True, eq=False)
class TaskLosses:
    """Losses of a model's circuits on the train, validation and test prompts."""

    train: CircuitLoss
    validation: CircuitLoss
    test: CircuitLoss

    def find_opening_circuit(self, progress: OnProgress = ignore_progress, seed: int | None = None) -> NestedMasks:
        """Find the circuit at the opening level alone, with the seed given, by default the config's."""
        seed = self.validation.config.seed if seed is None else seed
        train, validation = (one.with_seed(seed) for one in (self.train, self.validation))
        return find_nested(validation, progress, train, (Level(validation.config.opens_at),))

    def find_nested_circuits(self, progress: OnProgress = ignore_progress, opened_f: Tensor | None = None) -> NestedMasks:
        """Find the nested circuits, around the opening one if it is given; without the full distribution."""
        return find_nested(self.validation, progress, self.train, self.validation.config.nested()[:-1], opened_f)


def task_loss(
    coupling: CoupledModels, means: Mapping[Location, Tensor], pairs: TokenPairs, config: SearchConfig, *, dense: bool = True
) -> CircuitLoss:
    """Return the loss of circuits on some prompts against the dense model's answers; if not `dense`, the sparse model's own."""
    question = Question.of_pairs(pairs.to(coupling.sparse.device))
    if not dense:
        return _loss_on_own_answers(MaskedModel(coupling.sparse, question, means, by_position=False), config)
    followed = follow_dense(coupling, question.prompt_bt, question.last_b)
    masked = MaskedModel(coupling.sparse, question, means, followed.errors, by_position=False)
    return CircuitLoss(masked, followed.dense_bv, config)


def dense_loss(subject: DenseSubject, pairs: TokenPairs, config: SearchConfig) -> CircuitLoss:
    """Return the loss of circuits of the dense model's own nodes against its answers on some prompts."""
    return _loss_on_own_answers(MaskedDense(subject, Question.of_pairs(pairs.to(subject.device))), config)


def _loss_on_own_answers(masked: Masked, config: SearchConfig) -> CircuitLoss:
    every_bf = torch.ones(len(masked.question), masked.space.size, dtype=torch.bool, device=masked.device)
    return CircuitLoss(masked, masked.logits(every_bf), config)


def task_losses(task: Resolved, loss_on: Callable[[TokenPairs], CircuitLoss]) -> TaskLosses:
    """Return the losses for a task's search; loss_on returns a model's loss on some prompts (`task_loss`, `dense_loss`).

    Raises NoCircuitError if the answers differ too little from those with every node at its mean.
    """
    shares = split_prompts(task.splits["train"], task.splits["validation"])
    losses = TaskLosses(*map(loss_on, (*shares, held_out_prompts(task))))
    if (span := losses.validation.span) < (least := losses.validation.config.least_span):
        raise NoCircuitError(
            f"on {task.task} right and wrong answers",
            f"differ by {span:.2f} nats more than with every node at its mean, and at least {least:g} are needed, so there is "
            "nothing to explain",
            "take another task",
        )
    return losses


def with_all_splits(task: Resolved) -> Resolved:
    """Return the task; if the tokenizer has left no validation pairs, every fourth of at least 8 training pairs becomes one.

    Raises SearchError if a split is empty.
    """
    splits = dict(task.splits)
    if not len(splits["validation"]) and len(splits["train"]) >= 8:
        row_b = torch.arange(len(splits["train"]))
        splits |= {"validation": splits["train"].rows(row_b[::4]), "train": splits["train"].rows(row_b[row_b % 4 != 0])}
    short = next((name for name in ("train", "validation", "test") if not len(splits[name])), None)
    if short is not None:
        raise SearchError(
            f"the task {task.task}", f"has no {short} pairs under this tokenizer", "take another task, or add examples"
        )
    return replace(task, splits=splits)


def held_out_prompts(task: Resolved) -> TokenPairs:
    """Return the prompts of the test split on which a circuit is measured."""
    return select_prompts(task.splits["test"], TEST)


def split_prompts(train: TokenPairs, validation: TokenPairs) -> tuple[TokenPairs, TokenPairs]:
    """Return the train prompts and, from other pairs, the validation prompts; either has as many from both splits.

    Both splits are used because what was learnt from the templates of one split did not hold on the other's.
    """
    parts = [_split_pairs(split) for split in (train, validation)]
    most = zip(zip(*parts, strict=True), (TRAIN, VALIDATION), strict=True)
    learnt, judged = (
        select_prompts(one, count // 2).concatenate(select_prompts(other, count // 2)) for (one, other), count in most
    )
    return learnt, judged


def _split_pairs(pairs: TokenPairs) -> tuple[TokenPairs, TokenPairs]:
    """Return pairs to learn from and other pairs, both spread evenly; the same pair if there is only one."""
    ordered = sort_pairs(pairs)
    validation_b = spread_indices(len(ordered), min(VALIDATION // 2, (len(ordered) + 1) // 2))
    rest_b = torch.arange(len(ordered))[~torch.isin(torch.arange(len(ordered)), validation_b)]
    device = ordered.last_b.device
    return ordered.rows((rest_b if len(rest_b) else validation_b).to(device)), ordered.rows(validation_b.to(device))


def select_prompts(pairs: TokenPairs, most: int) -> TokenPairs:
    """Return at most `most` prompts: one member of each of some pairs, spread evenly, the second member for every second pair.

    If there are fewer than `most` pairs, both members of each are taken, from at most most // 2 pairs.
    """
    count = len(pairs)
    row_b = spread_indices(count, most if count >= most else most // 2)
    place_b = torch.arange(len(row_b))
    chosen_b = torch.where(place_b % 2 == 0, row_b, row_b + count) if count >= most else torch.cat([row_b, row_b + count])
    return sort_pairs(pairs).both_members().rows(chosen_b.to(pairs.last_b.device))
