"""The nulls of prompts kept with a coupling: of how many explanations each null earns "representational" or better.

nulls.json in the coupling's folder has them under the key `prompts`, beside those of tasks, with what they depend on: the
coupling, and the bounds of search and evidence. Others' are never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bridge.bridges import Coupling, folder_of
from bridge.checkpoint import CheckpointError, read_json, write_json
from bridge.circuits.loss import SearchConfig

FILE, KEY = "nulls.json", "prompts"
STRONG = ("representational", "mechanistic support")


@dataclass(frozen=True)
class PromptNull:
    """A null on some prompts: how many explanations there are of each verdict, and the median of what judges them."""

    name: str
    prompts: int
    verdicts: Mapping[str, int]
    ratio: float | None

    @property
    def strong(self) -> int:
        """How many earn "representational" or better."""
        return sum(self.verdicts.get(verdict, 0) for verdict in STRONG)

    @staticmethod
    def of(name: str, verdicts: list[str], ratios: list[float | None]) -> PromptNull:
        """The null of the verdicts of some prompts."""
        known = sorted(ratio for ratio in ratios if ratio is not None)
        return PromptNull(name, len(verdicts), dict(Counter(verdicts)), known[len(known) // 2] if known else None)


_READER = TypeAdapter(tuple[PromptNull, ...])


def keep_prompt_nulls(coupling: Coupling, nulls: tuple[PromptNull, ...], rules: str) -> None:
    """Write the nulls beside what else nulls.json has. Raises CheckpointError where the coupling is in no folder."""
    file = _file(coupling)
    if file is None:
        raise CheckpointError("the coupling is in no folder; save it first, nulls are kept with it")
    there: dict[str, Any] = read_json(file) if file.is_file() else {}
    mine = {"coupling": _coupling(coupling), "rules": rules, "nulls": [asdict(null) for null in nulls]}
    write_json(file, {**there, KEY: mine})


def stored_prompt_nulls(coupling: Coupling, rules: str) -> tuple[tuple[PromptNull, ...] | None, str]:
    """The nulls kept with a coupling; or None, and why there are none in a few words."""
    how = "`bridge nulls --prompts` runs them"
    try:
        file = _file(coupling)
        kept = (read_json(file) if file is not None and file.is_file() else {}).get(KEY)
        if file is None or not isinstance(kept, dict):
            return None, f"the coupling's nulls on prompts were not run; {how}"
        if kept.get("coupling") != _coupling(coupling):
            return None, f"the nulls kept are of another coupling; {how}"
        if kept.get("rules") != rules:
            return None, f"the nulls kept were judged by other bounds; {how}"
        return _READER.validate_python(kept.get("nulls")), ""
    except (CheckpointError, ValidationError):
        return None, f"{FILE} cannot be read; remove it, and {how}"


def rules_of(*configs: SearchConfig | Any) -> str:
    """What tells some bounds, of search and evidence, from others."""
    text = json.dumps([asdict(config) for config in configs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(coupling: Coupling) -> Path | None:
    return None if coupling.path is None else folder_of(coupling.path) / FILE


def _coupling(coupling: Coupling) -> str:
    assert coupling.path is not None
    facts = read_json(folder_of(coupling.path) / "coupling.json")
    return f"{facts['tensors']['sha256'][:16]} {coupling.dense.fingerprint()[:16]}"
