"""Save and restore the state of a running fit: `training.json` and its tensors.

The state is weights, moments, masks, the position in the text if the step does not determine it, and a `TrainingState`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.data.blocks import Blocks
from bridge.data.stream import Stream
from bridge.huggingface.identity import Identity
from bridge.kernels.products import Pattern
from bridge.models.bridges import CoupledModels
from bridge.models.sparse_weights import Fractions
from bridge.models.store import CheckpointError, read_folder, write_folder
from bridge.training import sparse_native as native
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.shards import gather_tensor, in_shards, shard_like

MIN_CAUTION = 2**-6  # smallest factor on the rates of a run that begins to diverge
DIVERGED_CE_RATIO = 1.5  # a sparse model has diverged if its cross-entropy is more than this many times a uniform guess's


@dataclass
class TrainingState:
    """Step, clock, rates and sparsity of a run: all that the next step depends on besides weights, moments and text."""

    step: int
    seconds: float
    start_l0: Fractions  # start of the anneal
    native: list[str] | None = None  # matrices trained by their nonzeros; None until chosen
    caution: float = 1.0  # factor on the rates
    best: float = math.inf  # smallest cross-entropy of a step so far
    since: int = 10  # steps since the rates were last halved

    def lower_rates(self, ce: float, vocabulary: int) -> None:
        """Halve the rates, at most once in ten steps, while the model is much worse than guessing and than its best step."""
        self.since += 1
        if ce > DIVERGED_CE_RATIO * max(self.best, math.log(vocabulary)) and self.since > 10 and self.caution > MIN_CAUTION:
            self.caution, self.since = self.caution / 2, 0
        self.best = min(self.best, ce)


def save(
    out: Path | None, coupling: CoupledModels, optimizer: SharkfinAdamW, blocks: Blocks | Stream, state: TrainingState
) -> None:
    """Write the state of a run to its folder; with None, only take part in gathering it from the processes."""
    tensors: dict[str, Tensor] = {f"sparse.{name}": gather_tensor(p) for name, p in coupling.sparse.named_parameters()}
    tensors |= {f"bridges.{name}": gather_tensor(tensor) for name, tensor in coupling.bridges.state_dict().items()}
    tensors |= optimizer.tensors()
    if out is None:
        return
    facts: dict[str, Any] = {"recipe": coupling.recipe.model_dump(), "dense": coupling.dense.identity().to_json()}
    facts |= {**asdict(state), "best": None if math.isinf(state.best) else state.best}
    for name in native.packed_names(coupling.sparse):
        tensors[f"pattern.{name}"] = coupling.sparse.compact[name].pattern.index_p
    write_folder(out, "training", {**tensors, **blocks.tensors()}, facts)


def restore(out: Path, coupling: CoupledModels, optimizer: SharkfinAdamW, blocks: Blocks | Stream) -> TrainingState:
    """Restore what `save` wrote, in place. Raises CheckpointError if it belongs to another dense model or is damaged."""
    tensors, facts = read_folder(out, "training")
    try:
        difference = Identity.read(facts["dense"]).difference(coupling.dense.identity())
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the run in {str(out)!r}", "does not name its dense model", "fit it again") from None
    if difference:
        name = coupling.dense.name
        rule = f"has another dense model than {name!r}: {difference}"
        raise CheckpointError(f"the run in {str(out)!r}", rule, "give the dense model of the run")
    if facts.get("native") and in_shards(coupling.sparse):
        what, rule = f"the run in {str(out)!r}", "already trains only the nonzeros, which cannot be sharded"
        raise CheckpointError(what, rule, "continue without FSDP")
    for name in facts.get("native") or ():
        weight = coupling.sparse.get_parameter(name)
        pattern = Pattern.at(tensors[f"pattern.{name}"], (weight.shape[0], weight.shape[1]))
        optimizer.pack_matrix(name, coupling, pattern)
    for prefix, module in (("sparse.", coupling.sparse), ("bridges.", coupling.bridges)):
        part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        there = module.state_dict()
        try:
            module.load_state_dict({key: shard_like(value, there[key]) if key in there else value for key, value in part.items()})
        except RuntimeError:
            raise CheckpointError(f"the training state in {str(out)!r}", "has another shape than the recipe") from None
    optimizer.restore(tensors)
    blocks.restore(tensors)
    known = {field.name: facts[field.name] for field in fields(TrainingState) if facts.get(field.name) is not None}
    return TrainingState(**{**known, "start_l0": Fractions(**facts["start_l0"])})
