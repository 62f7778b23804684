"""The coupling for users: the library's functions that take a coupling first are its methods.

All modules work on `bridges.CoupledModels`, which has none of these methods. `bridge.load`, `fit` and `adapt` return the subclass
`Coupling`, which only adds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ParamSpec

from bridge.cards.card import Card
from bridge.cards.suite import CardRequest, run_cards
from bridge.display.progress import OnProgress, ignore_progress
from bridge.explanations.build import explain
from bridge.finetunes.diff import diff
from bridge.models.bridges import CoupledModels
from bridge.steering.curves import steer
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects, search_task
from bridge.studies.suite import resolved
from bridge.training import adapt as adapting
from bridge.training import loop as training
from bridge.training.evaluate import evaluate

P = ParamSpec("P")


def _with_methods(make: Callable[P, CoupledModels]) -> Callable[P, Coupling]:
    """Wrap a function that returns a coupling, so that it returns one with methods."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Coupling:
        bare = make(*args, **kwargs)
        return Coupling(**{field.name: getattr(bare, field.name) for field in fields(bare) if field.init})

    return made


load = _with_methods(CoupledModels.from_pretrained)
fit = _with_methods(training.fit)
adapt = _with_methods(adapting.adapt)


class Coupling(CoupledModels):
    """A dense model, the sparse model that explains it, and the bridges between them, with the library's functions as methods."""

    from_pretrained = staticmethod(load)
    adapt = adapt
    diff = diff
    evaluate = evaluate
    explain = explain
    steer = steer

    @cached_property
    def subjects(self) -> Subjects:
        """Both models with the means of their nodes, computed once for any number of tasks."""
        return Subjects.of(self)

    def circuit(self, task: str | Path, **options: Any) -> TaskResult:
        """Return the circuit of a built-in task or of a .jsonl or .yaml file of examples; options are those of `search_task`.

        Raises TaskError, UnsolvedError if the sparse model does not solve the task, SearchError if there is nothing to search.
        """
        return search_task(self.subjects, resolved(self.subjects, str(task)), **options)

    def card(
        self,
        task: str | Path,
        circuit: TaskResult | str | Path | None = None,
        *,
        seeds: int = 1,
        seed: int = 0,
        budget: float = 1.0,
        progress: OnProgress | None = None,
    ) -> Card:
        """Return a card of a task's circuit on the dense model: tests with controls, the coupling's nulls, a verdict.

        The circuit is a result of `circuit`, or a folder that one was saved in; without one it is searched, by `seeds` seeds and
        with `budget` times the usual steps. Raises TaskError, SearchError if no circuit is found, CheckpointError, or CardError
        if the circuit is not this task's or not this coupling's.
        """
        found = circuit if circuit is None or isinstance(circuit, TaskResult) else Path(circuit)
        wanted = CardRequest(str(task), found, None)
        on_progress = progress or ignore_progress
        card, _ = next(run_cards(self.subjects, [wanted], seed=seed, seeds=seeds, budget=budget, progress=on_progress))
        assert card is not None  # for a single card, `run_cards` raises any error
        return card
