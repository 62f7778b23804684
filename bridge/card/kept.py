"""The nulls kept with a coupling, as `bridge nulls` has left them in its folder.

They are shown only for the coupling that they are of, and while circuits are searched and cards made by the rules of then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from bridge.bridges import Coupling, folder_of
from bridge.card.card import CardError, NullResult
from bridge.checkpoint import CheckpointError, read_json
from bridge.studies.search import RULES

FILE, FORMAT = "nulls.json", 1
CARD_RULES = 3  # to be raised where the same circuit comes to give another card: what is kept is then made again


@dataclass(frozen=True)
class Stored:
    """The nulls of a coupling as far as they were run, and what they depend on."""

    format: int
    fingerprint: Mapping[str, str | int | float | None]
    nulls: tuple[NullResult, ...]


_READER = TypeAdapter(Stored)


def stored_nulls(coupling: Coupling) -> tuple[tuple[NullResult, ...] | None, str]:
    """The nulls kept with a coupling; or None, and why there are none in a few words."""
    if coupling.path is None:
        return None, "the coupling is in no folder, so that no nulls are kept with it"
    try:
        file = folder_of(coupling.path) / FILE
    except CheckpointError:
        return None, f"{coupling.path!r}, in which they would be kept, is not to be had"
    how = f"`bridge nulls {coupling.path}` runs them"
    if not file.is_file():
        return None, f"they were not run; {how}"
    stored = read_stored(file)
    if stored is None:
        return None, f"{FILE} cannot be read; remove it, and {how}"
    if stored.format != FORMAT or stored.fingerprint.get("coupling") != fingerprint(coupling):
        return None, f"those kept are of another coupling; {how}"
    if stored.fingerprint.get("rules") != rules():
        return None, f"those kept were made by other rules; {how}"
    return stored.nulls, ""


def read_stored(file: Path) -> Stored | None:
    """What a file holds; None where it cannot be read."""
    try:
        return _READER.validate_python(read_json(file))
    except (CheckpointError, ValueError):
        return None


def fingerprint(coupling: Coupling) -> str:
    """What tells one coupling from another: the digest of its tensors and of the dense model's weights."""
    if coupling.path is None:
        raise CardError("the coupling is in no folder; save it first, nulls are kept with it")
    facts = read_json(folder_of(coupling.path) / "coupling.json")
    return f"{facts['tensors']['sha256'][:16]} {coupling.dense.fingerprint()[:16]}"


def rules() -> str:
    """What tells how circuits are searched and cards made from other ways of doing so."""
    return f"{RULES} {CARD_RULES}"
