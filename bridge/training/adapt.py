"""A coupling that goes on to a fine-tune of its dense model: the base's weights and bridges, trained against that one.

The recipe is the base's, but for its start (the base's folder), its L0, which is at its target from the first step on while the
masks go on moving, its rates, no refit, and its budget: by default a twentieth of the base's tokens. What the fine-tune left
alone in the dense model (a block, or all that is outside of them) stays in the sparse one too, so that a change is looked for
where there is one. Everything else is `prepare`, `train` and `finish`, as for any fit.
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
from bridge.models.bridges import CoupledModels, folder_of
from bridge.models.dense import DenseModel, DenseModelError, load_dense
from bridge.recipe import RecipeError, recipe_values
from bridge.training.loop import Progress, finish, train
from bridge.training.prepare import Run, prepare

SHARE = 20  # of the base's tokens one in so many is the default budget
AT_ONCE = 1e-6  # share of the training over which L0 falls to where it is already
RATE = 1e-3  # where the base's own is 0: of its sparse model nothing was trained by its recipe
GENTLER = 0.2  # times the base's rates: at these themselves so few tokens end further off than they begin


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
    """The coupling of a fine-tune: of `base`'s dense model with a PEFT adapter's folder merged, or of a `model` of its shape.

    Without tokens or minutes the budget is a twentieth of the base's tokens. Raises what `prepare_adapted` and `train` raise.
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
    """The fit that `adapt` trains, ready to start; flags are those of `recipe_values`.

    Raises UserError where the fine-tune is not one of the base's dense model.
    """
    base = base if isinstance(base, CoupledModels) else CoupledModels.from_pretrained(base)
    if base.path is None:
        raise RecipeError("a coupling that was not saved", "cannot be gone on from", "save it (save_pretrained) and load it")
    if (adapter is None) == (model is None):
        raise RecipeError("which fine-tune", "is not said", "give an adapter's folder, or a fine-tuned model, one of the two")
    if not base.recipe.losses.coupled:
        raise RecipeError(f"{base.path!r}", "is uncoupled: its bridges were not trained", "give one that is coupled")
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
    for part in _parts_left_alone(base.dense, run.coupling):
        part.requires_grad_(False)
    return run


def _values_of(base: CoupledModels, *, default_budget: bool) -> dict[str, Any]:
    """The recipe's values by which a coupling is gone on from."""
    values: dict[str, Any] = base.recipe.model_dump(exclude={"dense", "revision", "adapter", "budget"})
    values["adapts"] = True
    values["sparse"]["start"] = base.path
    values["sparsity"]["anneal"] = AT_ONCE
    values["refit"]["slopes"] = 0.0  # the base's decoders were refitted, and go on from there
    for name in ("rate", "bridge_rate", "bridge_bias_rate"):
        values["optimizer"][name] = GENTLER * (values["optimizer"][name] or RATE)
    if default_budget:
        values["budget"] = {"tokens": max(1, _tokens_trained(base) // SHARE)}
    return values


def _tokens_trained(base: CoupledModels) -> int:
    """Tokens that a coupling was trained on, by its log, else by its recipe. Raises RecipeError where neither says."""
    log = folder_of(base.path or "") / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    counts = [json.loads(line).get("tokens", 0) for line in lines if line.strip()]
    tokens = max(counts, default=base.recipe.budget.tokens)
    if tokens is None:
        raise RecipeError(f"{base.path!r}", "does not say on how many tokens it was trained", "give ‹tokens› or ‹minutes›")
    return tokens


def _parts_left_alone(was: DenseModel, coupling: CoupledModels) -> Iterator[nn.Module | nn.Parameter]:
    """Parts of the sparse model whose counterparts in the dense one the fine-tune did not change: they stay as they are."""
    now, sparse = coupling.dense, coupling.sparse
    blocks = [(one.module, other.module) for one, other in zip(was.blocks, now.blocks, strict=True)]
    for index, (one, other) in enumerate(blocks):
        if _same_weights(one.parameters(), other.parameters()):
            yield sparse.blocks[index]
    inside = {id(weight) for pair in blocks for block in pair for weight in block.parameters()}
    outside = [[weight for weight in one.model.parameters() if id(weight) not in inside] for one in (was, now)]
    if _same_weights(*outside):  # embedding and unembedding, tied or not
        yield from (sparse.embedding, sparse.unembedding, sparse.bigram)
        yield from () if sparse.positions is None else (sparse.positions,)


def _same_weights(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def _check_adapter(base: CoupledModels, adapter: str) -> None:
    """Raise DenseModelError for an adapter that says it was trained on another model."""
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
            raise DenseModelError(what, f"{rule}: {difference}", "give an adapter of that one")
    elif Path(trained_on).name != Path(name).name:
        raise DenseModelError(what, rule, f"give an adapter of that one (or, where they are the same, correct its {CONFIG})")


def _check_tokenizer(base: CoupledModels, tuned: Any, adapter: str | None, given: Any) -> None:
    """Raise RecipeError where the fine-tune would read text as other tokens than the base."""
    own, source = base.dense.tokenizer, "the tokenizer given"
    if own is None:
        return
    if given is None:
        folder = None if adapter is None else adapter_folder(adapter)
        source = str(tuned if folder is None or not (folder / TOKENIZER).is_file() else folder)
        given, _ = load_tokenizer(source)
    if given is None and adapter is not None:
        return
    if given is None:
        raise RecipeError(f"{source!r}", "has no tokenizer", f"save that of {base.dense.name!r} beside it")
    theirs = given.get_vocab()
    for token, number in own.get_vocab().items():
        if theirs.get(token) != number:
            there = f"#{theirs[token]}" if token in theirs else "none"
            rule = f"has another tokenizer than {base.dense.name!r} ({token!r} is #{number} in one and {there} in the other)"
            raise RecipeError(f"{source!r}", rule, "fit a coupling of its own")
