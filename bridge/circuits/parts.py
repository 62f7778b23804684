"""What a search has found so far, kept in a folder: the nodes of every seed, and the size of the dense model's circuit.

So a search that was killed goes on with the next seed, and one over more seeds takes those that are there. A part is used again
only by the search that it is of: the same prompts, models, rules, aim and work.

Shape legend: f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bridge.checkpoint import CheckpointError, read_folder, read_json, write_folder, write_json
from bridge.circuits.masks import FoundNodes


@dataclass(frozen=True)
class Parts:
    """A search's parts in a folder, or nowhere; `search` holds JSON values that tell it from others."""

    folder: Path | None
    search: Mapping[str, Any]

    def nodes(self, name: str, find: Callable[[], FoundNodes], device: torch.device) -> FoundNodes:
        """The nodes of that name if they are there, else those that `find` finds, which are kept.

        Raises CheckpointError where they cannot be written, and what `find` raises.
        """
        if self.folder is None:
            return find()
        try:
            tensors, facts = read_folder(self.folder, name)
            if facts["search"] == self.search:
                kept_f, tau_f = (tensors[key].to(device) for key in ("kept_f", "tau_f"))
                return FoundNodes(kept_f, tau_f, facts["loss"], facts["n_candidates"], facts["complete"], facts["steps"])
        except (CheckpointError, KeyError):
            pass  # not there, damaged, or of another version: found anew
        found = find()
        numbers = {key: getattr(found, key) for key in ("loss", "n_candidates", "complete", "steps")}
        write_folder(self.folder, name, {"kept_f": found.kept_f, "tau_f": found.tau_f}, {"search": dict(self.search), **numbers})
        return found

    def facts(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The same of plain JSON values."""
        if self.folder is None:
            return find()
        file = self.folder / f"{name}.json"
        try:
            there = read_json(file)
            if there["search"] == self.search:
                return there["found"]
        except (CheckpointError, KeyError):
            pass
        found = find()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"search": dict(self.search), "found": found})
        return found
