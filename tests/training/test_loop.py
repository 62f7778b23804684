"""Fits of tiny models: what they reach, how they stop, and that a run that was cut ends where an uncut one does."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bridges_cases import lora_folder
from support.models import CONTEXT, tiny_gpt2, tiny_tokenizer
from support.tiny_families import tiny

import bridge
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import DenseModelError
from bridge.models.residual import Enter
from bridge.models.store import CheckpointError, read_folder
from bridge.nodes.statistics import sparse_fingerprint
from bridge.recipe import BRIDGE_LOSSES, Losses, RecipeError, recipe_values
from bridge.training import loop as training
from bridge.training.loop import FitError, FitStopped, Progress, finish, train
from bridge.training.objective import Objective, draw_splice
from bridge.training.prepare import PROCESS_BYTES, memory_needed, prepare
from bridge.training.refit import AnswerContrast, residual_gradients

ROWS, STEPS = 4, 10
TOKENS = ROWS * CONTEXT * STEPS
SETTINGS: dict[str, Any] = {"sparse.width": 32, "sparse.head_channels": 8, "data.rows": ROWS, "optimizer.eps": 1e-3}


@pytest.fixture(autouse=True)
def _every_step_is_reported_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


def values(text_file: Path, tokens: int = TOKENS, **settings: Any) -> dict[str, Any]:
    return recipe_values(l0=0.1, data=str(text_file), tokens=tokens, settings={**SETTINGS, **settings})


def fitted(folder: Path, text_file: Path, out: Path | None = None, **options: Any) -> tuple[CoupledModels, list[Progress]]:
    """A fit to a folder, and its reports."""
    settings = {**SETTINGS, **options.pop("settings", {})}
    reports: list[Progress] = []
    coupling = bridge.fit(
        folder, **{"l0": 0.1, "tokens": TOKENS, **options}, data=str(text_file), out=out, settings=settings, device="cpu",
        on_progress=reports.append,
    )  # fmt: skip
    return coupling, reports


def cut_and_resumed(folder: Path, values: dict[str, Any], out: Path) -> None:
    """A fit that is stopped at its sixth step, and goes on to its end."""
    with pytest.raises(FitStopped):
        for report in train(prepare(folder, values, out=out, device="cpu")):
            if report.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
    resumed = prepare(folder, values, out=out, resume=True, device="cpu")
    list(train(resumed))
    finish(resumed)


def digest(out: Path) -> str:
    """Of the final coupling; the folder must hold nothing that an uncut run does not leave."""
    file = next(out.glob("coupling-*.safetensors"))
    assert {path.name for path in out.iterdir()} == {"coupling.json", file.name, "log.jsonl", "README.md"}
    return hashlib.sha256(file.read_bytes()).hexdigest()


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uncut(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, float]]]:
    """The digest and the log of a run that nobody interrupts or saves in between."""
    out = tmp_path_factory.mktemp("uncut") / "run"
    run = prepare(dense_folder, values(text_file), out=out, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "REPORT_SECONDS", 0.0)
        for _ in train(run):
            pass
    finish(run)
    return digest(out), logged(out)


# -- what a fit reaches -------------------------------------------------------------------------------------------------


def test_losses_fall_and_every_matrix_ends_at_its_number(dense_folder: Path, text_file: Path) -> None:
    """Although weights go all the while; what encoders aim at, the sparse residuals, is still moving, so their error may rise."""
    settings = {"optimizer.rate": 3e-2, "optimizer.bridge_rate": 3e-2, "sparse.start": "random"}
    coupling, reports = fitted(dense_folder, text_file, l0=0.2, tokens=150 * ROWS * CONTEXT, settings=settings)
    for name in ("ce", "kl", "nmse_decoder", "hybrid_in", "hybrid_out", "hybrid_both"):
        early, late = (sum(report.losses[name] for report in part) for part in (reports[:20], reports[-20:]))
        assert late < (0.95 if name == "ce" else 0.8) * early, name
    for name, weight in coupling.sparse.sparse_weights().items():
        assert int((weight != 0).sum()) == max(1, math.floor(0.2 * weight.numel() + 0.5)), name
    last = reports[-1]
    assert (last.step, last.steps, last.tokens, last.fraction, last.seconds_left) == (150, 150, 150 * ROWS * CONTEXT, 1, 0)
    assert last.l0 == coupling.sparse.achieved_l0() and last.tokens_per_second > 0
    steps = [report.step for report in reports]
    assert steps == list(range(1, 151))
    falling = [report.l0 for report in reports]
    assert falling == sorted(falling, reverse=True) and falling[0] > 0.9
    assert falling[74] == falling[-1]  # the anneal takes half of the training


@pytest.mark.parametrize("anneal", [0.01, 1.0])
def test_even_the_shortest_fit_ends_at_the_target(dense_folder: Path, text_file: Path, anneal: float) -> None:
    coupling, _ = fitted(dense_folder, text_file, tokens=1, settings={"sparsity.anneal": anneal})
    assert coupling.sparse.achieved_l0() == pytest.approx(0.1, abs=1e-3)


def test_a_number_of_weights_is_a_target_too(dense_folder: Path, text_file: Path) -> None:
    coupling, _ = fitted(dense_folder, text_file, l0=500, tokens=1)
    kept = sum(int((w != 0).sum()) for w in coupling.sparse.sparse_weights().values())
    assert abs(kept - 500) <= len(coupling.sparse.sparse_weights())


def test_a_coupling_goes_on_from_another(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Sparser, from weights that are there: untrained and at the same L0 it is the other one; the anneal falls from its L0."""
    first, _ = fitted(dense_folder, text_file, tokens=4 * ROWS * CONTEXT, out=tmp_path / "first")
    settings = {"sparse.start": str(tmp_path / "first"), "sparsity.anneal": 1.0}
    run = prepare(dense_folder, values(text_file, TOKENS, **settings, **{"sparsity.l0": 0.02}), device="cpu")
    for one, other in zip(run.coupling.sparse.parameters(), first.sparse.parameters(), strict=True):
        assert torch.equal(one, other)
    assert run.started is not None and run.started.l0 == first.sparse.achieved_fractions()
    reports = list(train(run))
    assert all(report.l0 <= first.sparse.achieved_l0() + 1e-3 for report in reports)
    assert reports[-1].l0 == pytest.approx(0.02, abs=2e-3)


@pytest.mark.parametrize("other", [{"seed": 1}, {"data.stream": True}])
def test_what_another_coupling_was_trained_on_is_not_held_out(
    other: dict[str, Any], dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    fitted(dense_folder, text_file, tokens=4 * ROWS * CONTEXT, out=tmp_path / "first")
    start = {"sparse.start": str(tmp_path / "first")}
    with pytest.raises(RecipeError, match="holds out other parts of .* than .*first', which .*give seed 0 and data.stream false"):
        prepare(dense_folder, values(text_file, TOKENS, **start, **other), device="cpu")
    other_text = tmp_path / "other.jsonl"
    other_text.write_text("\n".join(text_file.read_text().splitlines()[::-1]))
    assert prepare(dense_folder, values(other_text, TOKENS, **start, **other), device="cpu").started is not None


def test_bridges_learn_alone(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """At a rate of 0, and through a cut: not a bit of the sparse model changes, and circuits are those of the same model."""
    first, _ = fitted(dense_folder, text_file, tokens=4 * ROWS * CONTEXT, out=tmp_path / "first")
    settings = {
        "sparse.start": str(tmp_path / "first"), "optimizer.rate": 0, "losses.ce": 0, "losses.kl": 0, "losses.carried": 1,
        "losses.temperature": 2, "optimizer.bridge_rate": 3e-2,
    }  # fmt: skip
    other_text = tmp_path / "other.jsonl"
    other_text.write_text("\n".join(text_file.read_text().splitlines()[::-1]))
    coupling, reports = fitted(dense_folder, other_text, settings=settings, tokens=60 * ROWS * CONTEXT, out=tmp_path / "second")
    # the means, and with them circuits, are over the same text
    assert first.reference_bt is not None and coupling.reference_bt is not None
    assert torch.equal(first.reference_bt, coupling.reference_bt)
    for name, weight in first.sparse.named_parameters():
        assert torch.equal(weight, coupling.sparse.get_parameter(name)), name
    assert sparse_fingerprint(coupling.sparse) == sparse_fingerprint(first.sparse)
    assert {name for name in reports[0].losses} == {"total", *BRIDGE_LOSSES}
    for name, most in (("nmse_decoder", 0.9), ("carried", 0.97)):
        early, late = (sum(report.losses[name] for report in part) for part in (reports[:10], reports[-10:]))
        assert late < most * early, name
    cut_and_resumed(dense_folder, values(text_file, **settings), tmp_path / "cut")
    fitted(dense_folder, text_file, settings=settings, out=tmp_path / "whole")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_fit_ends_with_decoders_refitted(dense_folder: Path, text_file: Path) -> None:
    """Unless told not to; nothing but decoders differs, and on other text gradients agree better."""
    without, with_it = (fitted(dense_folder, text_file, settings={"refit.slopes": weight})[0] for weight in (0, 1))
    for name, one in without.sparse.named_parameters():
        assert torch.equal(one, with_it.sparse.get_parameter(name)), name
    assert with_it.reference_bt is not None
    asked = AnswerContrast.draw(with_it.dense.run(with_it.reference_bt).logits_btv, torch.Generator().manual_seed(0))
    gradient_h, _ = residual_gradients(with_it.dense, with_it.reference_bt, asked)
    gradient_x, _ = residual_gradients(with_it.sparse, with_it.reference_bt, asked)

    def agreement(of: CoupledModels) -> float:
        cosines = [
            torch.cosine_similarity((h @ (of.bridges[i].decoder.weight * of.bridges[i].scale)).flatten(), x.flatten(), 0)
            for i, (h, x) in enumerate(zip(gradient_h, gradient_x, strict=True))
        ]
        return float(torch.stack(cosines).mean())

    assert agreement(with_it) > agreement(without) + 0.01


def test_bridges_alone_need_a_model_that_is_there(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give a coupling's folder as sparse.start"):
        prepare(dense_folder, values(text_file, **{"optimizer.rate": 0}), device="cpu")
    fitted(dense_folder, text_file, tokens=1, out=tmp_path / "first")
    settings = {"sparse.start": str(tmp_path / "first"), "optimizer.rate": 0, "sparsity.l0": 0.05}
    with pytest.raises(RecipeError, match="L0 .0.0999.* in blocks.* the recipe asks for 0.05 .*; give sparsity.l0 0.0999"):
        prepare(dense_folder, values(text_file, **settings), device="cpu")


@pytest.mark.parametrize("native", ["always", "never"])
def test_the_ends_of_the_model_can_keep_more(dense_folder: Path, text_file: Path, tmp_path: Path, native: str) -> None:
    """Also in a run that is cut, and when another goes on from it."""
    settings: dict[str, Any] = {"sparsity.embed_l0": 0.5, "sparsity.anneal": 0.3, "sparsity.native": native}
    whole, _ = fitted(dense_folder, text_file, settings=settings, out=tmp_path / "whole")
    blocks, embed = whole.sparse.achieved_fractions().blocks, whole.sparse.achieved_fractions().embed
    assert blocks == pytest.approx(0.1, rel=1e-2) and embed == pytest.approx(0.5, rel=1e-2)

    cut_and_resumed(dense_folder, values(text_file, **settings), tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")

    further = prepare(
        dense_folder,
        values(text_file, **{**settings, "sparse.start": str(tmp_path / "whole"), "sparsity.l0": 0.05}),
        device="cpu",
    )
    assert further.started is not None and further.started.l0 == whole.sparse.achieved_fractions()


def test_another_shape_is_no_start(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    fitted(dense_folder, text_file, tokens=1, out=tmp_path / "first")
    with pytest.raises(RecipeError, match="another shape .keep."):
        settings = {"sparse.start": str(tmp_path / "first"), "sparse.keep": 0.25}
        prepare(dense_folder, values(text_file, TOKENS, **settings), device="cpu")
    with pytest.raises(CheckpointError, match="nowhere"):
        prepare(dense_folder, values(text_file, TOKENS, **{"sparse.start": str(tmp_path / "nowhere")}), device="cpu")


def test_a_live_model_is_left_as_it_was(text_file: Path) -> None:
    model = tiny_gpt2().train()
    before = copy.deepcopy(model.state_dict())
    coupling = bridge.fit(
        model, tokenizer=tiny_tokenizer(), l0=0.1, data=str(text_file), tokens=2 * ROWS * CONTEXT, settings=SETTINGS, device="cpu"
    )
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert coupling.path is None and coupling.recipe.dense == "GPT2LMHeadModel"
    assert coupling.reference_bt is not None and coupling.reference_bt.shape[1] == coupling.context == CONTEXT


def test_uncoupled_is_the_same_whatever_the_dense_weights(text_file: Path) -> None:
    def alone(seed: int) -> CoupledModels:
        return bridge.fit(
            tiny_gpt2(seed), tokenizer=tiny_tokenizer(), l0=0.1, data=str(text_file), tokens=TOKENS, settings=SETTINGS,
            uncoupled=True, device="cpu", on_progress=lambda progress: names.update(progress.losses),
        )  # fmt: skip

    names: set[str] = set()
    one, other = alone(0), alone(1)
    assert names == {"total", "ce"}
    for name, parameter in one.sparse.named_parameters():
        assert torch.equal(parameter, other.sparse.get_parameter(name))
    fresh = new_coupling(one.dense, one.recipe).bridges.state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in one.bridges.state_dict().items())


def test_the_seed_decides(dense_folder: Path, text_file: Path) -> None:
    one, again, other = (fitted(dense_folder, text_file, seed=seed, tokens=128)[0].sparse.embedding for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_the_literal_objective_fits(dense_folder: Path, text_file: Path) -> None:
    _, reports = fitted(dense_folder, text_file, settings={"losses.splice": "literal"})
    assert "hybrid_both" not in reports[-1].losses and reports[-1].losses["hybrid_in"] > 0
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())


def test_every_neuron_keeps_its_minimum(dense_folder: Path, text_file: Path) -> None:
    coupling, _ = fitted(dense_folder, text_file, settings={"sparsity.min_per_neuron": 2, "sparse.start": "random"})
    for name, weight in coupling.sparse.sparse_weights().items():
        if name.endswith(("up.weight", "q.weight", "k.weight", "v.weight")):
            assert int((weight != 0).sum(1).min()) >= 2, name
        if name.endswith(("down.weight", "o.weight")):
            assert int((weight != 0).sum(0).min()) >= 2, name


def test_bfloat16_keeps_float32_weights(dense_folder: Path, text_file: Path) -> None:
    """And a float32 fit may follow in the same process."""
    settings = {"sparse.keep": 0.25}  # where nothing is lost at the start there is nothing to compare
    coupling, reports = fitted(dense_folder, text_file, dtype="bfloat16", settings=settings)
    assert all(p.dtype == torch.float32 for p in coupling.sparse.parameters())
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())
    _, plain = fitted(dense_folder, text_file, settings=settings)
    for name, value in plain[0].losses.items():
        assert reports[0].losses[name] != value  # it really was another arithmetic, and yet
        assert reports[0].losses[name] == pytest.approx(value, rel=0.1), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fit_on_a_gpu_is_that_on_a_cpu(dense_folder: Path, text_file: Path, tmp_path: Path, dtype: str) -> None:
    """Its first losses are, its weights end at their number, and what it saves opens on a CPU with the same answers."""
    _, on_cpu = fitted(dense_folder, text_file)
    reports: list[Progress] = []
    settings = {**SETTINGS, "data.micro_rows": 2}
    coupling = bridge.fit(
        dense_folder, l0=0.1, tokens=TOKENS, data=str(text_file), settings=settings, out=tmp_path / "run", device="cuda",
        dtype=dtype, dense_dtype=dtype, device_map="auto", on_progress=reports.append,
    )  # fmt: skip
    assert coupling.sparse.device.type == coupling.dense.device.type == "cuda"
    for name, value in on_cpu[0].losses.items():
        assert reports[0].losses[name] == pytest.approx(value, rel=2e-2 if dtype == "float32" else 0.2, abs=1e-2), name
    assert reports[-1].l0 == pytest.approx(0.1, abs=1e-3)
    tokens_bt = torch.randint(2, 38, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    here = bridge.load(tmp_path / "run")
    assert here.sparse.device.type == "cpu"
    there_btv = coupling.sparse.run(tokens_bt.to("cuda")).logits_btv.cpu()
    torch.testing.assert_close(here.sparse.run(tokens_bt).logits_btv, there_btv, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_dense_model_in_bfloat16_beside_float32(family: str, text_file: Path, tmp_path: Path) -> None:
    """Its logits are transformers' own, what leaves it is float32, and the saved coupling opens with it as it was."""
    model = tiny_gpt2() if family == "gpt2" else tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    coupling, reports = fitted(tmp_path / "dense", text_file, tmp_path / "run", dense_dtype="bfloat16", device_map={"": "cpu"})
    assert all(math.isfinite(value) for report in reports for value in report.losses.values())
    assert coupling.recipe.dense_dtype == "bfloat16" and coupling.dense.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for module in (coupling.sparse, coupling.bridges) for p in module.parameters())
    tokens_bt = torch.randint(2, 38, (3, CONTEXT), generator=torch.Generator().manual_seed(0))
    own: Any = type(model).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    trace = bridge.load(tmp_path / "run").dense.run(tokens_bt)
    assert torch.equal(trace.logits_btv, own.eval()(tokens_bt).logits.float())
    assert {x.dtype for x in (trace.logits_btv, *trace.residuals)} == {torch.float32}
    for site, h_btd in enumerate(trace.residuals):  # what is cast on its way out is the same again on its way in
        assert torch.equal(coupling.dense.run(tokens_bt, Enter.at(site, h_btd)).logits_btv, trace.logits_btv)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_is_merged_first(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    adapter = lora_folder(tmp_path / "adapter")
    plain, _ = fitted(dense_folder, text_file, tokens=1)
    coupling, _ = fitted(dense_folder, text_file, tmp_path / "run", tokens=1, adapter=adapter)
    assert coupling.recipe.adapter == adapter
    assert coupling.dense.fingerprint() != plain.dense.fingerprint()
    assert bridge.load(tmp_path / "run").dense.fingerprint() == coupling.dense.fingerprint()


def test_memory_needed_is_near_what_is_there(dense_folder: Path, text_file: Path) -> None:
    """Counted after a step: weights, gradients and moments; what one step keeps is small at this width and one row."""
    settings = {"sparse.width": 256, "data.rows": 2, "data.context": 2}
    run = prepare(dense_folder, recipe_values(l0=0.1, data=str(text_file), tokens=1, settings=settings), device="cpu")
    parameters = [p for module in (run.coupling.sparse, run.coupling.bridges) for p in module.parameters()]
    four_copies = 4 * sum(p.numel() * p.element_size() for p in parameters)
    frozen = sum(p.numel() * p.element_size() for p in run.coupling.dense.model.parameters())
    needed = memory_needed(run.coupling.dense, run.coupling.recipe) - PROCESS_BYTES
    assert (four_copies + frozen) / 2 < needed < 2 * (four_copies + frozen)


def test_the_tracker_that_was_asked_for_writes(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fitted(dense_folder, text_file, tmp_path / "run", tokens=128, log_with="tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "losses",
    [{}, {"splice": "literal"}, {"ablated": 1, "ablated_most": 1e-9}, Losses().uncoupled().model_dump()],
    ids=["sampled", "literal", "ablated", "ce"],
)
def test_pieces_add_up_to_the_undivided_batch(dense_folder: Path, text_file: Path, losses: dict[str, Any]) -> None:
    """Terms and gradients, down to pieces of one row, some of which have no row of one kind."""
    settings = {"data.rows": 8, "sparse.start": "random", **{f"losses.{name}": value for name, value in losses.items()}}

    def step(micro_rows: int | None) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        given = values(text_file, **settings, **({} if micro_rows is None else {"data.micro_rows": micro_rows}))
        run = prepare(dense_folder, given, device="cpu")
        coupling, recipe = run.coupling, run.coupling.recipe
        tokens_bt, splice = run.blocks.batch(0, 8, 0), None
        if recipe.losses.coupled and recipe.losses.splice == "sampled":
            splice = draw_splice(8, coupling.n_sites, recipe.losses, torch.Generator().manual_seed(0))
        objective = Objective(coupling.dense, coupling.sparse, coupling.bridges, recipe.losses)
        if micro_rows is None:
            terms = objective(tokens_bt, splice)
            terms["total"].backward()
        else:
            assert len(run.pieces) == 8 // micro_rows
            terms = training._accumulate(objective, run.accelerator, tokens_bt, splice, run.pieces)
        return terms, [p.grad for p in objective.parameters() if p.grad is not None]

    whole, gradients_whole = step(None)
    for micro_rows in (4, 1):
        terms, gradients = step(micro_rows)
        assert terms.keys() == whole.keys()
        for name, term in terms.items():
            torch.testing.assert_close(term, whole[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
        for one, other in zip(gradients, gradients_whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# -- how a fit stops and goes on ----------------------------------------------------------------------------------------


def resumed(folder: Path, text_file: Path, out: Path, **settings: Any) -> None:
    run = prepare(folder, values(text_file, **settings), out=out, resume=True, device="cpu")
    for _ in train(run):
        pass
    finish(run)


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_cut_run_ends_where_an_uncut_one_does(dense_folder: Path, text_file: Path, tmp_path: Path, uncut, cut: int) -> None:
    """Cut while step `cut` is reported: what is saved is the step before, and what was logged of this one is logged again."""
    run = prepare(dense_folder, values(text_file), out=tmp_path / "run", device="cpu")
    steps = train(run)
    assert [next(steps).step for _ in range(cut)][-1] == cut
    steps.close()
    resumed(dense_folder, text_file, tmp_path / "run")
    assert digest(tmp_path / "run") == uncut[0]
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, STEPS + 1))
    for found, expected in zip(logged(tmp_path / "run"), uncut[1], strict=True):
        assert {**found, "tokens_per_second": 0} == {**expected, "tokens_per_second": 0}


def test_a_run_cut_again_and_again_ends_there_too(dense_folder: Path, text_file: Path, tmp_path: Path, uncut) -> None:
    for _ in range(20):
        run = prepare(dense_folder, values(text_file), out=tmp_path / "run", resume=True, device="cpu")
        steps = train(run)
        if len([progress for progress in (next(steps, None) for _ in range(3)) if progress]) < 3:
            finish(run)
            break
        steps.close()
    assert digest(tmp_path / "run") == uncut[0]


def test_a_run_killed_while_writing_its_state_ends_there_too(
    dense_folder: Path, text_file: Path, tmp_path: Path, uncut, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, renamed = os.replace, []

    def killed(*paths: Path) -> None:
        renamed.append(paths)
        if len(renamed) == 4:  # the tensors of the second state are in place, its JSON is not
            raise KeyboardInterrupt
        rename(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        for _ in train(prepare(dense_folder, values(text_file), out=tmp_path / "run", device="cpu")):
            pass
    assert len(list((tmp_path / "run").glob("training-*"))) == 2
    resumed(dense_folder, text_file, tmp_path / "run")
    assert digest(tmp_path / "run") == uncut[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(
    dense_folder: Path, text_file: Path, tmp_path: Path, uncut, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", math.inf)
    before = signal.getsignal(number)
    run = prepare(dense_folder, values(text_file), out=tmp_path / "run", device="cpu")
    with pytest.raises(FitStopped, match=r"stopped at step 4, 256 tokens; continue with resume= out= .*run$") as caught:
        for progress in train(run):
            if progress.step == 3:
                os.kill(os.getpid(), number)
    assert not caught.value.planned and signal.getsignal(number) is before
    assert json.loads((tmp_path / "run" / "training.json").read_text())["step"] == 4
    resumed(dense_folder, text_file, tmp_path / "run")
    assert digest(tmp_path / "run") == uncut[0]


def test_a_stretch_ends_as_planned(dense_folder: Path, text_file: Path, tmp_path: Path, uncut) -> None:
    run = prepare(dense_folder, values(text_file), out=tmp_path / "run", device="cpu")
    with pytest.raises(FitStopped) as caught:
        list(train(run, stretch_minutes=0))
    assert caught.value.planned
    resumed(dense_folder, text_file, tmp_path / "run")
    assert digest(tmp_path / "run") == uncut[0]


def test_an_uncoupled_run_resumes(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    given = recipe_values(l0=0.1, data=str(text_file), tokens=TOKENS, settings=SETTINGS, uncoupled=True)
    for name, cuts in (("whole", 0), ("cut", 1)):
        for _ in range(cuts):
            steps = train(prepare(dense_folder, given, out=tmp_path / name, device="cpu"))
            assert [next(steps).step for _ in range(4)] == [1, 2, 3, 4]
            steps.close()
        run = prepare(dense_folder, given, out=tmp_path / name, resume=bool(cuts), device="cpu")
        list(train(run))
        finish(run)
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def begun(dense_folder: Path, text_file: Path, out: Path) -> None:
    steps = train(prepare(dense_folder, values(text_file), out=out, device="cpu"))
    for _ in range(3):
        next(steps)
    steps.close()


def test_not_a_number_stops_with_the_last_good_state(
    dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run = prepare(dense_folder, values(text_file), out=out, device="cpu")
    draw, drawn = training.draw_splice, []

    def poison(*arguments: Any) -> Any:
        drawn.append(arguments)
        if len(drawn) == 6:
            with torch.no_grad():
                run.coupling.sparse._block(0).up.bias[0] = torch.nan
        return draw(*arguments)

    monkeypatch.setattr(training, "draw_splice", poison)
    with pytest.raises(
        FitError, match=r"stopped at step 5: .*is not finite; the last good state is in .*resume=.* try a lower rate"
    ):
        list(train(run))
    tensors, facts = read_folder(out, "training")
    assert facts["step"] == 5 and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_divergence_stops(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"cross-entropy is .* nats, worse than guessing \(3\.69\)"):
        fitted(dense_folder, text_file, tmp_path / "run", settings={"optimizer.rate": 30.0}, tokens=10 * TOKENS)


def test_a_run_goes_on_by_its_own_recipe(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begun(dense_folder, text_file, out)
    for settings, named in (({"seed": 5}, "seed"), ({"sparse.keep": 0.25}, "sparse"), ({"sparsity.l0": 0.2}, "sparsity")):
        with pytest.raises(RecipeError, match=rf"resume= continues with the recipe in .* differs in {named}; leave these"):
            prepare(dense_folder, values(text_file, TOKENS, **settings), out=out, resume=True, device="cpu")
    run = prepare(dense_folder, values(text_file, tokens=3 * TOKENS // 2), out=out, resume=True, device="cpu")
    assert [progress.step for progress in train(run)] == list(range(3, 16))


def test_nothing_has_to_be_said_again(dense_folder: Path, text_file: Path, tmp_path: Path, uncut) -> None:
    begun(dense_folder, text_file, tmp_path / "run")
    bridge.fit(dense_folder, out=tmp_path / "run", resume=True, device="cpu")
    assert digest(tmp_path / "run") == uncut[0]


def test_a_run_does_not_go_on_with_another_dense_model(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    begun(dense_folder, text_file, tmp_path / "run")
    run = prepare(
        tiny_gpt2(seed=1), values(text_file), tokenizer=tiny_tokenizer(), out=tmp_path / "run", resume=True, device="cpu"
    )
    with pytest.raises(CheckpointError, match="has another dense model than 'GPT2LMHeadModel': its weights differ; give"):
        list(train(run))


def test_a_finished_run_is_refused(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    fitted(dense_folder, text_file, tmp_path / "run", tokens=1)
    with pytest.raises(CheckpointError, match="is finished; name a new out="):
        prepare(dense_folder, values(text_file), out=tmp_path / "run", resume=True, device="cpu")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        prepare(dense_folder, values(text_file), out=tmp_path / "run", device="cpu")


def test_a_damaged_state_is_refused(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    begun(dense_folder, text_file, out)
    file = next(out.glob("training-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        list(train(prepare(dense_folder, values(text_file), out=out, resume=True, device="cpu")))
    for text in ("{", "{}"):
        (out / "training.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            prepare(dense_folder, values(text_file), out=out, resume=True, device="cpu")


def test_a_log_is_the_earlier_one_or_the_new_one(
    dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when a resumed run drops the lines that are run again costs no line."""
    out = tmp_path / "run"
    begun(dense_folder, text_file, out)
    before = (out / "log.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    run = prepare(dense_folder, values(text_file), out=out, resume=True, device="cpu")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"could not write '.*log\.jsonl' \(No space left on device\); name another folder"):
        list(train(run))
    assert before and (out / "log.jsonl").read_bytes() == before


def test_resume_starts_a_run_that_never_saved(dense_folder: Path, text_file: Path, tmp_path: Path, uncut) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1}\n{"st')
    resumed(dense_folder, text_file, out)
    assert digest(out) == uncut[0]
    assert [line["step"] for line in logged(out)] == list(range(1, STEPS + 1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="contains no run to resume"):
        prepare(dense_folder, values(text_file), out=tmp_path / "mine", resume=True, device="cpu")


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"device": "tpu"}, {}, "device 'tpu' is not supported"),
        ({"dtype": "float8"}, {}, "dtype 'float8' is not supported"),
        ({"log_with": "tensorboard", "out": None}, {}, "needs a folder"),
        ({"log_with": "a-notebook"}, {}, "log_with= a-notebook: .*"),
        ({}, {"sparsity.l0": 10**9}, "l0 1000000000 is more than the number of weights, [0-9]+"),
        ({}, {"sparsity.min_per_neuron": 30}, "min_per_neuron 30 needs"),
        ({}, {"data.context": 17}, "data.context 17 is longer than the 16 positions"),
        (
            {"device_map": {"": "cpu", "transformer.h.1": "disk"}},
            {},
            "cannot stay on a disk: .* give a device_map= of devices that hold all",
        ),
        ({}, {"dense_dtype": "int8"}, "dense_dtype = 'int8'"),
        ({}, {"data.micro_rows": 3}, "data.rows 4 cannot be divided among 1 processes in pieces of 3 .*; give a multiple of 3"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_anything_is_written(
    dense_folder: Path, text_file: Path, tmp_path: Path, options: dict, settings: dict, message: str
) -> None:
    with pytest.raises((RecipeError, DenseModelError), match=message):
        prepare(dense_folder, values(text_file, TOKENS, **settings), **{"out": tmp_path / "run", "device": "cpu", **options})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"):
        prepare(dense_folder, values(text_file), out=tmp_path / "file" / "run", device="cpu")


@pytest.mark.slow
def test_killed_processes_end_where_one_left_alone_does() -> None:
    """SIGKILL at random moments of the command, writes and imports included; the benchmark does it twenty times."""
    from benchmarks.kill_resume import kill_and_resume

    expected, trials = kill_and_resume(kills=5, seed=1)
    assert [(trial.digest, trial.clean) for trial in trials] == [(expected, True)] * 5


# -- several processes --------------------------------------------------------------------------------------------------

DRIVER = """
import os
import sys
from bridge.training import loop as training
from bridge.cli.main import main
training.REPORT_SECONDS = 0.0
assert os.environ["WORLD_SIZE"] == "2"
sys.argv = ["bridge", *sys.argv[1:]]
main()
"""


def test_two_processes_fit_what_one_does(dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The same global batch, half of it each, and a row at a time: the same losses and weights but for the order of sums.

    In its steps there are shares of which every row enters, and shares of which none does.
    """
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    fitted(dense_folder, text_file, tmp_path / "one")
    command = [  # `accelerate launch --cpu` would start one process, whatever number it is given
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(driver),
        "fit", str(dense_folder), "--l0", "0.1", "--data", str(text_file), "--tokens", str(TOKENS), "--device", "cpu",
        "--out", str(tmp_path / "two"),
    ]  # fmt: skip
    for name, value in {**SETTINGS, "data.micro_rows": 1}.items():
        command += ["--set", f"{name}={value}"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name, value in one.items():
            assert name == "tokens_per_second" or two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (one["step"], name)
    one, two = (bridge.load(tmp_path / name) for name in ("one", "two"))
    assert two.recipe.data.micro_rows == 1
    assert one.recipe == two.recipe.model_copy(update={"data": two.recipe.data.model_copy(update={"micro_rows": None})})
    for (name, weight), (_, other) in zip(one.sparse.named_parameters(), two.sparse.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5, msg=name)
