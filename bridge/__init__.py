"""bridge: circuits of a weight-sparse transformer as explanations of a dense one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.bridges import Coupling
    from bridge.dense import DenseModel, load_dense
    from bridge.evaluate import Evaluation, evaluate
    from bridge.explanation import Explanation, explain
    from bridge.masks import Aim
    from bridge.node_page import NodePage, describe_node
    from bridge.nodes import NodeFacts, collect_nodes
    from bridge.recipe import Recipe
    from bridge.task_circuit import Subjects, search_task
    from bridge.task_result import TaskResult
    from bridge.training import Progress, fit
    from bridge.validate import Faithfulness

    load = Coupling.from_pretrained

__version__ = "0.1.0"

# The public API: where each name lives. Resolved on first use, so that importing a light module of the package stays light.
_HOME = {
    "Aim": "masks",
    "Coupling": "bridges",
    "DenseModel": "dense",
    "Evaluation": "evaluate",
    "Explanation": "explanation",
    "Faithfulness": "validate",
    "NodeFacts": "nodes",
    "NodePage": "node_page",
    "Progress": "training",
    "Recipe": "recipe",
    "Subjects": "task_circuit",
    "TaskResult": "task_result",
    "collect_nodes": "nodes",
    "describe_node": "node_page",
    "evaluate": "evaluate",
    "explain": "explanation",
    "fit": "training",
    "load_dense": "dense",
    "search_task": "task_circuit",
}

__all__ = [
    "Aim",
    "Coupling",
    "DenseModel",
    "Evaluation",
    "Explanation",
    "Faithfulness",
    "NodeFacts",
    "NodePage",
    "Progress",
    "Recipe",
    "Subjects",
    "TaskResult",
    "collect_nodes",
    "describe_node",
    "evaluate",
    "explain",
    "fit",
    "load",
    "load_dense",
    "search_task",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("bridge.bridges").Coupling.from_pretrained
    if name in _HOME:
        return getattr(importlib.import_module(f"bridge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bridge' has no attribute {name!r}; it has {', '.join(__all__)}")
