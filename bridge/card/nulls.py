"""Nulls for the whole card: couplings that must fail it, run once per coupling on a few tasks, and kept in its folder.

    uncoupled   a sparse model of the same shape from a random start, with at least 1/16 of its weights, trained on text and on
                the dense model's answers but on nothing inside it; bridges fitted afterwards by ridge regression on the
                coupling's reference text; circuits searched in it as ever. That it has more weights, and answers to learn from,
                makes it the harder null
    bridges     the coupling with the sparse channels of every bridge in a random order, another at every site (residual streams
                share their channels over sites, so that only to exchange sites would change little); its own circuits
    weights     the entries of every matrix of the sparse model permuted; ridge bridges; circuits searched in it
    labels      the coupling itself and its circuits, every answer token replaced by a random one, the same one everywhere

A null passes where all four tests hold (`Card.tests_hold`), whatever else is to be said of it: that no model does a nonsense task
is no test's merit. A search that finds no circuit fails; one that cannot be run is an error. Where an uncoupled model does none
of the tasks, its null is weak, and says so: it was trained too briefly.

nulls.json holds the results with a fingerprint of what they depend on, and is written after every task: a run that is killed goes
on where it was, and results of another coupling, of other prompts or by other rules are never taken for this one's.

Shape legend: b row, t token, d dense width, s sparse width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.bridges import Bridges, Coupling, folder_of
from bridge.card.assess import held_out, task_card
from bridge.card.card import NULLS, TESTS, Card, CardError, NullName, NullResult, NullTask, Test
from bridge.card.kept import FILE, FORMAT, Stored, fingerprint, read_stored, rules
from bridge.checkpoint import read_json, write_json
from bridge.circuits.judge import SOLVED
from bridge.circuits.masks import NoCircuitError
from bridge.circuits.result import TaskResult
from bridge.circuits.search import WORK, Subjects, permuted_weights, random_labels, search_task
from bridge.recipe import Losses
from bridge.slopes import refit_decoders
from bridge.tasks.tokens import Resolved, TokenPairs, score
from bridge.training import Progress, fit

TASKS = 3  # by default: of those the coupling solves
MINUTES = 20.0
RATE = 1e-2  # of the optimizer: the coupling's own may serve a start from the dense model, and this one's is random
L0 = 1 / 16  # the least: from a random start, a model as sparse as some couplings learns no task in hours
MOST_TOKENS, TOKENS_A_MINUTE = 20_000_000, 500_000  # of text that is read for it: more than two cores train on
WORK_SHARE = 0.2  # of a search's work: it is a null
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean variance; the best on held-out rows is taken
WEAK = "the uncoupled model does none of these tasks: train it for longer (--minutes), or this null shows little"

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Nulls:
    """What the nulls of a coupling are made with: tasks and their circuits, the uncoupled coupling's folder and budget, seeds."""

    coupling: Coupling
    tasks: tuple[Resolved, ...]
    circuits: Callable[[Resolved], TaskResult]
    against: Path
    minutes: float = MINUTES
    work: float = WORK_SHARE * WORK
    seed: int = 0

    @cached_property
    def subjects(self) -> Subjects:
        """The coupling itself."""
        return Subjects.of(self.coupling)

    @cached_property
    def reference_bt(self) -> Tensor:
        """The text that bridges are fitted on."""
        assert self.coupling.reference_bt is not None  # as Subjects.of has checked
        return self.coupling.reference_bt

    def run(self, progress: Say) -> Generator[NullResult, None, None]:
        """Every null as it ends; results found in the coupling's folder are taken from there."""
        before = self._kept()
        done: dict[str, NullResult] = dict(before)
        asked = {resolved.task: resolved.digest for resolved in self.tasks}
        for name, what in NULLS.items():
            there = done[name].tasks if name in done else ()
            known = {task.task: task for task in there if asked.get(task.task, task.prompts) == task.prompts}
            found = [task for task in known.values() if task.task not in {resolved.task for resolved in self.tasks}]
            lazily = _Lazily(lambda name=name: self._subjects(name, progress))
            for resolved in self.tasks:
                if resolved.task not in known:
                    found.append(replace(self._card(name, lazily, resolved, progress), prompts=asked[resolved.task]))
                else:
                    found.append(known[resolved.task])
                done[name] = NullResult(name, what, tuple(found), _note(name, found))
                self._keep(done)
            yield done[name]

    def _kept(self) -> dict[str, NullResult]:
        """Results kept of the same settings."""
        file = self._folder / FILE
        if not file.is_file():
            return {}
        stored = read_stored(file)
        if stored is None:
            raise CardError(f"{str(file)!r} cannot be read; remove it, and run the nulls again")
        same = stored.format == FORMAT and dict(stored.fingerprint) == self._settings
        return {null.name: null for null in stored.nulls} if same else {}

    @property
    def _folder(self) -> Path:
        assert self.coupling.path is not None
        return folder_of(self.coupling.path)

    @cached_property
    def _settings(self) -> dict[str, str | int | float | None]:
        against: dict[str, Any] = read_json(self.against / "coupling.json") if (self.against / "coupling.json").is_file() else {}
        return {
            "coupling": fingerprint(self.coupling),
            "rules": rules(),
            "against": (against.get("tensors") or {}).get("sha256", ""),
            "work": self.work,
            "seed": self.seed,
        }

    def _keep(self, done: Mapping[str, NullResult]) -> None:
        self.__dict__.pop("_settings", None)  # the uncoupled model may have come to be since
        values = asdict(Stored(FORMAT, self._settings, tuple(done.values())))
        write_json(self._folder / FILE, values)

    def _subjects(self, name: NullName, progress: Say) -> Subjects:
        """The coupling of a null."""
        if name == "uncoupled":
            other = uncoupled(self.coupling, self.against, self.minutes, self.seed, progress)
            progress(f"{name}: bridges by ridge regression")
            return self._with(replace(self.coupling, sparse=other.sparse))
        if name == "weights":
            return self._with(replace(self.coupling, sparse=permuted_weights(self.coupling.sparse, self.seed)))
        if name == "bridges":
            return replace(self.subjects, coupling=replace(self.coupling, bridges=shuffled_bridges(self.coupling, self.seed)))
        return self.subjects

    def _with(self, coupling: Coupling) -> Subjects:
        fitted = replace(coupling, bridges=ridge_bridges(coupling, self.reference_bt))
        refit_decoders(fitted, self.reference_bt, coupling.recipe.refit.slopes)  # a null's have all that the coupling's have
        return Subjects.of(fitted)

    def _card(self, name: NullName, subjects: _Lazily, task: Resolved, progress: Say) -> NullTask:
        """The whole card of a null on a task; where there is no circuit, why."""
        where = f"{name}, {task.task}: "

        def say(text: str) -> None:
            progress(f"{where}{text}")

        def alter(pairs: TokenPairs) -> TokenPairs:
            return random_labels(pairs, self.coupling.dense.vocabulary, self.seed) if name == "labels" else pairs

        pairs = held_out(task)
        of = subjects()
        accuracy = score(of.coupling.sparse, alter(pairs).to(of.coupling.dense.device)).accuracy
        if name in ("bridges", "labels"):
            result = self.circuits(task)
        else:
            try:
                result = search_task(of, task, dense=False, gated=False, seed=self.seed, work=self.work, progress=say)
            except NoCircuitError as error:
                return NullTask(task.task, dict.fromkeys(TESTS), dict.fromkeys(TESTS), False, accuracy, f"no circuit: {error}")
        card = task_card(of, task, result, pairs=pairs, alter=alter, seed=self.seed, progress=say)
        return null_task(card, accuracy)


class _Lazily:
    """A null's coupling, made when its first task needs it."""

    def __init__(self, make: Callable[[], Subjects]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Subjects:
        self._made = self._made or self._make()
        return self._made


def null_task(card: Card, accuracy: float) -> NullTask:
    """What is kept of a null's card."""
    first: dict[Test, float | None] = {test: next((m.value for m in card.measures(test)), None) for test in TESTS}
    return NullTask(card.about, {test: card.holds(test) for test in TESTS}, first, card.tests_hold, accuracy)


def _note(name: NullName, found: Sequence[NullTask]) -> str:
    unsolved = all((task.accuracy or 0) < SOLVED for task in found)
    return WEAK if name == "uncoupled" and unsolved else ""


def uncoupled(coupling: Coupling, folder: Path, minutes: float, seed: int, progress: Say) -> Coupling:
    """A sparse model of the coupling's shape that no bridge took part in: that of a folder, or fitted there, resumably.

    Raises CardError where the folder holds a model of another shape, or one that was coupled.
    """
    if not (folder / "coupling.json").is_file():
        progress(f"uncoupled: training without bridges for {minutes:g} minutes")
        recipe = coupling.recipe
        values = recipe.model_dump(include={"sparse", "sparsity", "data"}, exclude_none=True)
        settings = {
            f"{part}.{key}": value for part, some in values.items() if isinstance(some, dict) for key, value in some.items()
        }
        settings |= {"sparse.start": "random", "optimizer.rate": RATE}  # no weight of a coupling's in it
        losses = Losses().without_bridges().model_dump(exclude={"splice"})
        settings |= {f"losses.{term}": weight for term, weight in losses.items()}
        if coupling.sparse.fractions(recipe.sparsity).blocks < L0:
            settings["sparsity.l0"] = L0
        tokens = min(recipe.budget.tokens or MOST_TOKENS, max(TOKENS_A_MINUTE, int(minutes * TOKENS_A_MINUTE)))

        def watch(state: Progress) -> None:
            progress(f"uncoupled: {state.fraction:.0%} of {minutes:g} minutes, CE {state.losses.get('ce', float('nan')):.2f}")

        fit(
            coupling.dense.model, tokenizer=coupling.dense.tokenizer, tokens=tokens, minutes=minutes,
            settings=settings, seed=seed + 1, out=folder, resume=folder.exists(),
            device=str(coupling.dense.device), on_progress=watch,
        )  # fmt: skip
    other = Coupling.from_pretrained(folder, dense=coupling.dense)
    if other.recipe.losses.coupled:
        raise CardError(f"{str(folder)!r} was coupled to the dense model; name one of `bridge fit --uncoupled`")
    if other.sparse.locations() != coupling.sparse.locations():
        raise CardError(f"{str(folder)!r} has a sparse model of another shape; fit one with the coupling's recipe, --uncoupled")
    return other


@torch.no_grad()
def ridge_bridges(coupling: Coupling, tokens_bt: Tensor) -> Bridges:
    """Bridges between the two models as they are, by ridge regression on text; the last quarter of it chooses the penalty."""
    sparse, dense = coupling.sparse, coupling.dense
    bridges = Bridges(coupling.n_sites, dense.width, sparse.width, sparse.shape.keep).to(dense.device).requires_grad_(False)
    rows = tokens_bt.to(dense.device)
    traces = [(dense.run(some).residuals, sparse.run(some, last_only=True).residuals) for some in rows.split(16)]
    bridges.calibrate([torch.cat([h[site] for h, _ in traces]) for site in range(coupling.n_sites)])
    for site in range(coupling.n_sites):
        h_nd = torch.cat([h[site].flatten(0, 1) for h, _ in traces]).double()
        x_ns = torch.cat([x[site].flatten(0, 1) for _, x in traces]).double()
        bridge = bridges[site]
        scaled_nd = (h_nd - bridge.mean_d.double()) / bridge.scale.double()
        for linear, source, target in ((bridge.encoder, scaled_nd, x_ns), (bridge.decoder, x_ns, scaled_nd)):
            weight, bias = ridge(source, target)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return bridges


def ridge(source_ni: Tensor, target_nj: Tensor) -> tuple[Tensor, Tensor]:
    """weight_ji and bias_j of the ridge regression of target on source, float64, whose penalty serves held-out rows best."""
    n = len(source_ni) * 3 // 4 if len(source_ni) >= 8 else len(source_ni)
    mean_i, mean_j = source_ni[:n].mean(0), target_nj[:n].mean(0)
    centred_ni, centred_nj = source_ni - mean_i, target_nj - mean_j
    gram_ii, cross_ij = centred_ni[:n].T @ centred_ni[:n] / n, centred_ni[:n].T @ centred_nj[:n] / n
    strength = gram_ii.diagonal().mean().clamp(min=1e-12)
    eye_ii = torch.eye(len(gram_ii), dtype=gram_ii.dtype, device=gram_ii.device)
    weights = [torch.linalg.solve(gram_ii + penalty * strength * eye_ii, cross_ij) for penalty in RIDGES]
    late = slice(n, None) if n < len(source_ni) else slice(None)
    best_ij = min(weights, key=lambda w_ij: float((centred_nj[late] - centred_ni[late] @ w_ij).square().sum()))
    return best_ij.T, mean_j - mean_i @ best_ij


@torch.no_grad()
def shuffled_bridges(coupling: Coupling, seed: int) -> Bridges:
    """The coupling's bridges with their sparse channels in a random order, another at every site."""
    generator = torch.Generator().manual_seed(seed)
    sparse, dense = coupling.sparse, coupling.dense
    shuffled = Bridges(coupling.n_sites, dense.width, sparse.width, sparse.shape.keep).to(dense.device).requires_grad_(False)
    for site in range(coupling.n_sites):
        order_s = torch.randperm(sparse.width, generator=generator).to(dense.device)
        state = dict(coupling.bridges[site].state_dict())
        state |= {
            "encoder.weight": state["encoder.weight"][order_s],
            "encoder.bias": state["encoder.bias"][order_s],
            "decoder.weight": state["decoder.weight"][:, order_s],
        }
        shuffled[site].load_state_dict(state)
    return shuffled


def solved_tasks(coupling: Coupling, tasks: Iterable[Resolved], most: int = TASKS) -> tuple[Resolved, ...]:
    """The first tasks that both models of a coupling do. Raises CardError where there are none."""
    solved: list[Resolved] = []
    for task in tasks:
        if len(solved) == most:
            break
        if not len(task.splits["test"]):
            continue
        pairs = held_out(task).to(coupling.dense.device)
        if min(score(model, pairs).accuracy for model in (coupling.dense, coupling.sparse)) >= SOLVED:
            solved.append(task)
    if not solved:
        raise CardError("the models of this coupling do none of the tasks, so there is no card for nulls to fail; name --tasks")
    return tuple(solved)
