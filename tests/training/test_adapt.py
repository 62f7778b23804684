"""Going on to a fine-tune: from the base's weights, by its recipe, to the fine-tuned model; what is not one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.cli_cases import assert_refused, run
from support.finetune_cases import PROMPT, adapter_folder, base_folder
from support.models import tiny_gpt2, tiny_tokenizer

import bridge
from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense
from bridge.training.adapt import BUDGET_DIVISOR, prepare_adapted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    base_folder(folder)
    adapter_folder(folder, 0.0, "zero")
    adapter_folder(folder, 0.6)
    return folder


def test_it_starts_as_the_base_and_takes_a_twentieth(folder: Path) -> None:
    base = bridge.load(folder / "base")
    prepared = prepare_adapted(base, adapter=folder / "adapter")
    for mine, theirs in ((prepared.coupling.sparse, base.sparse), (prepared.coupling.bridges, base.bridges)):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=0, atol=0)
    recipe = prepared.coupling.recipe
    assert recipe.budget.tokens == 6400 // BUDGET_DIVISOR and recipe.budget.minutes is None
    assert (recipe.sparsity.l0, recipe.data, recipe.losses) == (base.recipe.sparsity.l0, base.recipe.data, base.recipe.losses)
    tuned = load_dense(folder / "dense", adapter=folder / "adapter")
    assert prepared.coupling.dense.fingerprint() == tuned.fingerprint() != base.dense.fingerprint()
    assert prepare_adapted(base, adapter=folder / "adapter", minutes=0.5).coupling.recipe.budget.tokens is None


def test_an_adapter_that_changes_nothing_leaves_the_dense_model_and_every_answer(folder: Path, tmp_path: Path) -> None:
    base = bridge.load(folder / "base")
    tuned = bridge.adapt(base, adapter=folder / "zero", out=tmp_path / "out")
    assert tuned.dense.fingerprint() == base.dense.fingerprint()
    for name, weight in base.sparse.state_dict().items():  # what the fine-tune left alone stays
        torch.testing.assert_close(tuned.sparse.state_dict()[name], weight, rtol=0, atol=0)
    assert not torch.equal(tuned.bridges[1].decoder.bias, base.bridges[1].decoder.bias)  # bridges learn
    found = bridge.diff(base, tuned, [PROMPT, "w3 w4 w8 w21"])
    assert found.verdict == "NOTHING CHANGED" and not found.channels
    assert [one.change for one in found.prompts] == [0.0, 0.0]


def test_the_command_adapts_and_what_it_wrote_loads_with_the_adapter(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    first = run("adapt", folder / "base", "--adapter", folder / "adapter", "--tokens", 512, "--out", out, "--stretch", 0)
    assert first.exit_code == 0 and (out / "training.json").is_file(), first.stderr
    result = run("adapt", folder / "base", "--adapter", folder / "adapter", "--out", out, "--resume")
    assert result.exit_code == 0 and "start" not in result.stdout, result.stderr  # it goes on by the recipe that was saved
    tuned = CoupledModels.from_pretrained(out)
    assert tuned.recipe.budget.tokens == 512 and tuned.recipe.adapts
    assert tuned.dense.fingerprint() == load_dense(folder / "dense", adapter=folder / "adapter").fingerprint()
    base = CoupledModels.from_pretrained(folder / "base")
    q = "blocks.0.q.weight"
    assert not torch.equal(tuned.sparse.get_parameter(q), base.sparse.get_parameter(q))
    for name in ("embedding", "positions", "unembedding.weight"):  # a LoRA of the blocks leaves these alone
        assert torch.equal(tuned.sparse.get_parameter(name), base.sparse.get_parameter(name))
    assert json.loads((out / "log.jsonl").read_text().splitlines()[0])["l0"] == pytest.approx(0.25, abs=0.01)  # from the first


def test_a_fine_tuned_model_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    merged = load_dense(folder / "dense", adapter=folder / "adapter").model
    merged.save_pretrained(tmp_path / "merged")
    refused = run("adapt", folder / "base", "--model", tmp_path / "merged", "--tokens", 64, "--out", tmp_path / "out")
    assert_refused(refused, "has no tokenizer; save the tokenizer of")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    tuned = bridge.load(folder / "base").adapt(model=str(tmp_path / "merged"), tokens=64)
    assert tuned.dense.fingerprint() == load_dense(tmp_path / "merged").fingerprint()


def test_what_is_no_fine_tune_of_the_base_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> None:
        *options, message = arguments
        assert_refused(run("adapt", folder / "base", "--out", tmp_path / "out", *options), str(message))
        assert not (tmp_path / "out").exists()

    refused("the fine-tune must be given exactly once; give either")
    refused("--adapter", folder / "adapter", "--model", folder / "dense", "the fine-tune must be given exactly once; give either")
    # an adapter of another shape; of another model of this shape, that is there or that is not
    tiny_gpt2(width=32).save_pretrained(tmp_path / "wide")
    refused("--adapter", adapter_folder(tmp_path, 0.1, "wide-adapter", tmp_path / "wide"), "was trained on")
    tiny_gpt2(seed=9).save_pretrained(tmp_path / "other")
    other = adapter_folder(tmp_path, 0.1, "other-adapter", tmp_path / "other")
    refused("--adapter", other, "its weights differ; give an adapter of that dense model")
    shutil.rmtree(tmp_path / "other")
    refused("--adapter", other, "which is not the dense model")
    config = other / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "other"), "hub/dense"))  # the same by name
    assert prepare_adapted(bridge.load(folder / "base"), adapter=other).coupling.dense.n_sites == 5
    # a model of another depth, and one with another tokenizer
    tiny_gpt2(layers=3).save_pretrained(tmp_path / "deep")
    tiny_tokenizer().save_pretrained(tmp_path / "deep")
    refused("--model", tmp_path / "deep", "is not a fine-tune of the dense model of")
    shutil.copytree(folder / "dense", tmp_path / "renamed")
    tokens = tmp_path / "renamed" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"w7"', '"x7"'))
    refused("--model", tmp_path / "renamed", f"the tokenizer of '{tmp_path / 'renamed'}' differs from that of")
