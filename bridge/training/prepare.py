"""Prepare a fit: load the dense model and the text, fill in what the recipe leaves open, and initialise the coupling.

All errors that can be found early are raised here, before anything is written: a recipe that does not suit the model, a folder
with other contents, a machine that is too small. `memory_needed` and `seconds_a_step` predict the cost of the fit.

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
from bridge.models.store import CheckpointError, check_new_folder, check_writable_folder, read_json
from bridge.recipe import BlockShape, Recipe, RecipeError, resolve
from bridge.training.initialize import (
    Initialization,
    gentle_rate,
    shape_from_coupling,
    shape_from_dense,
    start_from_coupling,
    start_from_dense,
)
from bridge.training.objective import Objective, draw_splice

PROCESS_BYTES = 500_000_000  # of a process that has loaded torch, transformers and the kernels
START_ROWS = 64  # maximum number of rows of the first batch used for initialisation
MEMORY_SHARE = 0.7  # fraction of the memory that a fit may use if it chooses its number of rows


@dataclass(frozen=True)
class Run:
    """A fit that is ready to start or to resume: the argument of `train` and `finish`, made by `prepare`.

    started describes what a new coupling takes from its dense model or another coupling; None if it is random or resumed.
    """

    coupling: CoupledModels
    blocks: Blocks | Stream
    accelerator: Accelerator
    out: Path | None
    resume: bool
    started: Initialization | None = None

    @property
    def pieces(self) -> list[slice]:
        """Slices of the batch rows of this process: pieces of equal length that are computed one after another."""
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
    """Load the dense model and the text, and build the coupling from a recipe's (nested) values.

    With `resume`, the run in `out` continues by the recipe saved there; only its budget may be changed. Raises RecipeError,
    DenseModelError, DataError or CheckpointError, each in one line, before anything is written.
    """
    out = None if out is None else Path(out)
    if out is not None and resume:
        check_resumable(out)
    elif out is not None:
        check_new_folder(out)
    resume = resume and out is not None and (out / "training.json").exists()  # a run killed before its first save starts again
    if out is not None and resume:
        saved = read_json(out / "training.json").get("recipe")
        if not isinstance(saved, dict):
            what = f"checkpoint file {str(out / 'training.json')!r}"
            raise CheckpointError(what, "is damaged: it contains no recipe", "fit it again")
        changed = {key for key, value in values.items() if key != "dense" and not _agrees(value, saved.get(key))} - {"budget"}
        if changed:
            rule = f"continues with the recipe in {str(out)!r}, which differs in {', '.join(sorted(changed))}"
            raise RecipeError("‹resume›", rule, "leave these settings as they were, or name a new ‹out›")
        saved.get("sparse", {}).setdefault("block", {})  # runs started before this field existed have none
        values = saved | {key: values[key] for key in ("budget",) if key in values}
    live = not isinstance(model, (str, Path))
    recipe = resolve({**values, "dense": type(model).__name__ if live else str(model)})
    if dtype not in ("float32", "bfloat16"):
        raise RecipeError(f"dtype {dtype!r}", "is not supported", "give float32 or bfloat16 (for products; weights stay float32)")
    accelerator = _accelerator(device, dtype, log_with, out)
    if device_map is not None and (live or accelerator.num_processes > 1):
        why = "a live model stays on its devices" if live else "each of several processes has its own device"
        raise RecipeError(f"‹device_map› {device_map}", f"does not apply: {why}", "leave it out")
    dense = load_dense(
        model, tokenizer=tokenizer, adapter=recipe.adapter, revision=recipe.revision, device=str(accelerator.device),
        dtype=getattr(torch, recipe.dense_dtype), device_map=device_map,
    )  # fmt: skip
    dense = dense_of(dense, recipe.sparse.blocks)
    recipe, unsaid = complete_recipe(dense, recipe), recipe.optimizer.rate is None
    dense = dense_of(dense, recipe.sparse.blocks)  # if none were given, the blocks of the coupling it starts from
    _check_rows(recipe, accelerator.num_processes)
    if accelerator.device.type == "cpu" and (needed := memory_needed(dense, recipe)) > (there := _memory(dense)):
        rule = f"needs about {needed / 1e9:,.0f} GB and the machine has {there / 1e9:,.0f}"
        raise RecipeError("this fit", rule, "lower ‹width› or data.rows")
    coupling = new_coupling(dense, recipe)
    kept, minimum = coupling.sparse.fractions(recipe.sparsity), recipe.sparsity.min_per_neuron
    if minimum:  # raise now the error that the last projection would raise
        copy.deepcopy(coupling.sparse).project(kept, min_per_neuron=minimum)
    started = None
    if recipe.sparse.start not in ("auto", "random") and not resume:
        started = start_from_coupling(coupling, recipe.sparse.start, adapts=recipe.adapts)
        if not recipe.optimizer.rate:
            _check_l0(started.l0, kept)
    blocks = _text(dense, recipe, progress if accelerator.is_main_process else None)
    if recipe.sparse.start == "auto" and recipe.losses.coupled and not resume:
        tokens_bt = first_rows(blocks, recipe).to(dense.device)
        started = start_from_dense(coupling, tokens_bt)
        if unsaid:
            optimizer = recipe.optimizer.model_copy(update={"rate": gentle_rate(coupling, tokens_bt)})
            coupling = replace(coupling, recipe=recipe.model_copy(update={"optimizer": optimizer}))
    if not recipe.optimizer.rate:  # circuits found in the sparse model use its means, hence the same text
        coupling = replace(coupling, reference_bt=reference_text(recipe.sparse.start))
    return Run(coupling, blocks, accelerator, out, resume, started)


def _text(dense: DenseModel, recipe: Recipe, progress: OnProgress | None) -> Blocks | Stream:
    """Load the training text of a recipe."""
    data, seed = recipe.data, recipe.seed
    assert data.context is not None
    if data.stream:
        return open_stream(data.source, dense.prompts, data.context, seed=seed, dense=dense.model, progress=progress)
    most, model = data.most_tokens or recipe.budget.tokens, dense.model
    return load_blocks(data.source, dense.prompts, data.context, max_tokens=most, seed=seed, dense=model, progress=progress)


def first_rows(blocks: Blocks | Stream, recipe: Recipe) -> Tensor:
    """Return tokens_bt for initialisation: the rows of the first batch, at most `START_ROWS`."""
    assert recipe.data.rows is not None
    return blocks.batch(0, recipe.data.rows, recipe.seed)[:START_ROWS]


def check_resumable(out: Path) -> None:
    """Raise CheckpointError if a folder holds a finished run, or something other than a run."""
    if (out / "coupling.json").exists():
        raise CheckpointError(f"the run in {str(out)!r}", "is finished", "name a new ‹out› to fit again")
    if any((out / name).exists() for name in ("training.json", "log.jsonl")):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"‹out› {str(out)!r}", "contains no run to resume", "name the folder of a run, or a new folder")
    check_writable_folder(out)


def complete_recipe(dense: DenseModel, recipe: Recipe) -> Recipe:
    """Return the recipe with every value filled in that depends on the dense model or on the machine's memory.

    Raises RecipeError if the context is longer than the dense model's, CheckpointError if the starting coupling is unreadable.
    """
    shape, data = recipe.sparse, recipe.data
    limit = dense.context or math.inf
    if data.context is None:
        data = data.model_copy(update={"context": int(min(128, limit))})
    elif data.context > limit:
        raise RecipeError(f"data.context {data.context}", f"is longer than the {limit} positions {dense.name} has", "lower it")
    if shape.block is None and shape.start not in ("auto", "random"):
        shape = shape_from_coupling(shape.start, shape)
    elif shape.block is None:
        shape = shape_from_dense(dense, shape, data.context or 1)
        if not recipe.losses.coupled and shape.block is not None:  # eps must not depend on the dense weights
            shape = shape.model_copy(update={"block": shape.block.model_copy(update={"eps": BlockShape().eps})})
    if shape.blocks is not None:  # a span has no logits of its own to add a table to
        shape = shape.model_copy(update={"bigram": "none"})
    optimizer = recipe.optimizer
    if optimizer.rate is None:
        random = shape.start == "random" or not recipe.losses.coupled
        optimizer = optimizer.model_copy(update={"rate": 3e-3 if random else 1e-3})
    update = {"sparse": shape, "optimizer": optimizer, "dense": dense.name, "revision": dense.revision}
    update["dense_dtype"] = str(dense.dtype).removeprefix("torch.")
    recipe = recipe.model_copy(update=update)
    if data.rows is None:  # the most that fit into memory, so that a fit runs without further options
        sizes = (data.model_copy(update={"rows": rows}) for rows in (32, 16, 8, 4, 2))
        limit = MEMORY_SHARE * _memory(dense)
        fits = (each for each in sizes if memory_needed(dense, recipe.model_copy(update={"data": each})) <= limit)
        data = next(fits, data.model_copy(update={"rows": 2}))
    return recipe.model_copy(update={"data": data})


def _memory(dense: DenseModel) -> int:
    """Total memory of the device (CUDA) or the machine, in bytes."""
    if dense.device.type == "cuda":
        return torch.cuda.get_device_properties(dense.device).total_memory
    return psutil.virtual_memory().total


def memory_needed(dense: DenseModel, recipe: Recipe) -> int:
    """Bytes that a fit needs: the process with its libraries, weights, gradient, two moments, one step's activations, caches."""
    assert recipe.sparse.width is not None and recipe.data.context is not None
    with torch.device("meta"):
        sparse = SparseTransformer(recipe.sparse, dense.sublayers, dense.vocabulary, recipe.data.context)
    trained = sum(p.numel() for p in sparse.parameters()) + 2 * dense.n_sites * dense.width * recipe.sparse.width
    frozen = sum(p.numel() * p.element_size() for p in dense.model.parameters())
    tokens = (recipe.data.micro_rows or recipe.data.rows or 32) * recipe.data.context
    per_token = 4 * (14 * dense.vocabulary + dense.n_sites * (14 * recipe.sparse.width + 12 * dense.width))
    known = 0
    if isinstance(dense, DenseSpan):
        behind = dense.whole.n_sites - dense.first_site - dense.n_sites
        per_token += 4 * behind * 24 * dense.width  # two passes run the dense model's sublayers after the span
        known = min(REMEMBERED, 8 * dense.width * (recipe.data.most_tokens or recipe.budget.tokens or REMEMBERED))
    return PROCESS_BYTES + trained * 16 + frozen + tokens * per_token + known


def seconds_a_step(run: Run) -> float:
    """Measured seconds per step before the anneal ends: the second of two passes without an update, plus a timed update."""
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
    for _ in range(2):  # imitate the update by five passes, then project; the first round compiles
        copy, began = largest.clone(), time.monotonic()
        for _ in range(5):
            copy.mul_(0.9).add_(0.1)
        project_([copy], copy.numel() // 2)
        updating = time.monotonic() - began
    return seconds * len(pieces) + updating * sum(p.numel() for p in trained) / largest.numel()


def _check_rows(recipe: Recipe, processes: int) -> None:
    """Raise RecipeError if the rows of a step cannot be divided into whole pieces of equal length for every process."""
    rows, micro_rows = recipe.data.rows, recipe.data.micro_rows
    assert rows is not None
    if rows % (together := processes * (micro_rows or 1)):
        by = f" in pieces of {micro_rows} (data.micro_rows)" if micro_rows else ""
        rule = f"cannot be divided among {processes} processes{by}"
        raise RecipeError(f"data.rows {rows}", rule, f"give a multiple of {together}")


def _check_l0(there: Fractions, asked: Fractions) -> None:
    """Raise RecipeError if a sparse model that stays fixed has another L0 than the recipe."""
    if not all(math.isclose(a, b, rel_tol=0.01) for a, b in ((there.blocks, asked.blocks), (there.embed, asked.embed))):
        rule = f"keeps the sparse model's L0 ({there.blocks:.4g} in blocks, {there.embed:.4g} in embeddings)"
        rule += f", and the recipe asks for {asked.blocks:.4g} and {asked.embed:.4g}"
        remedy = f"give sparsity.l0 {there.blocks:.4g} and sparsity.embed_l0 {there.embed:.4g}"
        raise RecipeError("optimizer.rate 0", rule, remedy)


def _agrees(given: Any, saved: Any) -> bool:
    """Whether the given settings agree with a saved recipe's; settings that are not given are not compared."""
    if isinstance(given, dict) and isinstance(saved, dict):
        return all(_agrees(value, saved.get(key)) for key, value in given.items())
    return given == saved or (isinstance(saved, list) and list(given) == saved)


def _accelerator(device: str, dtype: str, log_with: str | None, out: Path | None) -> Accelerator:
    if device not in ("auto", "cpu", "cuda"):
        remedy = "give auto, cpu or cuda (`accelerate launch` chooses among several GPUs)"
        raise RecipeError(f"device {device!r}", "is not supported", remedy)
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device 'cuda'", "was requested, but torch finds no GPU", "give ‹device› cpu")
    if log_with and out is None:
        raise RecipeError(f"‹log_with› {log_with}", "needs a folder to log to", "give ‹out›")
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier fit in this process may have chosen another device
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if dtype == "bfloat16" else "no",
            log_with=log_with,
            project_dir=out,
            # a process's rows may not enter at every site, so some bridges get no gradient
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except ValueError as error:
        raise RecipeError(f"‹log_with› {log_with}: {error}") from None
    if log_with and not accelerator.log_with:
        raise RecipeError(f"‹log_with› {log_with}", "needs the package of that name, which is not installed", "install it")
    return accelerator
