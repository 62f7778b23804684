"""What tests share: explanation_cases."""

from __future__ import annotations

import dataclasses

import torch

from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from tests.conftest import CONTEXT, untrained

PROMPT = "w30 w31 w4 w8"


def agreeing(dense: DenseModel, prompt: str = PROMPT) -> CoupledModels:
    """An untrained coupling that gives the dense model's answer to the prompt, by its output bias; with reference text."""
    coupling = untrained(dense)
    coupling.sparse.project(0.3)
    assert dense.tokenizer is not None
    tokens_1t = torch.tensor([dense.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        coupling.sparse.unembedding.bias.copy_(2 * dense.run(tokens_1t).logits_btv[0, -1])
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    reference_bt = torch.randint(2, 40, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(coupling, reference_bt=reference_bt, path="somewhere/coupling")
