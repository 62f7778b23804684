"""Tasks as data: contrast pairs of text, their tokens under any tokenizer, and how well a model does on them.

    load_task   a built-in task's templates and names, or a user's file -> Task: pairs of text, by split
    resolve     Task, tokenizer -> Resolved: per split the TokenPairs that are left, and what was dropped and why
    score       model, TokenPairs -> Scores

A pair is a prompt and a counterfactual prompt of as many tokens; the answer of the one is the wrong answer of the other. An answer
is read at the first token that tells the two apart, and is a set of tokens where it has several spellings:

    D = log sum over answer of exp(logit) - log sum over wrong of exp(logit)     right: D > 0     two-way loss: softplus(-D) nats

Shape legend: b pair (row), t token, k token ids of an answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridge.recipe import UserError
from bridge.residual import ResidualModel

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class TaskError(UserError):
    """A task that cannot be used, in one line that names the file and line, the rule and the remedy."""


@dataclass(frozen=True)
class Span:
    """A labelled part of a pair, as half-open ranges of characters in the prompt and in the counterfactual.

    The label is a name's placeholder ("a"), or "differs" for what tells the two prompts apart.
    """

    label: str
    prompt: tuple[int, int]
    counterfactual: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A contrast pair: the spellings of the right answer after the prompt, and of the wrong one, the counterfactual's answer.

    An empty `answer` or `wrong` (not both) is whatever is not the other one: " not" after `elif`, where `else` has ":".
    """

    prompt: str
    counterfactual: str
    answer: tuple[str, ...]
    wrong: tuple[str, ...]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: pairs of text by split, more than `wanted` of each where they are generated, since a tokenizer may not like them all.

    No name and no template is in two splits.
    """

    name: str
    language: str
    about: str
    examples: Mapping[Split, tuple[Example, ...]]
    wanted: Mapping[Split, int]


@dataclass(frozen=True)
class TokenSpan:
    """A labelled part of a pair, as half-open ranges of tokens in the prompt and in the counterfactual."""

    label: str
    prompt: tuple[int, int]
    counterfactual: tuple[int, int]


@dataclass(frozen=True)
class TokenPairs:
    """Pairs as tokens. Both members of row b have last_b + 1 tokens, padded on the right; the answer is read at last_b.

    prompt_bt, counterfactual_bt  int64
    last_b                        int64, position of the last token
    answer_bk, wrong_bk           int64, ids of the first token that tells answer from wrong, -1 where there are fewer than k
    answer_not_b, wrong_not_b     bool: the side is every token but the ids listed for it
    examples, spans               row by row, what the tokens are of
    """

    prompt_bt: Tensor
    counterfactual_bt: Tensor
    last_b: Tensor
    answer_bk: Tensor
    wrong_bk: Tensor
    answer_not_b: Tensor
    wrong_not_b: Tensor
    examples: tuple[Example, ...]
    spans: tuple[tuple[TokenSpan, ...], ...]

    def __len__(self) -> int:
        """Number of pairs."""
        raise NotImplementedError

    def to(self, device: Any) -> TokenPairs:
        """The pairs on a device."""
        raise NotImplementedError

    def rows(self, row_b: Tensor) -> TokenPairs:
        """Some of the pairs, by index, no longer than they need to be."""
        raise NotImplementedError

    def swapped(self) -> TokenPairs:
        """Every pair the other way round: the counterfactual as the prompt, the wrong answer as the right one."""
        raise NotImplementedError

    def both(self) -> TokenPairs:
        """Both members of every pair as prompts: the pairs, then the pairs swapped."""
        raise NotImplementedError

    def at_last(self, logits_btv: Tensor) -> Tensor:
        """logits_bv where the answers are read."""
        raise NotImplementedError

    def difference(self, logits_bv: Tensor) -> Tensor:
        """D_b of the prompts: the log of the odds of answer against wrong; the logit difference where each is one token."""
        raise NotImplementedError

    def loss(self, logits_bv: Tensor) -> Tensor:
        """Two-way loss per prompt in nats, loss_b = -log p(answer) / (p(answer) + p(wrong)); chance is log 2."""
        raise NotImplementedError


@dataclass(frozen=True)
class Resolved:
    """A task under a tokenizer: the pairs that are left by split, how many were looked at, and why others were dropped."""

    task: str
    language: str
    splits: Mapping[Split, TokenPairs]
    seen: int
    dropped: Mapping[str, int]

    @property
    def drop_rate(self) -> float:
        """Share of the pairs looked at that were dropped."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scores:
    """A model on pairs, both members of each scored: share answered right, two-way loss in nats per prompt, mean D in logits."""

    accuracy: float
    loss: float
    difference: float
    pairs: int


def task_names(language: str | None = None) -> tuple[str, ...]:
    """The built-in tasks, of one language or of all."""
    raise NotImplementedError


def load_task(name_or_path: str | Path, *, seed: int = 0) -> Task:
    """A built-in task, generated by the seed, or a user's from a .jsonl, .yaml or .yml file. Raises TaskError."""
    raise NotImplementedError


def resolve(task: Task, tokenizer: PreTrainedTokenizerBase, *, context: int | None = None) -> Resolved:
    """The pairs of a task as tokens, of at most `context` each; a split is empty where nothing is left. Raises TaskError."""
    raise NotImplementedError


def score(model: ResidualModel, pairs: TokenPairs) -> Scores:
    """How well a model does on pairs, which are on its device. Raises TaskError where there are none."""
    raise NotImplementedError
