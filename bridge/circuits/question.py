"""The question that a circuit answers: why these tokens, rather than others, follow these prompts.

    d = log sum over answer of exp(logit) - log sum over against of exp(logit)

By default d is the log-odds of the answer against all other tokens ("why this token at all"). Against one token it is a logit
difference. A task has sets of tokens on either side. A prompt's question has one row, a task's a row for every prompt.

Shape legend: b prompt (row), t token, k token ids of a side, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bridge.data.task_tokens import TokenPairs, log_sum


@dataclass(frozen=True, eq=False)
class Question:
    """Prompts, and the next tokens that are asked about.

    prompt_bt              int64, padded on the right
    last_b                 int64, the position after which the answer comes
    answer_bk, against_bk  int64, token ids of either side, -1 where there are fewer than k
    answer_not_b, against_not_b  bool: the side is every token but the ids listed for it

    Raises ValueError if there is no token, or if answer and contrast are the same.
    """

    prompt_bt: Tensor
    last_b: Tensor
    answer_bk: Tensor
    against_bk: Tensor
    answer_not_b: Tensor
    against_not_b: Tensor

    def __post_init__(self) -> None:
        if self.prompt_bt.dim() != 2 or not self.prompt_bt.numel():
            raise ValueError(f"prompts must be rows of at least one token, not a tensor of shape {tuple(self.prompt_bt.shape)}")
        same = (self.answer_bk[:, :1] == self.against_bk[:, :1]).all(1) & (self.answer_not_b == self.against_not_b)
        if bool(same.any()):
            raise ValueError(f"answer and contrast are both token {int(self.answer_bk[same][0, 0])}; give two different tokens")

    @staticmethod
    def of_prompt(tokens_t: Tensor, answer: int, against: int | None = None) -> Question:
        """Return the question why one token follows a prompt: against one other, or against all others if `against` is None."""
        device, every = tokens_t.device, against is None
        answer_bk = torch.tensor([[answer]], device=device)
        against_bk = torch.tensor([[answer if against is None else against]], device=device)
        last_b, no_b = torch.tensor([len(tokens_t) - 1], device=device), torch.zeros(1, dtype=torch.bool, device=device)
        return Question(tokens_t[None], last_b, answer_bk, against_bk, no_b, no_b | every)

    @staticmethod
    def of_pairs(pairs: TokenPairs) -> Question:
        """Return the question why the right answer, not the wrong one, follows some pairs' prompts (both members as prompts)."""
        return Question(pairs.prompt_bt, pairs.last_b, pairs.answer_bk, pairs.wrong_bk, pairs.answer_not_b, pairs.wrong_not_b)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.last_b)

    @property
    def tokens_t(self) -> Tensor:
        """Tokens of the only prompt. Raises ValueError if there are several."""
        if len(self) != 1:
            raise ValueError(f"the question has {len(self)} prompts, and this property needs a single one")
        return self.prompt_bt[0]

    @property
    def answer(self) -> int:
        """First answer token of the only prompt."""
        return int(self.answer_bk[0, 0]) if self.tokens_t is not None else -1

    @property
    def contrast(self) -> int | None:
        """Token that the only prompt's answer is held against; None if that is every other token."""
        return None if bool(self.against_not_b[0]) else int(self.against_bk[0, 0])

    @property
    def is_unpadded(self) -> bool:
        """Whether every prompt ends at the last position."""
        return bool((self.last_b == self.prompt_bt.shape[1] - 1).all())

    def rows(self, row_b: Tensor) -> Question:
        """Return some of the prompts, by index, cut to the longest of them."""
        few = {field.name: getattr(self, field.name)[row_b] for field in fields(self)}
        few["prompt_bt"] = few["prompt_bt"][:, : int(few["last_b"].max()) + 1]
        return replace(self, **few)

    def rows_or_all(self, rows: int, row_r: Tensor | None = None) -> Tensor:
        """Return row_r; if it is None, the indices of all prompts in turn, repeated to this number of rows."""
        return torch.arange(rows, device=self.last_b.device) % len(self) if row_r is None else row_r

    def difference(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return d_r in nats of the logits after the prompts of row_r, by default of all prompts in turn."""
        sides = (self.answer_bk, self.answer_not_b), (self.against_bk, self.against_not_b)
        logits_rv = logits_rv if logits_rv.dtype == torch.float64 else logits_rv.float()
        row_r = self.rows_or_all(len(logits_rv), row_r)
        over, under = (log_sum(logits_rv, id_bk[row_r], not_b[row_r]) for id_bk, not_b in sides)
        return over - under


def spread_indices(count: int, most: int) -> Tensor:
    """Return at most `most` of `count` indices, spread evenly, but not exactly every second one: these may share one answer."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()
