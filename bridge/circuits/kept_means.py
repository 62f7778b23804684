"""Means of nodes and errors kept beside a coupling: taken once over its reference text, not at every start.

`means.safetensors` in the coupling's folder has them by location, and in its metadata the digest of all that they follow from:
both models, bridges, settings and text. Means of anything else are never taken for these, and are written over. A folder that
cannot be written to, or a coupling that is in none, keeps nothing; a file that cannot be read counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location

FILE = "means.safetensors"


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
    folder = _folder(coupling)
    if folder is None:
        return None
    try:
        with safe_open(folder / FILE, "pt", device=str(coupling.sparse.device)) as file:
            if (file.metadata() or {}).get("of") != digest:
                return None
            names = [(name, *name.rsplit(".", 1)) for name in file.keys()]  # noqa: SIM118
            return {Location(int(layer), kind): file.get_tensor(name) for name, layer, kind in names}
    except (OSError, SafetensorError, ValueError):
        return None


def keep_means(coupling: CoupledModels, digest: str, means: Mapping[Location, Tensor]) -> None:
    """Write the means beside a coupling, if it is in a folder that can be written to."""
    folder = _folder(coupling)
    if folder is None:
        return
    tensors = {f"{at.layer}.{at.kind}": mean.detach().cpu().contiguous() for at, mean in means.items()}
    with contextlib.suppress(OSError, SafetensorError), tempfile.TemporaryDirectory(dir=folder, prefix=".means") as desk:
        save_file(tensors, Path(desk) / FILE, {"of": digest})
        os.chmod(Path(desk) / FILE, (folder / "coupling.json").stat().st_mode)
        os.replace(Path(desk) / FILE, folder / FILE)


def _folder(coupling: CoupledModels) -> Path | None:
    """The local folder that a coupling was loaded from or saved to; None where there is none."""
    folder = None if coupling.path is None else Path(coupling.path)
    return folder if folder is not None and (folder / "coupling.json").is_file() else None
