"""Make cards for many circuits, and run the nulls of a coupling: circuits are loaded or searched, stored cards are reused.

A card is stored as card.json beside its circuit, or alone, with a digest of circuit, coupling, prompts and rules, and with its
seed. A stored card for which these agree is not made again, but it shows the coupling's current nulls.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bridge.cards.card import Card, render_card, render_cards, render_nulls
from bridge.cards.evidence import NULLS, CardConfig, card_rules_digest, gather_task, held_out_pairs, with_nulls
from bridge.cards.nulls import Nulls, solved_tasks
from bridge.cards.task_circuit import CardError, TaskCircuit
from bridge.circuits.task_search import SearchError
from bridge.data.task_pairs import TaskError, task_names
from bridge.data.task_tokens import Resolved
from bridge.display.progress import OnProgress, Phase, with_prefix
from bridge.models.bridges import CoupledModels
from bridge.models.store import CheckpointError, read_json, write_json
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects, search_task
from bridge.studies.suite import folder_name, resolved
from bridge.verdicts.null_table import fingerprint, stored_task_nulls


@dataclass(frozen=True)
class CardRequest:
    """A card to be made: the task's name or file, its circuit or the circuit's folder (None: search it), the card's folder."""

    task: str
    circuit: Path | TaskResult | None
    out: Path | None


def requested_cards(*, task: str | None, circuit: Path | None, names: Sequence[str], out: Path | None) -> tuple[CardRequest, ...]:
    """The requested cards: for the circuits in a folder, or for one or several tasks, searched unless `out` has their circuits.

    Raises CardError if the folder holds no circuit, or several although `task` is given.
    """
    if circuit is not None:
        found = tuple(_find_circuits(circuit))
        if not found:
            raise CardError(f"{str(circuit)!r}", "holds no circuit", "name a folder that `bridge circuit` wrote")
        one = found[0][0] == circuit
        if task is not None and not one:
            raise CardError(
                f"{str(circuit)!r}", "holds several circuits, each of its own task", "leave out ‹task›, or name one circuit"
            )
        return tuple(
            CardRequest(task or name, folder, out if out is None or one else out / folder.name) for folder, name in found
        )
    wanted = []
    for name in [task] if task else names:
        place = out / folder_name(name) if out is not None and task is None else out
        there = place is not None and (place / "circuit.json").is_file()
        wanted.append(CardRequest(name, place if there else None, place))
    return tuple(wanted)


def _find_circuits(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders with circuits (this one, or those directly in it), and the names of their tasks."""
    candidates = [folder] if (folder / "circuit.json").is_file() else sorted(folder.glob("*/")) if folder.is_dir() else []
    for one in candidates:
        if (one / "circuit.json").is_file():
            facts = read_json(one / "circuit.json")
            yield one, str((facts.get("facts") or facts).get("task", one.name))


def task_card(
    coupling: CoupledModels, task: Resolved, result: TaskResult, digest: str, *, seed: int, progress: OnProgress
) -> Card:
    """Make the card of a task's circuit, which `digest` identifies, with the coupling's current nulls.

    Raises CardError if the circuit is not of this coupling, or if the task has no held-out pairs under its tokenizer.
    """
    started, circuit = time.monotonic(), TaskCircuit.of(result, coupling)
    report = gather_task(coupling, circuit, task, seed=seed, progress=progress)
    pairs, asked = len(held_out_pairs(task)), CardConfig.pairs
    return Card(
        task=task.task,
        pairs=pairs,
        report=report,
        nulls=stored_task_nulls(coupling, card_rules_digest())[0],
        notes=(f"There are only {pairs} held-out pairs instead of {asked}.",) if pairs < asked else (),
        provenance={**coupling.provenance, "seed": seed, "nodes": circuit.nodes, "circuit": digest},
        seconds=time.monotonic() - started,
    )


def run_cards(
    subjects: Subjects,
    wanted: Sequence[CardRequest],
    *,
    seed: int = 0,
    seeds: int = 1,
    budget: float = 1.0,
    width: int = 110,
    progress: OnProgress,
) -> Generator[tuple[Card | None, str], None, None]:
    """Yield each card with its text, and a table at the end if there are several. A card that cannot be made is a line of text.

    If a single card is wanted, its error is raised instead: TaskError, SearchError, CheckpointError or CardError.
    """
    nulls, _ = stored_task_nulls(subjects.coupling, card_rules_digest())
    cards: list[Card] = []
    for one in wanted:
        where = f"{folder_name(one.task)}: " if len(wanted) > 1 else ""
        on_progress = with_prefix(progress, where)
        try:
            task = resolved(subjects, one.task)
            result, digest = _load_or_search(subjects, task, one, seed, seeds, budget, on_progress)
            card = _stored_card(one.out, digest, seed)
            card = card or task_card(subjects.coupling, task, result, digest, seed=seed, progress=on_progress)
            card = replace(card, nulls=nulls, report=with_nulls(card.report, subjects.coupling))
        except (TaskError, SearchError, CardError, CheckpointError) as error:
            if len(wanted) == 1:
                raise
            yield None, f"card      {one.task}: no card: {error}"
            continue
        if one.out is not None:
            one.out.mkdir(parents=True, exist_ok=True)
            write_json(one.out / "card.json", card.to_json())
        cards.append(card)
        yield card, render_card(card, width)
    if len(wanted) > 1 and cards:
        yield None, render_cards(cards)


def _load_or_search(
    subjects: Subjects, task: Resolved, one: CardRequest, seed: int, seeds: int, budget: float, on_progress: OnProgress
) -> tuple[TaskResult, str]:
    """A circuit, loaded from its folder or searched and saved, and the digest of a stored circuit (otherwise "")."""
    found = one.circuit
    if found is None:
        found = search_task(
            subjects, task, seeds=seeds, seed=seed, dense=False, nested=False, budget=budget, progress=on_progress
        )
        if one.out is not None:
            found.save(one.out)
            found = one.out
    folder = None if isinstance(found, TaskResult) else found
    result = found if isinstance(found, TaskResult) else TaskResult.load(found)
    which = "the circuit" if folder is None else f"the circuit in {str(folder)!r}"
    if result.facts.task != task.task:
        raise CardError(which, f"is of the task {result.facts.task}, not {task.task}", "name its own task with ‹task›")
    if folder is None:
        return result, ""
    coupling = "" if subjects.coupling.path is None else fingerprint(subjects.coupling)
    circuit = read_json(folder / "circuit.json")["tensors"]["sha256"][:16]
    return result, f"{circuit}; coupling {coupling}; prompts {task.digest}; rules {card_rules_digest()}"


def _stored_card(out: Path | None, digest: str, seed: int) -> Card | None:
    """The card stored in a folder if its digest and seed are these, otherwise None."""
    if out is None or not digest or not (out / "card.json").is_file():
        return None
    try:
        card = Card.from_json(read_json(out / "card.json"))
    except (CheckpointError, CardError):
        return None
    return card if (card.provenance.get("circuit"), card.provenance.get("seed")) == (digest, seed) else None


def run_nulls(
    subjects: Subjects,
    *,
    names: Sequence[str],
    circuits: Path | None,
    against: Path,
    minutes: float,
    budget: float,
    seed: int,
    width: int,
    progress: OnProgress,
) -> Generator[str, None, None]:
    """Run the nulls on some tasks (default the first few that both models do), and yield a text when each ends.

    The coupling's circuits are loaded from a folder, or searched. Raises CardError if no task is solved.
    """
    fingerprint(subjects.coupling)  # raises before anything is run
    there = {name: folder for folder, name in _find_circuits(circuits)} if circuits is not None else {}
    if circuits is not None and not there:
        raise CardError(f"{str(circuits)!r}", "holds no circuits", "name a folder that `bridge circuit` wrote")
    progress(Phase("nulls: finding tasks that both models do"))
    if names:
        tasks = tuple(resolved(subjects, name) for name in names)
    else:
        searched = [name for name, folder in there.items() if "failed" not in read_json(folder / "circuit.json")]
        known = searched if there else task_names()
        tasks = solved_tasks(subjects.coupling, (resolved(subjects, name) for name in known))
    found: dict[str, TaskResult] = {}

    def circuit(task: Resolved) -> TaskResult:
        if task.task in there and task.task not in found:
            found[task.task] = TaskResult.load(there[task.task])
        elif task.task not in found:
            found[task.task] = search_task(subjects, task, dense=False, nested=False, budget=budget, seed=seed, progress=progress)
        return found[task.task]

    nulls = Nulls(subjects.coupling, tasks, circuit, against, minutes, budget, seed)
    yield f"nulls     {len(NULLS)} on {', '.join(task.task for task in tasks)}; each must fail"
    done = []
    for null in nulls.run(progress):
        done.append(null)
        verdict = "PASSES, which is a failure of the method" if null.passed else "fails, as it must"
        yield f"{null.name:<9} {verdict}"
    yield "\n".join(render_nulls(done, width))
