"""What tests share: a coupling of a span on disk, and a task that its dense model does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, planted_pairs, tiny_gpt2, tiny_tokenizer
from support.studies_suite_cases import words
from support.studies_task_cases import answered

from bridge.models.bridges import new_coupling
from bridge.models.dense import load_dense
from bridge.models.span import dense_of
from bridge.recipe import resolve
from bridge.training.initialize import start_from_dense
from bridge.training.prepare import complete_recipe

BLOCKS = "1:2"


@pytest.fixture(scope="module")
def span_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coupling of the middle of three blocks, which writes much, that does what the block does."""
    folder = tmp_path_factory.mktemp("spans")
    model: Any = tiny_gpt2(layers=3)
    with torch.no_grad():
        for part in (model.transformer.h[1].attn, model.transformer.h[1].mlp):
            part.c_proj.weight.mul_(3)
    model.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    dense = dense_of(load_dense(folder / "dense"), BLOCKS)
    values = {
        "dense": "tiny", "sparse": {"blocks": BLOCKS, "width": 16, "keep": 1.0, "sinks": False}, "sparsity": {"l0": 0.95},
        "data": {"context": CONTEXT, "rows": 4, "source": str(text_of(folder))},
    }  # fmt: skip
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    reference_bt = torch.randint(2, VOCABULARY, (16, CONTEXT), generator=torch.Generator().manual_seed(5))
    start_from_dense(coupling, reference_bt)
    coupling.sparse.project(0.95)
    replace(coupling, reference_bt=reference_bt).save_pretrained(folder / "span")
    return folder / "span"


def text_of(folder: Path) -> Path:
    """A file of random text."""
    generator = torch.Generator().manual_seed(2)
    file = folder / "text.txt"
    rows = torch.randint(2, VOCABULARY, (60, 60), generator=generator).tolist()
    file.write_text("\n".join(words(*row) for row in rows))
    return file


@pytest.fixture(scope="module")
def span_task(span_folder: Path) -> Path:
    """Pairs that differ in their last token, with the two answers that the dense model tells apart best by it; the clearest."""
    dense, pairs = load_dense(span_folder.parent / "dense"), planted_pairs(2000)
    asked = answered(dense, pairs)
    first, second = int(asked.answer_bk[0, 0]), int(asked.wrong_bk[0, 0])

    def margin(tokens_bt: torch.Tensor, answer: int, wrong: int) -> torch.Tensor:
        logits_bv = dense.run(tokens_bt).logits_btv[:, -1]
        return logits_bv[:, answer] - logits_bv[:, wrong]

    with torch.no_grad():
        margin_b = torch.minimum(margin(pairs.prompt_bt, first, second), margin(pairs.counterfactual_bt, second, first))
    lines = [
        json.dumps({
            "prompt": words(*pairs.prompt_bt[row].tolist()), "counterfactual": words(*pairs.counterfactual_bt[row].tolist()),
            "answer": f" w{first}", "wrong": f" w{second}", "split": ("train", "train", "validation", "test")[place % 4],
        })
        for place, row in enumerate(margin_b.topk(60).indices.tolist())
    ]  # fmt: skip
    file = span_folder.parent / "last.jsonl"
    file.write_text("\n".join(lines))
    return file
