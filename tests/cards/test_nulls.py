"""Nulls: what they are made of, that they fail where they must, and that they are kept, resumed and not taken for another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cli_cases import assert_refused, run
from support.models import VOCABULARY, planted_sparse, untrained
from support.studies_suite_cases import task_file  # noqa: F401
from support.studies_task_cases import copied, corpus

from bridge.cards import nulls as task_nulls
from bridge.cards.evidence import NULLS, card_rules_digest
from bridge.cards.nulls import Nulls
from bridge.cards.task_circuit import CardError
from bridge.data.task_tokens import Resolved
from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense
from bridge.models.store import CheckpointError
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects, search_task
from bridge.studies.suite import resolved
from bridge.verdicts.null_couplings import NullError, fit_ridge, load_or_fit_uncoupled, ridge_bridges, shuffled_bridges
from bridge.verdicts.null_table import fingerprint, stored_task_nulls


def test_ridge_is_least_squares_where_there_is_no_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(3, 6, generator=generator, dtype=torch.float64), torch.tensor([1.0, -2, 3], dtype=torch.float64)
    found_weight, found_bias = fit_ridge(source, source @ weight.T + bias)
    torch.testing.assert_close(found_weight, weight, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(found_bias, bias, atol=1e-2, rtol=1e-2)
    noise = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    little, _ = fit_ridge(source, noise)
    exact = np.linalg.lstsq(source[:300].numpy(), noise[:300].numpy(), rcond=None)[0]
    assert float(little.norm()) < np.linalg.norm(exact)  # the largest penalty serves noise best


@torch.no_grad()
def test_ridge_bridges_decode_a_copy() -> None:
    """Of a sparse model whose residuals hold the dense ones linearly, what comes back is the dense residual."""
    coupling = copied()
    text_bt = torch.randint(2, VOCABULARY, (40, 12), generator=torch.Generator().manual_seed(3))
    bridges = ridge_bridges(coupling, text_bt)
    dense, sparse = coupling.dense.run(corpus()).residuals, coupling.sparse.run(corpus()).residuals
    for site in range(coupling.n_sites):
        error = (bridges[site].decode(sparse[site]) - dense[site]).square().sum() / (
            dense[site] - dense[site].mean(0)
        ).square().sum()
        assert error < 0.15, site  # what the norms do not read, a copy has not


@torch.no_grad()
def test_shuffled_bridges_are_the_same_maps_of_other_channels() -> None:
    coupling = copied()
    shuffled = shuffled_bridges(coupling, 0)
    for site in range(coupling.n_sites):
        before, after = coupling.bridges[site], shuffled[site]
        assert not torch.equal(before.decoder.weight, after.decoder.weight)
        for one, other in zip(before.decoder.weight.T.sort(0).values, after.decoder.weight.T.sort(0).values, strict=True):
            torch.testing.assert_close(one, other)
        h_btd = torch.randn(1, 3, coupling.dense.width, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(after.decode(after.encode(h_btd)), before.decode(before.encode(h_btd)), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def planted(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = load_dense(str(dense_folder))
    folder = tmp_path_factory.mktemp("nulls") / "bridge"
    coupling = replace(untrained(dense), sparse=planted_sparse(dense, decoys=20), reference_bt=corpus())
    coupling.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def against(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncoupled") / "model"
    shape = ["--set", "sparse.positions=learned", "--set", "sparse.head_channels=16", "--uncoupled"]
    options = ["--set", "sparse.width=32", "--set", "data.rows=4", "--device", "cpu", *shape]
    result = run("fit", dense_folder, "--l0", 0.25, "--data", text_file, "--tokens", 640, "--out", out, *options)
    torch.set_flush_denormal(False)
    assert result.exit_code == 0, result.output
    return out


def loaded(folder: Path, task: str) -> tuple[CoupledModels, Subjects, tuple, dict[str, TaskResult]]:
    coupling = CoupledModels.from_pretrained(folder)
    subjects = Subjects.of(coupling)
    found = resolved(subjects, task)
    return coupling, subjects, (found,), {found.task: search_task(subjects, found, explains="sparse", dense=False, budget=0.2)}


def test_every_null_fails_and_is_kept(planted: Path, against: Path, task_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    coupling, _, tasks, circuits = loaded(planted, str(task_file))
    assert (
        stored_task_nulls(coupling, card_rules_digest())[0] is None
        and "were not run" in stored_task_nulls(coupling, card_rules_digest())[1]
    )
    carded = []
    original = task_nulls.gather_task
    monkeypatch.setattr(task_nulls, "gather_task", lambda *a, **k: (carded.append(a[1].task), original(*a, **k))[1])
    nulls = Nulls(coupling, tasks, lambda task: circuits[task.task], against, 0.01, 1e9)
    first = nulls.run(lambda _: None)
    assert next(first).name == "uncoupled"
    first.close()  # killed after the first null
    kept, why = stored_task_nulls(coupling, card_rules_digest())
    assert kept is not None and [null.name for null in kept] == ["uncoupled"] and not why
    done = len(carded)
    results = list(Nulls(coupling, tasks, lambda task: circuits[task.task], against, 0.01, 1e9).run(lambda _: None))
    assert [null.name for null in results] == list(NULLS) and not any(null.passed for null in results)
    assert len(carded) <= 4 and len(carded) - done <= 3  # the first was not run again
    labels = next(null for null in results if null.name == "labels")
    assert labels.tasks[0].accuracy is not None and labels.tasks[0].accuracy < 0.9
    assert stored_task_nulls(coupling, card_rules_digest())[0] == tuple(results)
    again = len(carded)
    assert list(Nulls(coupling, tasks, lambda task: circuits[task.task], against, 0.01, 1e9).run(lambda _: None)) == results
    assert len(carded) == again
    with monkeypatch.context() as earlier:
        earlier.setattr("bridge.cards.evidence.VERSION", 0)
        assert (
            stored_task_nulls(coupling, card_rules_digest())[0] is None
            and "judged by other bounds" in stored_task_nulls(coupling, card_rules_digest())[1]
        )
    splits = {**tasks[0].splits, "train": tasks[0].splits["train"].reversed()}
    others = (replace(tasks[0], splits=splits),)  # a task whose prompts have changed is another
    list(Nulls(coupling, others, lambda task: circuits[task.task], against, 0.01, 1e9).run(lambda _: None))
    assert len(carded) > again


def test_a_null_that_cannot_be_run_has_not_failed(planted: Path, against: Path, task_file: Path) -> None:  # noqa: F811
    coupling, _, tasks, _ = loaded(planted, str(task_file))

    def alien(task: Resolved) -> TaskResult:
        raise CardError("the circuit is of another coupling")

    with pytest.raises(CardError, match="of another coupling"):
        list(Nulls(coupling, tasks, alien, against, 0.01, 1e9, seed=9).run(lambda _: None))
    kept, _ = stored_task_nulls(coupling, card_rules_digest())
    assert "bridges" not in [null.name for null in kept or ()]


def test_nulls_of_another_coupling_are_not_shown(planted: Path, tmp_path: Path) -> None:
    coupling = CoupledModels.from_pretrained(planted)
    folder = tmp_path / "other"
    coupling.save_pretrained(folder)
    file = {"tasks": {"coupling": "another", "rules": card_rules_digest(), "nulls": []}}
    (folder / "nulls.json").write_text(json.dumps(file))
    other = CoupledModels.from_pretrained(folder, dense=coupling.dense)
    assert stored_task_nulls(other, card_rules_digest()) == (
        None,
        "the stored nulls are of another coupling; `bridge nulls` runs them",
    )
    (folder / "nulls.json").write_text("{")
    assert "cannot be read" in stored_task_nulls(other, card_rules_digest())[1]
    with pytest.raises(CheckpointError, match="is not saved in a folder"):
        fingerprint(replace(other, path=None))
    assert stored_task_nulls(replace(other, path=None), card_rules_digest())[0] is None


def test_the_uncoupled_model_must_be_one(planted: Path, against: Path) -> None:
    coupling = CoupledModels.from_pretrained(planted)
    assert load_or_fit_uncoupled(coupling, against, 1, 0, lambda _: None).sparse.width == coupling.sparse.width
    with pytest.raises(NullError, match="was coupled"):
        load_or_fit_uncoupled(coupling, planted, 1, 0, lambda _: None)


def test_it_is_fitted_where_it_is_not_there(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    dense = load_dense(str(dense_folder))
    coupling = replace(untrained(dense, data={"rows": 4, "source": str(text_file)}), reference_bt=corpus())
    said = []
    other = load_or_fit_uncoupled(coupling, tmp_path / "fresh", 0.01, 0, said.append)
    torch.set_flush_denormal(False)
    assert not other.recipe.losses.coupled and (tmp_path / "fresh" / "coupling.json").is_file()
    assert other.sparse.locations() == coupling.sparse.locations() and "without bridges" in str(said[0])
    assert other.recipe.losses.kl and other.recipe.sparsity.l0 >= 1 / 16


def test_the_command_refuses_in_a_line(planted: Path, tmp_path: Path) -> None:
    assert_refused(run("nulls", tmp_path / "none"), "does not exist")
    assert_refused(run("nulls", planted, "--circuits", tmp_path), "holds no circuits")
