"""Means of nodes and errors kept beside a coupling: taken once over its reference text, not at every start.

`means.json` in the coupling's folder names the tensors, by location, and the digest of all that they follow from: both models,
bridges, settings and text. Means of anything else are never taken for these, and are written over. A folder that cannot be
written to, or a coupling that is in none, keeps nothing; files that cannot be read count as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location
from bridge.models.store import CheckpointError, read_folder, write_folder

NAME = "means"


def digest_of(coupling: CoupledModels, tokens_bt: Tensor) -> str:
    """SHA-256 of all that the means over a text follow from."""
    digest = hashlib.sha256(json.dumps([1, coupling.dense.fingerprint(), coupling.recipe.model_dump()], default=str).encode())
    tensors = {**coupling.sparse.state_dict(), **coupling.bridges.state_dict(prefix="bridges."), "text": tokens_bt}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_means(coupling: CoupledModels, digest: str) -> dict[Location, Tensor] | None:
    """The means kept beside a coupling; None where there are none of this digest."""
    if (folder := _folder(coupling)) is None:
        return None
    try:
        tensors, facts = read_folder(folder, NAME)
    except CheckpointError:
        return None
    if facts.get("of") != digest:
        return None
    places = [(name, *name.split(".")) for name in tensors]
    return {Location(int(layer), kind): tensors[name].to(coupling.sparse.device) for name, layer, kind in places}


def keep_means(coupling: CoupledModels, digest: str, means: Mapping[Location, Tensor]) -> None:
    """Write the means beside a coupling, if it is in a folder that can be written to."""
    if (folder := _folder(coupling)) is not None:
        with contextlib.suppress(CheckpointError):
            write_folder(folder, NAME, {f"{at.layer}.{at.kind}": mean for at, mean in means.items()}, {"of": digest})


def _folder(coupling: CoupledModels) -> Path | None:
    """The local folder that a coupling was loaded from or saved to; None where there is none."""
    folder = None if coupling.path is None else Path(coupling.path)
    return folder if folder is not None and (folder / "coupling.json").is_file() else None
