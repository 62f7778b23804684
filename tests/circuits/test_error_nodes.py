"""Means beside a coupling: taken once, those of this very coupling and text, and never in the way."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.circuits import error_nodes
from bridge.circuits.error_nodes import MEANS, reference_means, reference_rows
from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location

Means = dict[Location, Tensor]


@pytest.fixture
def folder(coupling_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(coupling_folder, tmp_path / "tiny", ignore=shutil.ignore_patterns(f"{MEANS}*"))
    return tmp_path / "tiny"


def means_of(folder: Path, path: str | None = "", rows: int = 8) -> tuple[CoupledModels, Means]:
    coupling = CoupledModels.from_pretrained(folder)
    coupling = coupling if path == "" else replace(coupling, path=path)
    assert coupling.reference_bt is not None
    return coupling, reference_means(coupling, reference_rows(coupling, coupling.reference_bt[:rows]))


def same(one: Means, other: Means) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[at], other[at]) for at in one)


def test_what_was_kept_is_read_instead_of_taken_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, means = means_of(folder)
    assert [file.suffix for file in sorted(folder.iterdir()) if MEANS in file.name] == [".safetensors", ".json"]
    monkeypatch.setattr(error_nodes, "corpus_means", lambda *_: pytest.fail("taken again"))
    assert same(means_of(folder)[1], means)


def test_other_text_weights_or_bridges_have_means_of_their_own(folder: Path) -> None:
    coupling, means = means_of(folder)
    assert not same(means_of(folder, rows=4)[1], means)
    assert same(means_of(folder)[1], means)
    for change in (coupling.sparse.unembedding.bias, coupling.bridges[1].encoder.weight):
        changed = replace(coupling)
        with torch.no_grad():
            change.add_(1.0)
        assert coupling.reference_bt is not None
        found = reference_means(changed, reference_rows(changed, coupling.reference_bt))
        assert not same(found, means)
        means = found


def test_another_training_of_the_same_weights_keeps_the_means(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe may get new numbers in a later version, which say nothing about the models; other shapes are other models."""
    coupling, _ = means_of(folder)
    recipe, text_bt = coupling.recipe, coupling.reference_bt
    assert text_bt is not None
    shape = recipe.sparse.model_copy(update={"keep": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(error_nodes, "corpus_means", lambda *_: pytest.fail("taken again"))
        weighted = recipe.model_copy(update={"losses": recipe.losses.model_copy(update={"kl": 7.0})})
        reference_means(replace(coupling, recipe=weighted), reference_rows(coupling, text_bt))
        with pytest.raises(pytest.fail.Exception, match="taken again"):
            other = replace(coupling, recipe=recipe.model_copy(update={"sparse": shape}))
            reference_means(other, reference_rows(other, text_bt))


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
@pytest.mark.parametrize("pattern", [f"{MEANS}-*.safetensors", f"{MEANS}.json"])
def test_a_file_that_cannot_be_read_counts_as_none(folder: Path, content: bytes | None, pattern: str) -> None:
    _, means = means_of(folder)
    (file,) = folder.glob(pattern)
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    assert same(means_of(folder)[1], means)


@pytest.mark.parametrize("path", [None, "no/such/folder"])
def test_a_coupling_in_no_folder_keeps_nothing(folder: Path, path: str | None) -> None:
    _, means = means_of(folder, path)
    assert not [*folder.glob(f"*{MEANS}*")] and means


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_left_alone(folder: Path) -> None:
    folder.chmod(0o555)
    _, means = means_of(folder)
    assert not [*folder.glob(f"*{MEANS}*")] and means


@pytest.mark.parametrize("name", ["python-bridge-32", "python-bridge-4"])
def test_what_ships_has_its_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_nodes, "corpus_means", lambda *_: pytest.fail("taken again"))
    coupling = CoupledModels.from_pretrained(Path(__file__).parents[2] / "checkpoints" / name)
    assert coupling.reference_bt is not None
    assert reference_means(coupling, reference_rows(coupling, coupling.reference_bt))
