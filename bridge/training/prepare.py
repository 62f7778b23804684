"""Preparation of a fit: the dense model and the text loaded, what the recipe leaves open filled in, the coupling started.

Whatever can be refused is refused here, before anything is written: a recipe that does not suit the model, a folder that holds
something else, a machine that is too small. `memory_needed` and `seconds_a_step` predict what the fit will take.

Shape legend: b batch row, t token.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor

from bridge.data.blocks import Blocks, load_blocks
from bridge.data.stream import Stream, open_stream
from bridge.display.progress import OnProgress
from bridge.kernels.top_k import project_
from bridge.models.bridges import CoupledModels, new_coupling, reference_text
from bridge.models.dense import DenseModel, load_dense
from bridge.models.span import REMEMBERED, DenseSpan, dense_of
from bridge.models.sparse import SparseTransformer
from bridge.models.sparse_weights import Fractions
from bridge.models.store import CheckpointError, check_folder, check_new, read_json
from bridge.recipe import BlockShape, Recipe, RecipeError, resolve
from bridge.training.initialize import Started, gentle_rate, shape_for, shape_of_coupling, start_from_coupling, start_from_dense
from bridge.training.objective import Objective, draw_splice

PROCESS_BYTES = 500_000_000  # of one that has loaded torch, transformers and the kernels
START_ROWS = 64  # of the first batch, that a start looks at
ROOM = 0.7  # share of the memory that a fit takes where it may choose its rows


@dataclass(frozen=True)
class Run:
    """A fit that is ready to start or to resume: the argument of `train` and `finish`, made by `prepare`.

    started describes what a new coupling takes from its dense model or another coupling; None if it is random, or resumed.
    """

    coupling: CoupledModels
    blocks: Blocks | Stream
    accelerator: Accelerator
    out: Path | None
    resume: bool
    started: Started | None = None

    @property
    def pieces(self) -> list[slice]:
        """The rows of a batch that this process takes, in the pieces that it takes at once, all of one length."""
        data, processes, process = self.coupling.recipe.data, self.accelerator.num_processes, self.accelerator.process_index
        assert data.rows is not None
        share = data.rows // processes
        rows = data.micro_rows or share
        return [slice(start, start + rows) for start in range(share * process, share * (process + 1), rows)]


def prepare(
    model: Any,
    values: dict[str, Any],
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    device_map: str | dict[str, Any] | None = None,
    log_with: str | None = None,
    progress: OnProgress | None = None,
) -> Run:
    """Load the dense model and the text, and build the coupling of a recipe's (nested) values.

    With `resume`, what is in `out` goes on by the recipe saved there, of which only the budget may be changed. Raises
    RecipeError, DenseModelError, DataError or CheckpointError, each one line, before anything is written.
    """
    out = None if out is None else Path(out)
    if out is not None and resume:
        check_resumable(out)
    elif out is not None:
        check_new(out)
    resume = resume and out is not None and (out / "training.json").exists()  # a run killed before it first saved starts over
    if out is not None and resume:
        saved = read_json(out / "training.json").get("recipe")
        if not isinstance(saved, dict):
            what = f"checkpoint file {str(out / 'training.json')!r}"
            raise CheckpointError(what, "is damaged: it holds no recipe", "fit it again")
        changed = {key for key, value in values.items() if key != "dense" and not _agrees(value, saved.get(key))} - {"budget"}
        if changed:
            raise RecipeError("‹resume›", f"goes on by the recipe in {str(out)!r}, which differs in {', '.join(sorted(changed))}")
        saved.get("sparse", {}).setdefault("block", {})  # of a run that was begun before there was any
        values = saved | {key: values[key] for key in ("budget",) if key in values}
    live = not isinstance(model, (str, Path))
    recipe = resolve({**values, "dense": type(model).__name__ if live else str(model)})
    if dtype not in ("float32", "bfloat16"):
        raise RecipeError(f"dtype {dtype!r}", "is not offered", "it is float32 or bfloat16 (products only, weights stay float32)")
    accelerator = _accelerator(device, dtype, log_with, out)
    if device_map is not None and (live or accelerator.num_processes > 1):
        why = "a live model is where it is" if live else "each of several processes has a device of its own"
        raise RecipeError(f"‹device_map› {device_map}", f"does not apply: {why}", "leave it out")
    dense = load_dense(
        model, tokenizer=tokenizer, adapter=recipe.adapter, revision=recipe.revision, device=str(accelerator.device),
        dtype=getattr(torch, recipe.dense_dtype), device_map=device_map,
    )  # fmt: skip
    dense = dense_of(dense, recipe.sparse.blocks)
    recipe, unsaid = resolve_for(dense, recipe), recipe.optimizer.rate is None
    dense = dense_of(dense, recipe.sparse.blocks)  # that of the coupling which it starts from, where none was given
    _check_shares(recipe, accelerator.num_processes)
    if accelerator.device.type == "cpu" and (needed := memory_needed(dense, recipe)) > (there := _memory(dense)):
        rule = f"needs about {needed / 1e9:,.0f} GB and the machine has {there / 1e9:,.0f}"
        raise RecipeError("this fit", rule, "lower ‹width› or data.rows")
    coupling = new_coupling(dense, recipe)
    kept, minimum = coupling.sparse.fractions(recipe.sparsity), recipe.sparsity.min_per_neuron
    if minimum:  # what the last projection would refuse is refused now
        copy.deepcopy(coupling.sparse).project(kept, min_per_neuron=minimum)
    started = None
    if recipe.sparse.start not in ("auto", "random") and not resume:
        started = start_from_coupling(coupling, recipe.sparse.start, adapts=recipe.adapts)
        if not recipe.optimizer.rate:
            _check_same(started.l0, kept)
    blocks = _text(dense, recipe, progress if accelerator.is_main_process else None)
    if recipe.sparse.start == "auto" and recipe.losses.coupled and not resume:
        tokens_bt = first_rows(blocks, recipe).to(dense.device)
        started = start_from_dense(coupling, tokens_bt)
        if unsaid:
            optimizer = recipe.optimizer.model_copy(update={"rate": gentle_rate(coupling, tokens_bt)})
            coupling = replace(coupling, recipe=recipe.model_copy(update={"optimizer": optimizer}))
    if not recipe.optimizer.rate:  # circuits found in the sparse model are held to its means, so to the text these are over
        coupling = replace(coupling, reference_bt=reference_text(recipe.sparse.start))
    return Run(coupling, blocks, accelerator, out, resume, started)


def _text(dense: DenseModel, recipe: Recipe, progress: OnProgress | None) -> Blocks | Stream:
    """The training text, as the recipe says."""
    data, seed = recipe.data, recipe.seed
    assert data.context is not None
    if data.stream:
        return open_stream(data.source, dense.prompts, data.context, seed=seed, dense=dense.model, progress=progress)
    most, model = data.most_tokens or recipe.budget.tokens, dense.model
    return load_blocks(data.source, dense.prompts, data.context, max_tokens=most, seed=seed, dense=model, progress=progress)


def first_rows(blocks: Blocks | Stream, recipe: Recipe) -> Tensor:
    """tokens_bt that a fit starts from: those of its first batch, as far as they can be looked at all at once."""
    assert recipe.data.rows is not None
    return blocks.batch(0, recipe.data.rows, recipe.seed)[:START_ROWS]


def check_resumable(out: Path) -> None:
    """Raise CheckpointError where a folder holds a finished run, or something else than a run."""
    if (out / "coupling.json").exists():
        raise CheckpointError(f"the run in {str(out)!r}", "is finished", "name a new ‹out› to fit again")
    if any((out / name).exists() for name in ("training.json", "log.jsonl")):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"‹out› {str(out)!r}", "holds no run to resume", "name the folder of one, or a new one")
    check_folder(out)


def resolve_for(dense: DenseModel, recipe: Recipe) -> Recipe:
    """The recipe with everything that depends on the dense model filled in.

    Raises RecipeError where the context is longer than the dense model's.
    """
    shape, data = recipe.sparse, recipe.data
    limit = dense.context or math.inf
    if data.context is None:
        data = data.model_copy(update={"context": int(min(128, limit))})
    elif data.context > limit:
        raise RecipeError(f"data.context {data.context}", f"is longer than the {limit} positions {dense.name} has", "lower it")
    if shape.block is None and shape.start not in ("auto", "random"):
        shape = shape_of_coupling(shape.start, shape)
    elif shape.block is None:
        shape = shape_for(dense, shape, data.context or 1)
        if not recipe.losses.coupled and shape.block is not None:  # the same whatever the dense weights
            shape = shape.model_copy(update={"block": shape.block.model_copy(update={"eps": BlockShape().eps})})
    if shape.blocks is not None:  # there is nowhere to add one
        shape = shape.model_copy(update={"bigram": "none"})
    optimizer = recipe.optimizer
    if optimizer.rate is None:
        random = shape.start == "random" or not recipe.losses.coupled
        optimizer = optimizer.model_copy(update={"rate": 3e-3 if random else 1e-3})
    update = {"sparse": shape, "optimizer": optimizer, "dense": dense.name, "revision": dense.revision}
    update["dense_dtype"] = str(dense.dtype).removeprefix("torch.")
    recipe = recipe.model_copy(update=update)
    if data.rows is None:  # as many as fit, so that a fit with no further option runs
        sizes = (data.model_copy(update={"rows": rows}) for rows in (32, 16, 8, 4, 2))
        fits = (each for each in sizes if memory_needed(dense, recipe.model_copy(update={"data": each})) <= ROOM * _memory(dense))
        data = next(fits, data.model_copy(update={"rows": 2}))
    return recipe.model_copy(update={"data": data})


def _memory(dense: DenseModel) -> int:
    """Bytes that the machine, or the device, has in all."""
    if dense.device.type == "cuda":
        return torch.cuda.get_device_properties(dense.device).total_memory
    return psutil.virtual_memory().total


def memory_needed(dense: DenseModel, recipe: Recipe) -> int:
    """Bytes that a fit takes, the process and its libraries included: weights, gradient, two moments, one step's activations."""
    assert recipe.sparse.width is not None and recipe.data.context is not None
    with torch.device("meta"):
        sparse = SparseTransformer(recipe.sparse, dense.sublayers, dense.vocabulary, recipe.data.context)
    trained = sum(p.numel() for p in sparse.parameters()) + 2 * dense.n_sites * dense.width * recipe.sparse.width
    frozen = sum(p.numel() * p.element_size() for p in dense.model.parameters())
    tokens = (recipe.data.micro_rows or recipe.data.rows or 32) * recipe.data.context
    per_token = 4 * (14 * dense.vocabulary + dense.n_sites * (14 * recipe.sparse.width + 12 * dense.width))
    known = 0
    if isinstance(dense, DenseSpan):
        behind = dense.whole.n_sites - dense.offset - dense.n_sites
        per_token += 4 * behind * 24 * dense.width  # two passes go through the dense model behind a span
        known = min(REMEMBERED, 8 * dense.width * (recipe.data.most_tokens or recipe.budget.tokens or REMEMBERED))
    return PROCESS_BYTES + trained * 16 + frozen + tokens * per_token + known


def seconds_a_step(run: Run) -> float:
    """Seconds that a step takes on this machine before the anneal ends, measured: the second of two, which update nothing."""
    coupling, recipe, pieces = run.coupling, run.coupling.recipe, run.pieces
    assert recipe.data.rows is not None
    tokens_bt = run.blocks.batch(0, recipe.data.rows, recipe.seed)[pieces[0]].to(coupling.dense.device)
    splice = None
    if recipe.losses.splice == "sampled" and recipe.losses.coupled:
        splice = draw_splice(len(tokens_bt), coupling.n_sites, recipe.losses, torch.Generator().manual_seed(recipe.seed))
    objective = Objective(coupling.dense, coupling.sparse, coupling.bridges, recipe.losses)
    trained = [p for p in objective.parameters() if p.requires_grad]
    for _ in range(2):
        began = time.monotonic()
        with run.accelerator.autocast():
            total = objective(tokens_bt, splice)["total"]
        total.backward()
        float(total.detach())
        seconds = time.monotonic() - began
        objective.zero_grad()
    largest = max(coupling.sparse.sparse_weights().values(), key=Tensor.numel).detach()
    updating = 0.0
    for _ in range(2):  # the update, in five passes, and the projection; the first one compiles
        copy, began = largest.clone(), time.monotonic()
        for _ in range(5):
            copy.mul_(0.9).add_(0.1)
        project_([copy], copy.numel() // 2)
        updating = time.monotonic() - began
    return seconds * len(pieces) + updating * sum(p.numel() for p in trained) / largest.numel()


def _check_shares(recipe: Recipe, processes: int) -> None:
    """Raise RecipeError where the rows of a step are no whole number of pieces for every process."""
    rows, micro_rows = recipe.data.rows, recipe.data.micro_rows
    assert rows is not None
    if rows % (processes * (micro_rows or 1)):
        by = f" in pieces of {micro_rows} (data.micro_rows)" if micro_rows else ""
        raise RecipeError(f"data.rows {rows}", f"cannot be shared by {processes} processes{by}", "make it a multiple")


def _check_same(there: Fractions, asked: Fractions) -> None:
    """Raise RecipeError where a sparse model that stays fixed has another L0 than the recipe."""
    if not all(math.isclose(a, b, rel_tol=0.01) for a, b in ((there.blocks, asked.blocks), (there.embed, asked.embed))):
        rule = f"leaves the sparse model as it is, its blocks at L0 {there.blocks:.4g}, its embeddings at {there.embed:.4g}"
        remedy = f"the recipe says {asked.blocks:.4g} and {asked.embed:.4g}: give those (sparsity.l0, embed_l0)"
        raise RecipeError("optimizer.rate 0", rule, remedy)


def _agrees(given: Any, saved: Any) -> bool:
    """Whether the given settings contradict none of a saved recipe's."""
    if isinstance(given, dict) and isinstance(saved, dict):
        return all(_agrees(value, saved.get(key)) for key, value in given.items())
    return given == saved or (isinstance(saved, list) and list(given) == saved)


def _accelerator(device: str, dtype: str, log_with: str | None, out: Path | None) -> Accelerator:
    if device not in ("auto", "cpu", "cuda"):
        offered = "it is auto, cpu or cuda (accelerate launch chooses among several)"
        raise RecipeError(f"device {device!r}", "is not offered", offered)
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device 'cuda'", "was asked for and torch sees no GPU here", "give ‹device› cpu")
    if log_with and out is None:
        raise RecipeError(f"‹log_with› {log_with}", "needs a folder to log to", "give ‹out›")
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier fit of this process may have chosen otherwise
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if dtype == "bfloat16" else "no",
            log_with=log_with,
            project_dir=out,
            # a process's rows may enter at some sites and not at others
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise RecipeError(f"‹log_with› {log_with}: {error}") from None
    if log_with and not accelerator.log_with:
        raise RecipeError(f"‹log_with› {log_with}", "needs the package of that name, which is not installed here")
    return accelerator
