"""A task's tokens under any tokenizer, and how well a model does on them.

    resolve     Task, `prompts` -> Resolved: the usable TokenPairs of each split, and how many pairs were dropped for which reason
    score       model, TokenPairs -> Scores

Both members of a pair have the same number of tokens. An answer is read at the first token that distinguishes it from the wrong
one, and is a set of tokens if it has several spellings:

    D = log sum over answer of exp(logit) - log sum over wrong of exp(logit)     right: D > 0     two-way loss: softplus(-D) nats

A pair is resolved in the same way for any tokenizer. The prompt is tokenized with each spelling after it. A spelling that changes
the prompt's own tokens does not count. If all spellings of an answer do, the quotes, spaces and other marks at the prompt's end
are moved to the answers, one by one, until some do not. The tokens that all spellings share are appended to the prompt, and the
tokens after them are those of the answer and of the wrong answer. The pair is dropped if these sets overlap or one is missing, if
they are not the same after the counterfactual, or if its two members are not equally long.

Shape legend: b pair (row), r row of logits, t token, k token ids of an answer, v vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from os.path import commonprefix
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridge.data.task_pairs import SPLITS, Example, Split, Task, TaskError, reverse_pair
from bridge.huggingface.prompts import PromptError, Prompts
from bridge.models.residual import ResidualModel

_MAX_TRAILING_MARKS = 8  # maximum number of marks, quotes and spaces at the end of a prompt that may be moved to the answer
_LOGITS = 2**26  # maximum number in a batch that is scored


@dataclass(frozen=True)
class TokenPairs:
    """Pairs as tokens. Both members of row b have last_b + 1 tokens, padded on the right; the answer is read at last_b.

    prompt_bt, counterfactual_bt  int64
    last_b                        int64, position of the last token
    answer_bk, wrong_bk           int64, ids of the first token that distinguishes answer from wrong, filled up with -1
    answer_not_b, wrong_not_b     bool: the side is every token except the ids listed for it
    examples                      the example that each row comes from
    """

    prompt_bt: Tensor
    counterfactual_bt: Tensor
    last_b: Tensor
    answer_bk: Tensor
    wrong_bk: Tensor
    answer_not_b: Tensor
    wrong_not_b: Tensor
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.last_b)

    @property
    def is_prompt_bt(self) -> Tensor:
        """Mask of the positions that are a prompt's, not padding."""
        return torch.arange(self.prompt_bt.shape[1], device=self.last_b.device) <= self.last_b[:, None]

    def to(self, device: Any) -> TokenPairs:
        """Return the pairs on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def rows(self, row_b: Tensor) -> TokenPairs:
        """Return some of the pairs, by index, cut to the longest of them."""
        indices = row_b.tolist()
        few = {name: value[row_b.to(value.device)] for name, value in self._tensors().items()}
        longest = int(few["last_b"].max()) + 1 if indices else 0
        for name in ("prompt_bt", "counterfactual_bt"):
            few[name] = few[name][:, :longest]
        return replace(self, **few, examples=tuple(self.examples[index] for index in indices))

    def reversed(self) -> TokenPairs:
        """Return the pairs with prompt and counterfactual, and the two answers, exchanged."""
        return replace(
            self,
            prompt_bt=self.counterfactual_bt,
            counterfactual_bt=self.prompt_bt,
            answer_bk=self.wrong_bk,
            wrong_bk=self.answer_bk,
            answer_not_b=self.wrong_not_b,
            wrong_not_b=self.answer_not_b,
            examples=tuple(reverse_pair(example) for example in self.examples),
        )

    def both_members(self) -> TokenPairs:
        """Return both members of each pair as prompts: the pairs, then the reversed pairs."""
        return self.concatenate(self.reversed())

    def concatenate(self, others: TokenPairs) -> TokenPairs:
        """Return these pairs followed by others, padded to one length."""
        tensors = {}
        for name, value in self._tensors().items():
            other = getattr(others, name)
            if value.dim() == 2:
                wide, filler = max(value.shape[1], other.shape[1]), -1 if name in ("answer_bk", "wrong_bk") else 0
                value, other = (F.pad(x, (0, wide - x.shape[1]), value=filler) for x in (value, other))
            tensors[name] = torch.cat([value, other])
        return TokenPairs(**tensors, examples=self.examples + others.examples)

    def logits_at_last(self, logits_btv: Tensor) -> Tensor:
        """Return logits_bv at the positions where the answers are read."""
        return logits_btv[torch.arange(len(self), device=logits_btv.device), self.last_b]

    def difference(self, logits_bv: Tensor) -> Tensor:
        """Return the logit difference of each prompt: the log-odds of the answer against the wrong one."""
        logits_bv = logits_bv.float()
        return log_sum(logits_bv, self.answer_bk, self.answer_not_b) - log_sum(logits_bv, self.wrong_bk, self.wrong_not_b)

    def loss(self, logits_bv: Tensor) -> Tensor:
        """Return the two-way loss per prompt in nats, loss_b = -log p(answer) / (p(answer) + p(wrong)); chance is log 2."""
        return F.softplus(-self.difference(logits_bv))

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


@dataclass(frozen=True)
class Resolved:
    """A task under a tokenizer: the usable pairs by split, the number of pairs examined, and the number dropped by reason."""

    task: str
    language: str
    splits: Mapping[Split, TokenPairs]
    seen: int
    dropped: Mapping[str, int]

    @property
    def drop_rate(self) -> float:
        """Fraction of the examined pairs that were dropped."""
        return sum(self.dropped.values()) / self.seen if self.seen else 0.0

    @property
    def digest(self) -> str:
        """Digest that distinguishes these prompts and answers from others."""
        digest = hashlib.sha256()
        for name, pairs in sorted(self.splits.items()):
            for tensor in (pairs.prompt_bt, pairs.counterfactual_bt, pairs.answer_bk, pairs.wrong_bk):
                digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Scores:
    """A model's scores on both members of pairs: accuracy, two-way loss in nats per prompt, mean logit difference."""

    accuracy: float
    loss: float
    difference: float
    pairs: int


# -- tokens -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TokenizedPrompt:
    """A prompt's tokens, and the first tokens of the answer and of the wrong answer; an empty set: all tokens but the other's."""

    tokens: tuple[int, ...]
    answer: frozenset[int]
    wrong: frozenset[int]


def resolve(
    task: Task, prompts: Prompts | PreTrainedTokenizerBase | None, *, context: int | None = None, splits: Sequence[Split] = SPLITS
) -> Resolved:
    """Return the pairs of a task as tokens, at most `context` per prompt, by split; a split is empty if no pair is left.

    Generated pairs are taken from the templates in turn, those whose names have fewest tokens first, until there are as many as
    the task wants. `prompts` is a dense model's Prompts, or a tokenizer. Raises TaskError if the text cannot be read.
    """
    prompts, seen, dropped = Prompts.of(prompts), 0, Counter[str]()
    resolved: dict[Split, TokenPairs] = {}
    try:
        prompts.check()
        for split in splits:
            rows = []
            for example in _order_examples(task.examples[split], prompts):
                if len(rows) == task.wanted[split]:
                    break
                seen += 1
                reason = ""
                for variant in (example, *example.variants):
                    reads = _resolve_pair(variant, prompts, context)
                    if not isinstance(reads, str):
                        rows.append((variant, *reads))
                        break
                    reason = reason or reads
                else:
                    dropped[reason] += 1
            resolved[split] = _tensors(rows)
    except PromptError as error:
        raise TaskError(f"task {task.name!r} cannot be read:", error.problem, error.remedy) from None
    return Resolved(task.name, task.language, resolved, seen, dict(dropped))


def _order_examples(examples: Sequence[Example], prompts: Prompts) -> Iterator[Example]:
    """Yield a user's examples in order; generated ones from the templates in turn, each template's shortest names first."""
    if not any(example.template for example in examples):
        yield from examples
        return
    names = {example: [example.prompt[slice(*s.prompt)] for s in example.spans if s.label != "differs"] for example in examples}
    words = list({name for some in names.values() for name in some})
    plain, spaced = prompts.encode(words), prompts.encode([f" {word}" for word in words])
    tokens = {word: max(len(a), len(b)) for word, a, b in zip(words, plain, spaced, strict=True)}
    by_template: dict[str, list[Example]] = {}
    for example in examples:
        by_template.setdefault(example.template, []).append(example)
    queues = [sorted(some, key=lambda example: sum(tokens[name] for name in names[example])) for some in by_template.values()]
    for row in zip_longest(*queues):
        yield from (example for example in row if example is not None)


def _resolve_pair(example: Example, prompts: Prompts, context: int | None) -> tuple[_TokenizedPrompt, _TokenizedPrompt] | str:
    """Return both members of a pair, or the reason for dropping it."""
    prompt = _read(example.prompt, example.answer, example.wrong, prompts)
    counterfactual = _read(example.counterfactual, example.wrong, example.answer, prompts)
    if isinstance(prompt, str) or isinstance(counterfactual, str):
        return prompt if isinstance(prompt, str) else str(counterfactual)
    if len(prompt.tokens) != len(counterfactual.tokens):
        return "unequal length"
    if context is not None and len(prompt.tokens) > context:
        return "longer than the context"
    if prompt.tokens == counterfactual.tokens or (prompt.answer, prompt.wrong) != (counterfactual.wrong, counterfactual.answer):
        return "ambiguous"
    return prompt, counterfactual


def _read(prompt: str, answer: tuple[str, ...], wrong: tuple[str, ...], prompts: Prompts) -> _TokenizedPrompt | str:
    # if one answer is any other token, no mark may be moved: both answers would begin with the mark
    marks = len(prompt) - len(re.sub(r"\W+\Z", "", prompt)) if answer and wrong else 0
    heads = [prompt[: len(prompt) - n] for n in range(min(marks, _MAX_TRAILING_MARKS) + 1)]
    encoded = prompts.encode([*(prompt + spelling for spelling in (*answer, *wrong)), *heads])
    sides = encoded[: len(answer)], encoded[len(answer) : len(answer) + len(wrong)]
    for head in encoded[len(answer) + len(wrong) :]:
        right, left = ([ids for ids in side if ids[: len(head)] == head and len(ids) > len(head)] for side in sides)
        if head and bool(right) == bool(answer) and bool(left) == bool(wrong):
            break
    else:
        return "no stable prompt"
    start = len(commonprefix(right + left)) if right and left else len(head)
    firsts = [frozenset(ids[start] for ids in side if len(ids) > start) for side in (right, left)]
    if firsts[0] & firsts[1] or bool(firsts[0]) != bool(answer) or bool(firsts[1]) != bool(wrong):
        return "ambiguous"
    return _TokenizedPrompt(tuple((right or left)[0][:start]), *firsts)


def _tensors(rows: Sequence[tuple[Example, _TokenizedPrompt, _TokenizedPrompt]]) -> TokenPairs:
    prompts, counterfactuals = [row[1].tokens for row in rows], [row[2].tokens for row in rows]
    answers, wrongs = [sorted(row[1].answer) for row in rows], [sorted(row[1].wrong) for row in rows]
    # a side that is any other token is listed by the ids of the other side
    listed = [(answer or wrong, wrong or answer) for answer, wrong in zip(answers, wrongs, strict=True)]
    return TokenPairs(
        prompt_bt=_pad_rows(prompts, 0),
        counterfactual_bt=_pad_rows(counterfactuals, 0),
        last_b=torch.tensor([len(tokens) - 1 for tokens in prompts], dtype=torch.int64),
        answer_bk=_pad_rows([answer for answer, _ in listed], -1),
        wrong_bk=_pad_rows([wrong for _, wrong in listed], -1),
        answer_not_b=torch.tensor([not answer for answer in answers], dtype=torch.bool),
        wrong_not_b=torch.tensor([not wrong for wrong in wrongs], dtype=torch.bool),
        examples=tuple(row[0] for row in rows),
    )


def _pad_rows(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64).view(len(rows), longest)


# -- scores -------------------------------------------------------------------------------------------------------------


def log_sum(logits_rv: Tensor, id_rk: Tensor, not_r: Tensor) -> Tensor:
    """Return the log of the sum of exp over the listed logits, or over all others if not_r; one row of ids serves all rows."""
    there_rk = id_rk >= 0
    picked_rk = logits_rv.gather(-1, id_rk.clamp(min=0).expand(len(logits_rv), -1)).masked_fill(~there_rk, -torch.inf)
    listed_r = picked_rk.logsumexp(-1) if id_rk.shape[1] > 1 else picked_rk[:, 0]
    if not bool(not_r.any()):
        return listed_r
    place_rk = torch.where(there_rk, id_rk, id_rk[:, :1]).expand(len(logits_rv), -1)
    others_r = logits_rv.scatter(-1, place_rk, -torch.inf).logsumexp(-1)
    return torch.where(not_r, others_r, listed_r)


@torch.no_grad()
def score(model: ResidualModel, pairs: TokenPairs) -> Scores:
    """Score a model on pairs, which must be on its device. Raises TaskError if there are no pairs."""
    if not len(pairs):
        raise TaskError("there are no pairs to score", remedy="use another split, or a tokenizer that suits the task's prompts")
    prompts = pairs.both_members()
    rows = max(1, min(64, _LOGITS // (prompts.prompt_bt.shape[1] * model.vocabulary)))
    differences = []
    for row_b in prompts.last_b.argsort(stable=True).split(rows):  # similar lengths together, to pad little
        some = prompts.rows(row_b)
        differences.append(some.difference(some.logits_at_last(model.run(some.prompt_bt).logits_btv)))
    difference_b = torch.cat(differences).double()
    loss = float(F.softplus(-difference_b).mean())
    return Scores(float((difference_b > 0).double().mean()), loss, float(difference_b.mean()), len(pairs))
