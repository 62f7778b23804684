"""What tests share: circuit_cases."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.models.sparse import SparseTransformer
from bridge.recipe import SparseShape

VOCABULARY, CONTEXT = 20, 8


SEQUENTIAL, PARALLEL = ("attn", "mlp", "attn", "mlp"), ("parallel", "parallel")


def model(kinds: tuple[str, ...] = SEQUENTIAL, l0: float = 0.5, **shape) -> SparseTransformer:
    """A small random sparse model in float64, its biases and sinks away from 0."""
    values = {"width": 16, "head_channels": 4, "mlp_ratio": 2, "positions": "learned", "bigram_rank": 3, **shape}
    sparse = SparseTransformer(SparseShape(**values), kinds, VOCABULARY, CONTEXT).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sparse.project(l0)
    return sparse.requires_grad_(False)


def prompt(length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
