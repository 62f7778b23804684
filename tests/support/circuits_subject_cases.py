"""What tests share: circuits_subject_cases."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, untrained
from torch import Tensor

from bridge.circuits.subject import SparseSubject
from bridge.data.task_tokens import TokenPairs
from bridge.models.circuit import corpus_means
from bridge.models.dense import DenseModel
from bridge.models.sparse import Location, SparseTransformer


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(5))


def subject_over(sparse: SparseTransformer, corpus_bt: Tensor) -> SparseSubject:
    """The model with its means over a corpus."""
    return SparseSubject(sparse, corpus_means(sparse, corpus_bt))


def switched_on_f(subject: SparseSubject, pairs: TokenPairs) -> Tensor:
    """Literally: every prompt by itself, without its padding."""
    on = {at: torch.zeros(1, n, dtype=torch.bool) for at, n in subject.space.sizes.items()}

    def look(at: Location, x_btn: Tensor) -> Tensor:
        on[at] |= (x_btn != 0).any(1)
        return x_btn

    for prompt_t, last in zip(pairs.prompt_bt, pairs.last_b.tolist(), strict=True):
        subject.sparse.run(prompt_t[None, : last + 1], gate=look)
    return subject.space.join(on)


@pytest.fixture
def subject(dense: DenseModel) -> SparseSubject:
    sparse = untrained(dense).sparse.requires_grad_(False)
    sparse.project(0.3)
    return subject_over(sparse, corpus())
