"""bridge: circuits of a weight-sparse transformer as explanations of a dense one."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.circuits.loss import SearchConfig
    from bridge.coupling import Coupling, fit, load
    from bridge.dense import DenseModel, load_dense
    from bridge.evaluate import Evaluation, evaluate
    from bridge.evidence.measures import Report
    from bridge.explain import explain
    from bridge.explanation import Explanation
    from bridge.export import Exported, export, node_pages, to_networkx
    from bridge.frontier import Frontier
    from bridge.interventions import Intervention
    from bridge.node_page import NodePage, describe_node
    from bridge.nodes import NodeFacts, collect_nodes
    from bridge.recipe import Recipe, UserError
    from bridge.steer import Steering, steer
    from bridge.studies.card import Card
    from bridge.studies.result import TaskResult
    from bridge.studies.search import Subjects, search_task
    from bridge.sweep import sweep
    from bridge.training import Progress

__version__ = "0.1.0"

# The public API: where each name lives. Resolved on first use, so that importing a light module of the package stays light.
_HOME = {
    "Card": "studies.card",
    "Coupling": "coupling",
    "DenseModel": "dense",
    "Evaluation": "evaluate",
    "Explanation": "explanation",
    "Exported": "export",
    "Frontier": "frontier",
    "Intervention": "interventions",
    "NodeFacts": "nodes",
    "NodePage": "node_page",
    "Progress": "training",
    "Recipe": "recipe",
    "Report": "evidence.measures",
    "SearchConfig": "circuits.loss",
    "Steering": "steer",
    "Subjects": "studies.search",
    "TaskResult": "studies.result",
    "UserError": "recipe",
    "collect_nodes": "nodes",
    "describe_node": "node_page",
    "evaluate": "evaluate",
    "explain": "explain",
    "export": "export",
    "fit": "coupling",
    "load": "coupling",
    "load_dense": "dense",
    "node_pages": "export",
    "search_task": "studies.search",
    "steer": "steer",
    "sweep": "sweep",
    "to_networkx": "export",
}

__all__ = [
    "Card",
    "Coupling",
    "DenseModel",
    "Evaluation",
    "Explanation",
    "Exported",
    "Frontier",
    "Intervention",
    "NodeFacts",
    "NodePage",
    "Progress",
    "Recipe",
    "Report",
    "SearchConfig",
    "Steering",
    "Subjects",
    "TaskResult",
    "UserError",
    "collect_nodes",
    "describe_node",
    "evaluate",
    "explain",
    "export",
    "fit",
    "load",
    "load_dense",
    "node_pages",
    "search_task",
    "steer",
    "sweep",
    "to_networkx",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bridge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bridge' has no attribute {name!r}; it has {', '.join(__all__)}")


class _Package(ModuleType):
    """A package whose functions stay what they are when modules of their names (explain, export, steer, ...) are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
