"""Adapt a coupling to a fine-tune of its dense model: the base's sparse weights and bridges are trained on against the fine-tune.

The recipe is the base's with these changes: training starts from the base's folder; L0 is at its target from the first step, and
only the masks still change; the learning rates are lower; there is no refit; the default budget is a twentieth of the base's
tokens. If the fine-tune left a block of the dense model unchanged, or everything outside the blocks, the counterpart in the
sparse model is frozen, so changes appear only where the fine-tune made some. The rest is `prepare`, `train` and `finish`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridge.display.progress import OnProgress
from bridge.huggingface.adapters import CONFIG, TOKENIZER, adapter_folder
from bridge.huggingface.prompts import load_tokenizer
from bridge.models.bridges import CoupledModels, local_folder
from bridge.models.dense import DenseModel, DenseModelError, load_dense
from bridge.recipe import RecipeError, recipe_values
from bridge.training.loop import Progress, finish, train
from bridge.training.prepare import Run, prepare

BUDGET_DIVISOR = 20  # the default budget is the base's tokens divided by this
INSTANT_ANNEAL = 1e-6  # fraction of the training over which L0 is annealed: it is at its target already
FALLBACK_RATE = 1e-3  # replaces a rate of 0 in the base's recipe, by which its sparse model was not trained
RATE_FACTOR = 0.2  # times the base's rates: at the full rates, so few tokens leave the coupling worse than it began


def adapt(
    base: CoupledModels | str | Path,
    *,
    adapter: str | Path | None = None,
    model: Any = None,
    tokenizer: Any = None,
    data: str | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    settings: dict[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    on_progress: Callable[[Progress], None] | None = None,
) -> CoupledModels:
    """Return the coupling of a fine-tune: `base`'s dense model with a PEFT adapter's folder merged, or a `model` of its shape.

    The default budget is a twentieth of the base's tokens. Raises the errors of `prepare_adapted` and `train`.
    """
    run = prepare_adapted(
        base, adapter=adapter, model=model, tokenizer=tokenizer, out=out, resume=resume, device=device, dtype=dtype,
        data=data, tokens=tokens, minutes=minutes, settings=settings, seed=seed,
    )  # fmt: skip
    for progress in train(run):
        if on_progress is not None:
            on_progress(progress)
    return finish(run)


def prepare_adapted(
    base: CoupledModels | str | Path,
    *,
    adapter: str | Path | None = None,
    model: Any = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    progress: OnProgress | None = None,
    **flags: Any,
) -> Run:
    """Return the fit that `adapt` trains, ready to start; `flags` are the keyword arguments of `recipe_values`.

    Raises UserError if the fine-tune is not one of the base's dense model.
    """
    base = base if isinstance(base, CoupledModels) else CoupledModels.from_pretrained(base)
    if base.path is None:
        raise RecipeError("a coupling that was not saved", "cannot be adapted", "save it (save_pretrained) and load it")
    if (adapter is None) == (model is None):
        raise RecipeError("the fine-tune", "must be given exactly once", "give either an adapter's folder or a fine-tuned model")
    if not base.recipe.losses.coupled:
        raise RecipeError(f"{base.path!r}", "is uncoupled: its bridges were not trained", "give a coupling with trained bridges")
    adapter, tuned, revision = None if adapter is None else str(adapter), model, None
    if adapter is not None:
        _check_adapter(base, adapter)
        tuned, revision = base.dense.model if base.dense.live else base.dense.name, base.dense.revision
    if tokenizer is None and not isinstance(tuned, (str, Path)):
        tokenizer = base.dense.tokenizer
    _check_tokenizer(base, tuned, adapter, tokenizer)
    begun = resume and out is not None and (Path(out) / "training.json").is_file()
    default_budget = flags.get("tokens") is None and flags.get("minutes") is None
    start = {} if begun else _values_of(base, default_budget=default_budget)
    values = recipe_values(recipe=start, adapter=adapter, revision=revision, **flags)
    run = prepare(tuned, values, tokenizer=tokenizer, out=out, resume=resume, device=device, dtype=dtype, progress=progress)
    for part in _unchanged_parts(base.dense, run.coupling):
        part.requires_grad_(False)
    return run


def _values_of(base: CoupledModels, *, default_budget: bool) -> dict[str, Any]:
    """Return the (nested) recipe values for training that continues from the coupling `base`."""
    values: dict[str, Any] = base.recipe.model_dump(exclude={"dense", "revision", "adapter", "budget"})
    values["adapts"] = True
    values["sparse"]["start"] = base.path
    values["sparsity"]["anneal"] = INSTANT_ANNEAL
    values["refit"]["slopes"] = 0.0  # the base's decoders were refitted already
    for name in ("rate", "bridge_rate", "bridge_bias_rate"):
        values["optimizer"][name] = RATE_FACTOR * (values["optimizer"][name] or FALLBACK_RATE)
    if default_budget:
        values["budget"] = {"tokens": max(1, _tokens_trained(base) // BUDGET_DIVISOR)}
    return values


def _tokens_trained(base: CoupledModels) -> int:
    """Number of tokens a coupling was trained on, from its log, otherwise its recipe. Raises RecipeError if neither has it."""
    log = local_folder(base.path or "") / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    counts = [json.loads(line).get("tokens", 0) for line in lines if line.strip()]
    tokens = max(counts, default=base.recipe.budget.tokens)
    if tokens is None:
        raise RecipeError(f"{base.path!r}", "does not say how many tokens it was trained on", "give ‹tokens› or ‹minutes›")
    return tokens


def _unchanged_parts(base_dense: DenseModel, coupling: CoupledModels) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the parts of the sparse model to freeze: the fine-tune did not change their counterparts in the dense model."""
    tuned_dense, sparse = coupling.dense, coupling.sparse
    blocks = [(one.module, other.module) for one, other in zip(base_dense.blocks, tuned_dense.blocks, strict=True)]
    for index, (one, other) in enumerate(blocks):
        if _same_weights(one.parameters(), other.parameters()):
            yield sparse.blocks[index]
    inside = {id(weight) for pair in blocks for block in pair for weight in block.parameters()}
    outside = [[weight for weight in one.model.parameters() if id(weight) not in inside] for one in (base_dense, tuned_dense)]
    if _same_weights(*outside):  # embedding and unembedding, tied or not
        yield from (sparse.embedding, sparse.unembedding, sparse.bigram)
        yield from () if sparse.positions is None else (sparse.positions,)


def _same_weights(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def _check_adapter(base: CoupledModels, adapter: str) -> None:
    """Raise DenseModelError if the adapter's configuration names another model than the base's dense model."""
    config = json.loads((adapter_folder(adapter) / CONFIG).read_text(encoding="utf-8"))
    trained_on, name = config.get("base_model_name_or_path"), base.dense.name
    if not trained_on or base.dense.live or trained_on == name:
        return
    if Path(trained_on).exists() and Path(name).exists() and Path(trained_on).samefile(name):
        return
    what = f"adapter {adapter!r}"
    rule = f"was trained on {trained_on!r}, which is not the dense model {name!r} of {base.path!r}"
    if Path(trained_on).is_dir():
        if difference := load_dense(trained_on, dtype=base.dense.dtype).identity().difference(base.dense.identity()):
            raise DenseModelError(what, f"{rule}: {difference}", "give an adapter of that dense model")
    elif Path(trained_on).name != Path(name).name:
        remedy = f"give an adapter of that dense model, or correct the adapter's {CONFIG} if the two models are the same"
        raise DenseModelError(what, rule, remedy)


def _check_tokenizer(base: CoupledModels, tuned: Any, adapter: str | None, given: Any) -> None:
    """Raise RecipeError if the fine-tune's tokenizer would split text into other tokens than the base's."""
    own, source = base.dense.tokenizer, ""
    if own is None:
        return
    if given is None:
        folder = None if adapter is None else adapter_folder(adapter)
        source = str(tuned if folder is None or not (folder / TOKENIZER).is_file() else folder)
        given, _ = load_tokenizer(source)
    if given is None and adapter is not None:
        return
    if given is None:
        raise RecipeError(f"{source!r}", "has no tokenizer", f"save the tokenizer of {base.dense.name!r} in its folder")
    theirs = given.get_vocab()
    for token, number in own.get_vocab().items():
        if theirs.get(token) != number:
            what = f"the tokenizer of {source!r}" if source else "the given tokenizer"
            there = f"#{theirs[token]}" if token in theirs else "missing"
            rule = f"differs from that of {base.dense.name!r} ({token!r} is {there}, not #{number})"
            raise RecipeError(what, rule, "fit a new coupling to the fine-tune")
