"""Results of a coupling's nulls on prompts and on tasks, which are kept with the coupling.

nulls.json in the coupling's folder has them under `prompts` and `tasks`, together with what they depend on: the coupling, and the
bounds of search and evidence. Results that depend on anything else are never used.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bridge.circuits.loss import SearchConfig
from bridge.evidence.measures import Criterion, Measure, Point
from bridge.models.bridges import CoupledModels, local_folder
from bridge.models.store import CheckpointError, read_json, write_json

FILE = "nulls.json"
STRONG_VERDICTS = ("representational", "mechanistic support")
Kind = Literal["prompts", "tasks"]
_HOW_TO_RUN: Mapping[Kind, str] = {
    "prompts": "`bridge nulls` runs them if it is given a number of prompts",
    "tasks": "`bridge nulls` runs them",
}


@dataclass(frozen=True)
class PromptVerdict:
    """The verdict on a prompt's explanation.

    by_deletion is the verdict if single nodes' effects are not needed; ratio is the measure dense_ratio of the circuit.
    """

    verdict: str
    by_deletion: str
    ratio: float | None


@dataclass(frozen=True)
class PromptNull:
    """A null on prompts: the number of explanations with each verdict, and the median ratio of dense to sparse loss.

    by_deletion is the number that would be "representational" or better if single nodes' effects were not needed.
    """

    name: str
    prompts: int
    verdicts: Mapping[str, int]
    ratio: float | None
    by_deletion: int

    @property
    def strong(self) -> int:
        """Number of prompts that earn "representational" or better."""
        return sum(self.verdicts.get(verdict, 0) for verdict in STRONG_VERDICTS)

    @staticmethod
    def of(name: str, judged: Sequence[PromptVerdict]) -> PromptNull:
        """Summarise the verdicts on some prompts."""
        known = sorted(each.ratio for each in judged if each.ratio is not None)
        ratio = known[len(known) // 2] if known else None
        by_deletion = sum(each.by_deletion in STRONG_VERDICTS for each in judged)
        return PromptNull(name, len(judged), dict(Counter(each.verdict for each in judged)), ratio, by_deletion)


@dataclass(frozen=True)
class NullTask:
    """A null on a task: which tests hold (None: could not be measured), each test's first value, and whether all tests hold.

    accuracy is that of the null's sparse model; why says why there is no evidence, "" if there is; prompts identifies the task's
    prompts.
    """

    task: str
    holds: Mapping[str, bool | None]
    values: Mapping[str, float | None]
    passed: bool
    accuracy: float | None = None
    why: str = ""
    prompts: str = ""


@dataclass(frozen=True)
class TaskNull:
    """A null on some tasks. It passes if all tests hold on any of the tasks, and it must not pass.

    note says why the null is weak, "" if it is not; that a weak null fails is no evidence.
    """

    name: str
    what: str
    tasks: tuple[NullTask, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the null passes, which means that the method fails."""
        return self.strong > 0

    @property
    def strong(self) -> int:
        """Number of tasks on which all tests hold."""
        return sum(task.passed for task in self.tasks)

    def passing(self, test: str) -> int:
        """Return the number of tasks on which a test holds."""
        return sum(task.holds.get(test) is True for task in self.tasks)


_PROMPTS, _TASKS = TypeAdapter(tuple[PromptNull, ...]), TypeAdapter(tuple[TaskNull, ...])


def nulls_measure(nulls: Sequence[PromptNull | TaskNull], why: str, note: str) -> Measure:
    """Return the share of cases in which a null's circuit is strong; no value if `why` says that nulls are missing."""
    name, criterion = "share of nulls' explanations as strong", Criterion("<=", 0.0)
    if why or not nulls:
        return Measure("nulls", name, None, criterion, note=why or "no null was run")
    of = "prompts" if isinstance(nulls[0], PromptNull) else "tasks"
    counts = [null.prompts if isinstance(null, PromptNull) else len(null.tasks) for null in nulls]
    points = tuple(Point(null.name, {of: count, "strong": null.strong}) for null, count in zip(nulls, counts, strict=True))
    share = sum(null.strong for null in nulls) / max(1, sum(counts))
    return Measure("nulls", name, share, criterion, note=note, points=points)


def keep_nulls(
    coupling: CoupledModels, kind: Kind, nulls: Sequence[PromptNull | TaskNull], rules: str, **facts: str | float | int
) -> None:
    """Write the nulls to nulls.json and keep those of the other kind. Raises CheckpointError if the coupling has no folder."""
    file = _folder(coupling) / FILE
    stored: dict[str, Any] = read_json(file) if file.is_file() else {}
    entry = {"coupling": fingerprint(coupling), "rules": rules, **facts, "nulls": [asdict(null) for null in nulls]}
    write_json(file, {**{other: stored[other] for other in _HOW_TO_RUN if other in stored}, kind: entry})


def stored_prompt_nulls(coupling: CoupledModels, rules: str) -> tuple[tuple[PromptNull, ...] | None, str]:
    """Return (nulls on prompts kept with a coupling, ""), or (None, reason in a few words)."""
    return _read_nulls(coupling, "prompts", rules, _PROMPTS)


def stored_task_nulls(coupling: CoupledModels, rules: str, **facts: str | float | int) -> tuple[tuple[TaskNull, ...] | None, str]:
    """Return (nulls on tasks kept with a coupling, ""), if rules and facts are the same, or (None, reason in a few words)."""
    return _read_nulls(coupling, "tasks", rules, _TASKS, facts)


def _read_nulls(
    coupling: CoupledModels, kind: Kind, rules: str, reader: TypeAdapter, facts: Mapping[str, str | float | int] | None = None
) -> tuple[tuple | None, str]:
    try:
        file = None if coupling.path is None else _folder(coupling) / FILE
        kept = read_json(file).get(kind) if file is not None and file.is_file() else None
        if not isinstance(kept, dict):
            return None, f"the coupling's nulls on {kind} were not run; {_HOW_TO_RUN[kind]}"
        if kept.get("coupling") != fingerprint(coupling):
            return None, f"the stored nulls are of another coupling; {_HOW_TO_RUN[kind]}"
        if kept.get("rules") != rules or any(kept.get(name) != value for name, value in (facts or {}).items()):
            return None, f"the stored nulls were judged by other bounds; {_HOW_TO_RUN[kind]}"
        return reader.validate_python(kept.get("nulls")), ""
    except (CheckpointError, ValidationError):
        return None, f"{FILE} cannot be read, or is of an earlier version; remove it, and {_HOW_TO_RUN[kind]}"


def rules_digest(*configs: SearchConfig | Any) -> str:
    """Return a digest of the bounds of search and evidence."""
    text = json.dumps([config if isinstance(config, int) else asdict(config) for config in configs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(coupling: CoupledModels) -> str:
    """Return digests of a coupling's tensors and of its dense model. Raises CheckpointError if the coupling has no folder."""
    facts = read_json(_folder(coupling) / "coupling.json")
    return f"{facts['tensors']['sha256'][:16]} {coupling.dense.fingerprint()[:16]}"


def _folder(coupling: CoupledModels) -> Path:
    if coupling.path is None:
        raise CheckpointError("the coupling", "is not saved in a folder", "save it first, because its nulls are stored there")
    return local_folder(coupling.path)
