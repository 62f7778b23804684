"""Train coupled models by a recipe.

Every step does, in this order: draw a batch and a splice, both pure functions of (seed, step); compute the objective and its
gradient, accumulated over the pieces that fit in memory (`data.micro_rows`) and over processes; normalise the gradient to RMS 1
over the sparse model and over the bridges; apply AdamW (rate times 1/sqrt(L0) on the sparse weights); project to the annealed L0.
After the anneal, matrices whose sparse products are faster are trained by their nonzeros (`sparse_native`). At a rate of 0 only
the bridges learn: the sparse model then comes from another coupling and does not change, so circuits found in it stay valid.

A step depends only on the weights, the optimizer, the text and the step number. A run that is killed and resumed from its last
saved state therefore continues bit for bit on a CPU, if the budget is in tokens (a budget in minutes follows the clock) and the
matrices trained by their nonzeros are given (`sparsity.native`) or were saved (`auto` chooses them by measuring speed).

A run's folder holds `training.json` and its tensors during the run, `coupling.json` and its tensors after it, and `log.jsonl`
with one line per report.

Shape legend: b batch row, t token.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from bridge.display.progress import OnProgress, ignore_progress
from bridge.errors import OneLineError, RunError
from bridge.kernels.cpu import reuse_memory
from bridge.kernels.products import is_faster_than_dense
from bridge.models.bridges import CoupledModels
from bridge.models.sparse_weights import Fractions, annealed_l0
from bridge.models.store import CheckpointError, write_text
from bridge.recipe import recipe_values
from bridge.training import shards
from bridge.training import sparse_native as native
from bridge.training.objective import Objective, Splice, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import Run, first_rows, prepare
from bridge.training.refit import refit_decoders
from bridge.training.state import DIVERGED_CE_RATIO, MIN_CAUTION, TrainingState, restore, save

REPORT_SECONDS, SAVE_SECONDS = 5.0, 120.0
REFERENCE_ROWS = 256  # held-out rows saved with the coupling as the reference text for means
MAX_CE_RATIO = 2  # a final model with more than this many times a uniform guess's cross-entropy, on one row of text, is refused


class FitError(RunError):
    """A run that had to stop because training failed, in one line with the remedy."""


class FitStopped(OneLineError, RuntimeError):
    """A run that stopped and saved its state: planned if a stretch ended, otherwise on SIGTERM or Ctrl-C."""

    def __init__(self, what: str, remedy: str, *, planned: bool) -> None:
        super().__init__(what, remedy=remedy)
        self.planned = planned


@dataclass(frozen=True)
class Progress:
    """Progress of a run: step and budget used, losses by name (means since the last report), the achieved L0, and speed."""

    step: int
    steps: int | None
    tokens: int
    fraction: float
    losses: dict[str, float]
    l0: float
    tokens_per_second: float
    seconds_left: float


def fit(
    model: Any,
    l0: float | None = None,
    *,
    tokenizer: Any = None,
    data: str | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    width: int | None = None,
    blocks: str | None = None,
    recipe: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    uncoupled: bool = False,
    out: str | Path | None = None,
    resume: bool = False,
    adapter: str | None = None,
    revision: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    dense_dtype: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    log_with: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CoupledModels:
    """Couple a weight-sparse transformer to a dense causal LM (a hub id, a folder, or a live model and its tokenizer).

    l0 below 1 is the fraction of weights that stay nonzero; l0 of at least 1 is their number. With `blocks`, such as "12:16",
    only these blocks of the dense model are coupled. The dense model's weights have type `dense_dtype` (sparse weights: float32)
    and may be spread over devices by transformers' `device_map`. `recipe` is a TOML file of `recipes/`; `settings` maps the names
    of its numbers ("optimizer.rate") to other values. Raises the errors of `prepare` and `train`.
    """
    values = recipe_values(
        l0=l0, data=data, tokens=tokens, minutes=minutes, width=width, blocks=blocks, recipe=recipe, settings=settings,
        uncoupled=uncoupled, adapter=adapter, revision=revision, seed=seed, dense_dtype=dense_dtype,
    )  # fmt: skip
    run = prepare(
        model, values, tokenizer=tokenizer, out=out, resume=resume, device=device, dtype=dtype, device_map=device_map,
        log_with=log_with,
    )  # fmt: skip
    for progress in train(run):
        if on_progress is not None:
            on_progress(progress)
    return finish(run)


def train(run: Run, *, stretch_minutes: float | None = None) -> Generator[Progress, None, None]:
    """Train a coupling in place until its recipe's budget is used, yielding Progress every few seconds.

    Raises FitError on NaN or divergence, FitStopped after `stretch_minutes`, SIGTERM or Ctrl-C; `out` has the last good state.
    """
    coupling, blocks, accelerator, out = run.coupling, run.blocks, run.accelerator, run.out
    recipe, sparse = coupling.recipe, coupling.sparse
    budget, rows, pieces = recipe.budget, recipe.data.rows, run.pieces
    assert rows is not None and recipe.data.context is not None
    per_step = rows * recipe.data.context
    steps = None if budget.tokens is None else max(1, math.ceil(budget.tokens / per_step))
    reuse_memory()
    torch.set_flush_denormal(True)  # denormal weights and moments, decaying towards zero, would slow every product down
    coupling.bridges.requires_grad_(recipe.losses.coupled)
    frozen = recipe.optimizer.rate == 0
    for site, name in coupling.ends:
        coupling.bridges[site].get_submodule(name).requires_grad_(not frozen)
    if frozen:
        sparse.requires_grad_(False)
        sparse.use_products()
    objective = Objective(coupling.dense, sparse, coupling.bridges, recipe.losses)
    objective.in_shards = shards.shard(objective, accelerator)
    if not objective.in_shards:
        objective = accelerator.prepare(objective)
    optimizer = SharkfinAdamW(coupling)
    state = TrainingState(0, 0.0, Fractions(1.0, 1.0) if run.started is None else run.started.l0)
    if run.resume and out is not None:
        state = restore(out, coupling, optimizer, blocks)
    elif (recipe.losses.coupled or coupling.ends) and run.started is None:  # a start calibrates and uses its constants
        tokens_bt = first_rows(blocks, recipe).to(coupling.dense.device)
        with torch.no_grad():
            coupling.bridges.calibrate(coupling.dense.residuals(tokens_bt, coupling.n_sites - 1))
    began, first_step, spent_before = time.monotonic(), state.step, state.seconds
    last_report = last_save = state.seconds
    target_l0 = sparse.fractions(recipe.sparsity)
    terms = recipe.losses.model_dump(exclude={"ablated_most", "temperature", "splice"})
    if recipe.losses.splice == "literal":
        del terms["hybrid_both"]  # the paper's objective has no such term
    names = ["total", *(name for name, weight in terms.items() if weight)]
    zero = torch.zeros((), device=accelerator.device)
    sums, summed = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device), 0

    def annealed(done: float) -> Fractions:
        anneal, start = recipe.sparsity.anneal, state.start_l0
        return Fractions(
            annealed_l0(target_l0.blocks, done, anneal, start.blocks), annealed_l0(target_l0.embed, done, anneal, start.embed)
        )

    def fraction() -> float:
        by_steps = state.step / steps if steps else 0.0
        by_clock = state.seconds / (60 * budget.minutes) if budget.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))

    with _record_signals() as stop, _log(out, accelerator, state.step) as log:
        while (done := fraction()) < 1:
            if state.native is None and done >= recipe.sparsity.anneal and not frozen:
                state.native = _choose_native(run, target_l0, per_step)
                for name in state.native:
                    optimizer.pack_matrix(name, coupling)
            updates_mask = bool(state.native) and state.step % recipe.sparsity.look_every == 0
            if updates_mask:
                native.collect_gradients(sparse)
            tokens_bt, splice = blocks.batch(state.step, rows, recipe.seed), None
            if recipe.losses.splice == "sampled" and recipe.losses.coupled:
                generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + state.step)
                splice = draw_splice(rows, coupling.n_sites, recipe.losses, generator)
            losses = _accumulate(objective, accelerator, tokens_bt, splice, pieces)
            finite = optimizer.step(done, annealed(done), state.caution)
            if not finite or not bool(torch.isfinite(losses["total"])):
                raise _failed("the loss or its gradient is not finite", f"step {state.step}", out)
            if updates_mask:
                dropped = recipe.sparsity.move * (1 - done) / (1 - recipe.sparsity.anneal)
                native.update_mask(sparse, dropped, optimizer.adam.state, min_per_neuron=recipe.sparsity.min_per_neuron)

            ce = float(losses.get("ce", 0.0))
            state.step += 1
            state.seconds = spent_before + time.monotonic() - began
            stretch_over = stretch_minutes is not None and time.monotonic() - began > 60 * stretch_minutes
            # every process must see the same clock and the same request to stop
            shared = torch.tensor([state.seconds, bool(stop) or stretch_over, ce], dtype=sums.dtype, device=sums.device)
            state.seconds, must_stop, ce = _mean_over_processes(accelerator, shared)
            state.lower_rates(ce, sparse.vocabulary)
            if not frozen:
                target = annealed(fraction())  # the last step ends on the target
                with shards.gathered_weights(sparse):
                    sparse.project(target, biases=recipe.sparsity.biases, min_per_neuron=recipe.sparsity.min_per_neuron)
            sums += torch.stack([losses.get(name, zero) for name in names])  # a process with few rows may lack a term
            summed += 1
            if state.seconds - last_report >= REPORT_SECONDS or fraction() >= 1 or must_stop:
                means = dict(zip(names, _mean_over_processes(accelerator, sums / summed)))
                speed = (state.step - first_step) * per_step / max(1e-9, state.seconds - spent_before)
                left = (1 - fraction()) * state.seconds / max(1e-9, fraction())
                with shards.gathered_weights(sparse):
                    l0 = sparse.achieved_l0()
                progress = Progress(state.step, steps, state.step * per_step, fraction(), means, l0, speed, left)
                log(progress)
                sums, summed, last_report = torch.zeros_like(sums), 0, state.seconds
                yield progress
                if state.caution <= MIN_CAUTION:  # lower rates have been tried
                    _check_divergence(coupling, progress, recipe.optimizer.warmup, out)
            if must_stop or state.seconds - last_save >= SAVE_SECONDS:
                if out is not None:
                    save(out if accelerator.is_main_process else None, coupling, optimizer, blocks, state)
                last_save = state.seconds
            if must_stop and fraction() < 1:
                remedy = f"continue with ‹resume› ‹out› {out}" if out else ""
                raise FitStopped(f"stopped at step {state.step}, {state.step * per_step:,} tokens", remedy, planned=not stop)
        shards.gather_parameters(objective)


def finish(run: Run, progress: OnProgress = ignore_progress) -> CoupledModels:
    """Refit the decoders, freeze the coupling, add its reference text, save it in place of the training state and return it."""
    coupling, out = run.coupling, run.out
    native.unpack(coupling.sparse)
    coupling.sparse.requires_grad_(False).eval()
    coupling.bridges.requires_grad_(False).eval()
    refit = coupling.recipe.refit
    reference_bt = run.blocks.heldout(REFERENCE_ROWS) if coupling.reference_bt is None else coupling.reference_bt
    if coupling.recipe.losses.coupled:  # with dense products: the choice of sparse ones depends on timing, and changes rounding
        tokens_bt = run.blocks.batch(0, refit.rows, coupling.recipe.seed)
        refit_decoders(coupling, tokens_bt, reference_bt, refit.slopes, progress)
    coupling.sparse.use_products()
    coupling = replace(coupling, reference_bt=reference_bt, path=None if out is None else str(out))
    _check_final_model(coupling, out)
    if out is not None and run.accelerator.is_main_process:
        coupling.save_pretrained(out)
        for file in (out / "training.json", *out.glob("training-*.safetensors"), out / ".training.json.writing"):
            file.unlink(missing_ok=True)
        shutil.rmtree(out / ".training.writing", ignore_errors=True)  # left by a killed run
    return coupling


@contextmanager
def _log(out: Path | None, accelerator: Accelerator, step: int) -> Iterator[Callable[[Progress], None]]:
    """Context manager that yields a writer to log.jsonl and to accelerate's trackers, if any were requested."""
    file = None
    if out is not None and accelerator.is_main_process:
        path = out / "log.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            if path.exists():  # steps after the saved state are run again
                lines = path.read_text(encoding="utf-8").splitlines()
                write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
            file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"could not write {str(path)!r} ({error.strerror})", remedy="name another folder") from None
    if accelerator.log_with:
        accelerator.init_trackers("bridge")

    def write(progress: Progress) -> None:
        values = {**progress.losses, "l0": progress.l0, "tokens_per_second": progress.tokens_per_second}
        accelerator.log(values, step=progress.step)
        if file is not None:
            file.write(json.dumps({"step": progress.step, "tokens": progress.tokens, **values}) + "\n")
            file.flush()

    with file or nullcontext():
        try:
            yield write
        finally:  # not `end_training`: it would also destroy the process group, which the model still holds, and hang
            for tracker in accelerator.trackers:
                tracker.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill


@contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Context manager in which a first SIGTERM or SIGINT is recorded; a second signal of the same kind ends the process."""
    seen, earlier = list[int](), dict[int, Any]()

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, earlier[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            earlier[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _accumulate(
    objective: Any, accelerator: Accelerator, tokens_bt: Tensor, splice: Splice | None, pieces: list[slice]
) -> dict[str, Tensor]:
    """Accumulate the gradient of a batch over the pieces of this process; return the terms, as means over its pieces.

    The gradient is exchanged between processes once, with the last piece; if parameters are in shards, with every piece.
    """
    parts, means = accelerator.num_processes * len(pieces), dict[str, Tensor]()
    syncs_each_piece = shards.in_shards(objective)  # memory has no room for gradients of whole matrices
    counts = None if splice is None else [count / parts for count in splice.counts()]
    for piece in pieces:
        piece_splice = None if splice is None else splice.rows(piece.start, piece.stop)
        with nullcontext() if syncs_each_piece or piece is pieces[-1] else accelerator.no_sync(objective):
            with accelerator.autocast():
                losses = objective(tokens_bt[piece].to(accelerator.device), piece_splice, counts)
            accelerator.backward(losses["total"] / len(pieces))
        for name, loss in losses.items():
            means[name] = means.get(name, 0) + loss.detach() / len(pieces)
    return means


def _mean_over_processes(accelerator: Accelerator, values: Tensor) -> list[float]:
    """Return the mean of each value over the processes."""
    means = accelerator.reduce(values, "mean")
    assert isinstance(means, Tensor)
    return means.tolist()


def _choose_native(run: Run, kept: Fractions, tokens: int) -> list[str]:
    """Return the matrices to train by their nonzeros from now on; none with several processes, which average dense gradients."""
    recipe, accelerator, sparse = run.coupling.recipe, run.accelerator, run.coupling.sparse
    if recipe.sparsity.native == "never" or accelerator.num_processes > 1:
        return []
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    trained = {name: weight for name, weight in sparse.packable().items() if weight.requires_grad}
    if recipe.sparsity.native == "always":
        return list(trained)
    return [name for name, weight in trained.items() if is_faster_than_dense(*weight.shape, kept.at(name), tokens, dtype)]


def _check_divergence(coupling: CoupledModels, progress: Progress, warmup: float, out: Path | None) -> None:
    uniform = math.log(coupling.sparse.vocabulary)
    ce = progress.losses.get("ce", 0.0)
    if progress.fraction > max(0.02, warmup) and ce > DIVERGED_CE_RATIO * uniform:
        what = f"the sparse model's cross-entropy is {ce:.2f} nats, worse than guessing ({uniform:.2f})"
        raise _failed(what, f"step {progress.step}", out)


@torch.no_grad()
def _check_final_model(coupling: CoupledModels, out: Path | None) -> None:
    """Raise FitError if the final model's cross-entropy exceeds `MAX_CE_RATIO` times guessing's, or outputs are not finite."""
    assert coupling.reference_bt is not None
    row_1t, uniform = coupling.reference_bt[:1].to(coupling.dense.device), math.log(coupling.sparse.vocabulary)
    trace, truth = coupling.sparse.run(row_1t), coupling.dense.run(row_1t)
    ce = float(F.cross_entropy(trace.logits_btv[0, :-1].float(), row_1t[0, 1:])) if row_1t.shape[1] > 1 else 0.0
    crossed = [coupling.bridges[site].decode(x_bts) for site, x_bts in enumerate(trace.residuals)]
    crossed += [coupling.bridges[site].encode(h_btd) for site, h_btd in enumerate(truth.residuals)]
    if not all(bool(x.isfinite().all()) for x in (trace.logits_btv, *crossed)) or not ce <= MAX_CE_RATIO * uniform:
        what = f"the cross-entropy on held-out text is {ce:.2f} nats (guessing: {uniform:.2f}), or the outputs are not finite"
        raise _failed(what, "the end", out)


def _failed(what: str, at: str, out: Path | None) -> FitError:
    kept = f"; the last good state is in {out} (‹resume›)" if out is not None and (out / "training.json").exists() else ""
    remedy = "try a lower rate (optimizer.rate, optimizer.bridge_rate), or ‹dtype› float32 if it was bfloat16"
    return FitError(f"stopped at {at}:", f"{what}{kept}", remedy)
