"""Tiny models that every test file may use: random, made here, on one core, with no download."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import (
    CONTEXT,
    VOCABULARY,
    coupling,  # noqa: F401  (a fixture)
    dense,  # noqa: F401
    tiny_gpt2,
    tiny_tokenizer,
    untrained,
)

from bridge.models.dense import load_dense


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Training flushes them, for the whole process; other libraries count on them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 200 short documents with some order in it."""
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    lines = []
    for _ in range(200):
        start, stride = torch.randint(2, VOCABULARY, (2,), generator=generator).tolist()
        words = " ".join(f"w{2 + (start + stride * index) % (VOCABULARY - 2)}" for index in range(40))
        lines.append(f'{{"text": "{words}"}}\n')
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="session")
def coupling_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained coupling to the tiny dense model's folder, with reference text, saved as `tiny`."""
    folder = tmp_path_factory.mktemp("couplings") / "tiny"
    made = untrained(load_dense(str(dense_folder)))
    made.sparse.project(0.3)
    reference_bt = torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    replace(made, reference_bt=reference_bt).save_pretrained(folder)
    return folder
