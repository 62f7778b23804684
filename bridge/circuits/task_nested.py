"""The nested circuits of a task: by the search of prompts, with channels shared over positions.

Nodes are channels, kept at every token of every prompt or at none; both members of every pair are prompts, and the question is
the right answer against the wrong one. Prompts are shared out:

    train   what scores and descents learn from, some of them at each step
    held    what every circuit is held to on the way
    test    the test split, which the search has not seen: what is measured there is what is said

Train and held are taken from the training and the validation split both, which have other templates. What is explained is the
dense model's answer, which errors make the sparse model give; they are at their means unless a level needs them.

Shape legend: b prompt, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuits.error_nodes import follow
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.masks import MaskError, divided, spread
from bridge.circuits.nested import Nested, find_nested
from bridge.circuits.question import Question
from bridge.sparse import Location
from bridge.tasks.tokens import Resolved, TokenPairs

# more steps than a prompt's, since every one sees other prompts
TASK_SEARCH = SearchConfig(steps=200)
TRAIN, HELD, TEST = 64, 32, 32  # prompts


@dataclass(frozen=True, eq=False)
class TaskNested:
    """Circuits found for a task, and the losses on the prompts that they were held to, and on those of the test split."""

    nested: Nested
    held: CircuitLoss
    test: CircuitLoss


def task_loss(
    coupling: Coupling, means: Mapping[Location, Tensor], pairs: TokenPairs, config: SearchConfig, *, dense: bool = True
) -> CircuitLoss:
    """How far circuits are from the dense model's answers on some prompts; from the sparse model's own where not `dense`."""
    question = Question.of_pairs(pairs.to(coupling.sparse.device))
    if not dense:
        masked = MaskedModel(coupling.sparse, question, means, by_position=False)
        every_bf = masked.is_error_f.logical_not().expand(len(question), -1)
        return CircuitLoss(masked, masked.logits(every_bf), config)
    followed = follow(coupling, question.prompt_bt, question.last_b)
    masked = MaskedModel(coupling.sparse, question, means, followed.errors, by_position=False)
    return CircuitLoss(masked, followed.dense_bv, config)


def find_task_nested(
    coupling: Coupling,
    means: Mapping[Location, Tensor],
    task: Resolved,
    config: SearchConfig = TASK_SEARCH,
    *,
    dense: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> TaskNested:
    """The nested circuits of a task; means are those of all nodes, and of errors where the dense model is explained.

    Raises MaskError where a split has no pairs, or the model's answers differ too little from those of its means.
    """
    short = next((name for name, pairs in task.splits.items() if not len(pairs)), None)
    if short is not None:
        raise MaskError(f"the task {task.task} has no {short} pairs under this tokenizer; take another task, or add examples")
    prompts = {name: pairs.both() for name, pairs in task.splits.items()}
    train, held = divided(prompts["train"], prompts["validation"])
    shares = spread(train, TRAIN), spread(held, HELD), spread(prompts["test"], TEST)
    losses = [task_loss(coupling, means, share, config, dense=dense) for share in shares]
    if losses[1].span < config.least_span:
        raise MaskError(
            f"on {task.task} right and wrong answers are {losses[1].span:.2f} nats further apart than with every node at its "
            f"mean, and {config.least_span:g} are asked, so there is nothing to explain; take another task"
        )
    return TaskNested(find_nested(losses[1], progress, losses[0]), losses[1], losses[2])
