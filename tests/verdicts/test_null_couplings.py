"""Nulls of a span: what its model begins and ends with is part of it, and stays; all other maps are fitted or shuffled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cli_cases import run
from support.models import CONTEXT, VOCABULARY
from support.span_cases import span_folder  # noqa: F401

from bridge.models.bridges import Bridge, CoupledModels
from bridge.training.loop import fit
from bridge.verdicts.null_couplings import NULL_NAMES, null_coupling

TOKENS_BT = torch.randint(2, VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def span(span_folder: Path) -> CoupledModels:  # noqa: F811
    return CoupledModels.from_pretrained(span_folder)


def ends(coupling: CoupledModels) -> tuple[Bridge, Bridge]:
    return coupling.bridges[0], coupling.bridges[coupling.n_sites - 1]


@torch.no_grad()
def test_shuffled_bridges_leave_a_spans_own_answers(span: CoupledModels) -> None:
    null = null_coupling(span, "bridges")
    torch.testing.assert_close(null.sparse.run(TOKENS_BT).logits_btv, span.sparse.run(TOKENS_BT).logits_btv)
    for site in range(span.n_sites):
        for name in ("encoder", "decoder"):
            before, after = (one.bridges[site].get_submodule(name).get_parameter("weight") for one in (span, null))
            assert torch.equal(before, after) == ((site, name) in span.ends)


@torch.no_grad()
def test_ridge_bridges_of_permuted_weights_leave_its_ends(span: CoupledModels) -> None:
    null = null_coupling(span, "weights")
    for (before, after), name in zip(zip(ends(span), ends(null), strict=True), ("encoder", "decoder"), strict=True):
        assert torch.equal(before.get_submodule(name).get_parameter("weight"), after.get_submodule(name).get_parameter("weight"))
        assert torch.equal(before.scale, after.scale) and torch.equal(before.mean_d, after.mean_d)
    # it begins where the coupling does, and computes something else; each of its sites is decoded better than by the mean
    assert torch.equal(null.sparse.embed(TOKENS_BT), span.sparse.embed(TOKENS_BT))
    ours, theirs = null.sparse.run(TOKENS_BT), span.sparse.run(TOKENS_BT)
    assert float((ours.logits_btv - theirs.logits_btv).abs().max()) > 0.1
    assert span.reference_bt is not None
    dense, sparse = null.dense.run(span.reference_bt).residuals, null.sparse.run(span.reference_bt).residuals
    for site in range(span.n_sites - 1):
        h_btd = dense[site]
        unexplained = (null.bridges[site].decode(sparse[site]) - h_btd).square().sum() / (
            h_btd - h_btd.mean((0, 1))
        ).square().sum()
        assert unexplained < 0.9, site


def test_an_uncoupled_span_trains_its_ends_alone(span: CoupledModels, span_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    null = null_coupling(span, "uncoupled", against=tmp_path / "uncoupled", minutes=0.02)
    fitted = CoupledModels.from_pretrained(tmp_path / "uncoupled", dense=span.dense)
    assert not fitted.recipe.losses.coupled and fitted.recipe.losses.kl and fitted.blocks == span.blocks
    with torch.no_grad():
        for site in range(span.n_sites):
            untrained = Bridge(span.dense.width, span.sparse.width, 1.0, seed=fitted.recipe.seed)
            for name in ("encoder", "decoder"):
                weights = (one.get_submodule(name).get_parameter("weight") for one in (untrained, fitted.bridges[site]))
                assert torch.equal(*weights) == ((site, name) not in span.ends), (site, name)
        # the null's model is that one, between its own ends
        torch.testing.assert_close(null.sparse.run(TOKENS_BT).logits_btv, fitted.sparse.run(TOKENS_BT).logits_btv)
        inner = null.bridges[1].decoder.weight
        assert not torch.equal(inner, fitted.bridges[1].decoder.weight)


def test_a_span_learns_text_alone_within_its_model(span_folder: Path) -> None:  # noqa: F811
    losses: list[float] = []
    folder = span_folder.parent
    fitted = fit(
        str(folder / "dense"), 0.5, data=str(folder / "text.txt"), tokens=4096, blocks="1:2", uncoupled=True,
        settings={"data.rows": 4, "data.context": CONTEXT}, on_progress=lambda state: losses.append(state.losses["ce"]),
    )  # fmt: skip
    assert fitted.ends and not fitted.recipe.losses.coupled
    assert fitted.reference_bt is not None
    with torch.no_grad():
        logits_btv = fitted.sparse.run(fitted.reference_bt).logits_btv
    assert bool(logits_btv.isfinite().all())


def test_bridges_alone_leave_a_spans_model(span: CoupledModels, span_folder: Path) -> None:  # noqa: F811
    """Its own ends too: what circuits were found in answers as before."""
    start = {"optimizer.rate": 0, "sparse.start": str(span_folder), "sparse.sinks": False, "sparsity.l0": 0.95}
    settings = {**start, "data.rows": 4, "data.context": CONTEXT}
    dense, text = str(span_folder.parent / "dense"), str(span_folder.parent / "text.txt")
    fitted = fit(dense, data=text, tokens=512, settings=settings)
    with torch.no_grad():
        assert torch.equal(fitted.sparse.run(TOKENS_BT).logits_btv, span.sparse.run(TOKENS_BT).logits_btv)
    assert not torch.equal(fitted.bridges[1].decoder.weight, span.bridges[1].decoder.weight)


def test_the_command_runs_them_on_prompts(span_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "span"
    CoupledModels.from_pretrained(span_folder).save_pretrained(folder)
    result = run("nulls", folder, "--prompts", 2, "--against", tmp_path / "uncoupled", "--minutes", 0.02)
    assert result.exit_code == 0, result.output
    kept = json.loads((folder / "nulls.json").read_text())["prompts"]["nulls"]
    assert [null["name"] for null in kept] == list(NULL_NAMES) and all(null["prompts"] == 2 for null in kept)


def test_prompts_of_a_coupling_without_text_are_refused(span_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    replace(CoupledModels.from_pretrained(span_folder), reference_bt=None).save_pretrained(tmp_path / "span")
    result = run("nulls", tmp_path / "span", "--prompts", 2)
    assert result.exit_code == 2
    assert result.stderr == "bridge: the coupling holds no reference text to cut prompts from; fit it again\n"
