"""What tests share: studies_suite_cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, planted_sparse, untrained

from bridge.models.dense import load_dense


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


@pytest.fixture(scope="module")
def bridge_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coupling on disk whose sparse model answers the planted task."""
    dense = load_dense(str(dense_folder))
    corpus_bt = torch.randint(2, VOCABULARY, (12, CONTEXT), generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("planted") / "bridge"
    replace(untrained(dense), sparse=planted_sparse(dense, decoys=20), reference_bt=corpus_bt).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tasks") / "planted.jsonl"
    generator = torch.Generator().manual_seed(0)
    lines = []
    for row in range(60):
        start = torch.randint(6, VOCABULARY - 1, (4,), generator=generator).tolist()
        example = {"prompt": words(*start, 2), "counterfactual": words(*start, 3), "answer": " w4", "wrong": " w5"}
        lines.append(json.dumps({**example, "split": ("train", "train", "validation", "test")[row % 4]}))
    file.write_text("\n".join(lines))
    return file
