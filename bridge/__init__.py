"""bridge: circuits of a weight-sparse transformer as explanations of a dense one."""

# ruff: noqa: F401  (the names are public: _NAMES lists them)

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.api import Coupling, adapt, fit, load
    from bridge.cards.card import Card
    from bridge.circuits.loss import SearchConfig
    from bridge.errors import UserError
    from bridge.evidence.measures import Report
    from bridge.explanations.build import explain
    from bridge.explanations.explanation import Explanation
    from bridge.explanations.export import Exported, export, node_pages, to_networkx
    from bridge.finetunes.diff import diff
    from bridge.finetunes.result import Diff
    from bridge.models.dense import DenseModel, load_dense
    from bridge.nodes.description import NodePage, describe_node
    from bridge.nodes.statistics import NodeFacts, collect_nodes
    from bridge.recipe import Recipe
    from bridge.steering.curves import Steering, steer
    from bridge.steering.interventions import Intervention
    from bridge.studies.frontier import Frontier
    from bridge.studies.result import TaskResult
    from bridge.studies.search import Subjects, search_task
    from bridge.studies.sweep import sweep
    from bridge.training.evaluate import Evaluation, evaluate
    from bridge.training.loop import Progress

__version__ = "0.1.0"

# The public API: the names of each module, resolved on first use, so that importing a light module of the package stays light.
_NAMES = {
    "api": ("Coupling", "adapt", "fit", "load"),
    "cards.card": ("Card",),
    "circuits.loss": ("SearchConfig",),
    "errors": ("UserError",),
    "evidence.measures": ("Report",),
    "explanations.build": ("explain",),
    "explanations.explanation": ("Explanation",),
    "explanations.export": ("Exported", "export", "node_pages", "to_networkx"),
    "finetunes.diff": ("diff",),
    "finetunes.result": ("Diff",),
    "models.dense": ("DenseModel", "load_dense"),
    "nodes.description": ("NodePage", "describe_node"),
    "nodes.statistics": ("NodeFacts", "collect_nodes"),
    "recipe": ("Recipe",),
    "steering.curves": ("Steering", "steer"),
    "steering.interventions": ("Intervention",),
    "studies.frontier": ("Frontier",),
    "studies.result": ("TaskResult",),
    "studies.search": ("Subjects", "search_task"),
    "studies.sweep": ("sweep",),
    "training.evaluate": ("Evaluation", "evaluate"),
    "training.loop": ("Progress",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bridge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bridge' has no attribute {name!r}; it has {', '.join(__all__)}")


class _Package(ModuleType):
    """A package whose functions are not replaced when modules of the same names (explain, export, ...) are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
