"""Measure all evidence on a task's circuit, and define the table of rules for its verdict, which is defined nowhere else.

    no explanation       one of the models does not do the task, or the span is too small
    refuted              the circuit is not sufficient in the sparse model (the search's own verdict)
    undecided            the circuit's sufficiency could not be measured
    behavioural          the circuit is sufficient
    representational     interchange interventions on it change the dense model's answer; and its deletion, transported into the
                         dense model, has enough of its effect in the sparse model, even at the site with the least of it
    mechanistic support  also: when it is ablated the answer is lost; it keeps the answer in place of the dense blocks, and its
                         complement does not; single nodes' effects rank alike in both models; it predicts the dense model on
                         held-out prompts; the circuits of several seeds agree; and the coupling's nulls fail

The evidence is measured on at most 64 pairs of the test split, every second one with its members exchanged, and on stress prompts
made from these pairs. Measures that a prompt's circuit has too use the same code. Intervals are bootstraps over pairs.

Shape legend: b pair (row), c circuit, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bridge.cards.prediction import prediction_measures
from bridge.cards.task_circuit import CardError, TaskCircuit, followed_rows
from bridge.circuits.question import spread_indices
from bridge.data.task_stress import stress_pairs
from bridge.data.task_tokens import Resolved, TokenPairs, score
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.evidence.carry import Transporter
from bridge.evidence.controls import matched_nodes
from bridge.evidence.deletion import Deletions
from bridge.evidence.effects import effect_profile, profile_measure, profile_nodes
from bridge.evidence.measures import Control, Criterion, Measure, Report, Rule
from bridge.evidence.patching import Counterfactual, patching_measures
from bridge.evidence.substitution import substitution_measures
from bridge.models.bridges import CoupledModels
from bridge.studies.search import RULES
from bridge.verdicts.null_couplings import NULL_NAMES
from bridge.verdicts.null_table import NullTask, TaskNull, nulls_measure, rules_digest, stored_task_nulls
from bridge.verdicts.prompt import EvidenceConfig

VERSION = 4  # raise it when a change gives other evidence on the same circuit: stored cards and nulls are then made again
TESTS: Mapping[str, tuple[str, ...]] = {
    "patching": ("patching", "patching_rotated", "patching_pairs"),
    "deletion": ("dense_ratio", "dense_matched"),
    "substitution": ("substitution", "complement"),
    "effect profile": ("profile",),
    "prediction": ("prediction", "prediction_margin", "signs", "mistakes"),
}
NULLS: tuple[str, ...] = (*NULL_NAMES, "labels")
UNAFFECTED_TESTS = frozenset({("bridges", "prediction")})  # tests that do not use what the null changes


@dataclass(frozen=True)
class CardConfig(EvidenceConfig):
    """Bounds of the evidence on a task's circuit in addition to those for a prompt, and numbers of draws."""

    nodes: int = 100
    matched_draws: int = 40  # the share that a draw keeps in place of the blocks varies by .05 to .15
    pairs: int = 64
    solved: float = 0.9  # accuracy
    least_span: float = 1.0  # nats
    substituted: float = 0.8
    substituted_others: float = 0.3  # at most, for matched nodes in the mean and for the complement
    agreement: float = 0.9  # of signs


def task_rules(measures: Sequence[Measure]) -> tuple[Rule, ...]:
    """The table of rules, weakest verdict first; a measure that was left out is not required."""
    there = {measure.key for measure in measures}
    keys = {test: tuple(key for key in wanted if key in there) for test, wanted in TESTS.items()}
    return (
        Rule(
            "undecided",
            ("dense_solves", "sparse_solves", "searched", "span"),
            "Both models do the task, and there is a span to explain.",
            refuted="no explanation",
        ),
        Rule("behavioural", ("sufficient",), "The circuit is sufficient in the sparse model.", refuted="refuted"),
        Rule(
            "representational",
            (*keys["patching"], *keys["deletion"]),
            "Patching or deleting the circuit's nodes changes the dense model's answer when the change is transported there.",
        ),
        Rule(
            "mechanistic support",
            ("lost", *keys["substitution"], *keys["effect profile"], *keys["prediction"], "seeds", "nulls"),
            "The answer is lost when the circuit is ablated, the circuit keeps it in place of the dense blocks, its nodes' "
            "effects rank alike in both models, it predicts the dense model's answers, the circuits of several seeds agree, and "
            "the null couplings, which must fail these tests, do fail them.",
        ),
    )


def passes_test(report: Report, test: str) -> bool | None:
    """Whether a test holds: False if one of its measures fails; None if one could not be taken, or if there is none."""
    passed = [measure.passed for measure in report.measures if measure.key in TESTS[test]]
    return False if False in passed else None if None in passed or not passed else True


def null_task(task: str, report: Report, accuracy: float, prompts: str = "") -> NullTask:
    """Summary of a null's evidence on a task: the null passes if all tests hold, whatever its other measures are."""
    found = {test: passes_test(report, test) for test in TESTS}
    values = {test: next((m.value for m in report.measures if m.key in keys), None) for test, keys in TESTS.items()}
    return NullTask(task, found, values, all(each is True for each in found.values()), accuracy, prompts=prompts)


def card_rules_digest() -> str:
    """Digest of the rules by which circuits are searched and judged."""
    return rules_digest(CardConfig(), RULES, VERSION)


def held_out_pairs(task: Resolved, count: int = CardConfig.pairs) -> TokenPairs:
    """At most `count` pairs of a task's test split, every second one with its members exchanged, sorted by length.

    Raises CardError if there are none.
    """
    pairs = task.splits["test"]
    if not len(pairs):
        raise CardError(f"the task {task.task}", "has no test pairs under this tokenizer", "take another task, or add examples")
    some = pairs.rows(spread_indices(len(pairs), count))
    place_b = torch.arange(len(some))
    both = some.both_members().rows(place_b + len(some) * (place_b % 2))
    return both.rows(both.last_b.argsort(stable=True))


@torch.no_grad()
def gather_task(
    coupling: CoupledModels,
    circuit: TaskCircuit,
    task: Resolved,
    alter: Callable[[TokenPairs], TokenPairs] = lambda pairs: pairs,
    *,
    seed: int = 0,
    progress: OnProgress = ignore_progress,
) -> Report:
    """Measure all evidence on a task's circuit. For a null, `alter` changes the answers of all pairs that it is tested on.

    `progress` may raise to stop the work. Raises CardError if the task has no held-out pairs, or the coupling no text.
    """
    config, generator = CardConfig(), torch.Generator().manual_seed(seed + 3_000_017)
    if (reference_bt := coupling.reference_bt) is None:
        raise CardError("the coupling", "holds no reference text, which a card needs for its baseline", "fit it again")
    chosen, prompts = held_out_pairs(task, config.pairs), coupling.dense.prompts
    stress = stress_pairs(chosen, prompts, reference_bt, coupling.context, language=task.language, seed=seed)
    stress = {kind: replace(some, pairs=alter(some.pairs)) for kind, some in stress.items()}
    pairs = alter(chosen).to(coupling.dense.device)
    progress(Phase("evidence: both models on the task"))
    transporter = circuit.make_transporter(coupling, pairs)
    loss, masked = transporter.loss, transporter.masked
    kept_f = circuit.kept_f(masked.space, coupling.dense.device)
    matched_cf = matched_nodes(masked, kept_f, config.matched_draws, generator)
    some_cf = matched_cf[: config.deleted_draws]
    progress(Phase("evidence: patching, in the dense model"))
    there = Counterfactual(pairs.counterfactual_bt, followed_rows(coupling, pairs.counterfactual_bt, pairs.last_b))
    patching = patching_measures(transporter, there, kept_f, some_cf, config.patched, seed)
    progress(Phase("evidence: deletion, in both models"))
    deletions = Deletions.of(transporter, kept_f, some_cf)
    deleted = deletions.measures(coupling, config.behind, config.ratio, config.best, config.matched_lost, seed)
    lost = deletions.lost(1 - float(loss.left_after_deletion(kept_f[None])), config.lost)
    progress(Phase(f"evidence: substitution of the circuit, and of {len(matched_cf)} draws of matched nodes"))
    substitution = substitution_measures(transporter, kept_f, matched_cf, config.substituted, config.substituted_others, seed)
    progress(Phase(f"evidence: {config.nodes} nodes one at a time, in both models"))
    node_p = profile_nodes(transporter, kept_f, config.nodes, generator)
    profile = profile_measure(effect_profile(transporter, kept_f, node_p), Criterion(">=", config.correlation, True), seed)
    progress(Phase("evidence: prediction on stress prompts"))
    prediction = prediction_measures(coupling, circuit, stress, reference_bt, config.agreement, seed)
    measures = (
        *_solved(coupling, config, transporter, pairs), *_searched(circuit), *patching, *deleted, lost, *substitution, profile,
        *prediction, _seeds(circuit), _nulls(coupling),
    )  # fmt: skip
    return Report(measures, task_rules(measures))


def with_nulls(report: Report, coupling: CoupledModels) -> Report:
    """The report with the coupling's current nulls."""
    measures = tuple(m if m.key != "nulls" else _nulls(coupling) for m in report.measures)
    return Report(measures, report.rules)


def _solved(coupling: CoupledModels, config: CardConfig, transporter: Transporter, pairs: TokenPairs) -> tuple[Measure, ...]:
    chance, least = Control("chance", 1, 0.5, 0.5, "it"), Criterion(">=", config.solved)
    accuracy = {"dense": score(coupling.dense, pairs).accuracy, "sparse": score(coupling.sparse, pairs).accuracy}
    return (
        *(Measure(f"{name}_solves", f"accuracy of the {name} model", share, least, chance) for name, share in accuracy.items()),
        Measure("span", "span in nats", abs(transporter.loss.span), Criterion(">=", config.least_span)),
    )


def _searched(circuit: TaskCircuit) -> tuple[Measure, Measure]:
    """The search's own verdict in two parts: whether there is something to explain, and whether the circuit is sufficient."""
    found = float(circuit.sparse_verdict not in ("unsolved", "no explanation"))
    value, yes = {"behavioural": 1.0, "refuted": 0.0}.get(circuit.sparse_verdict), Criterion(">=", 1.0)
    note = f"the search's verdict on the circuit is {circuit.sparse_verdict}"
    return (
        Measure("searched", "something to explain in the sparse model", found, yes),
        Measure("sufficient", "sufficient in the sparse model", value, yes, note=note),
    )


def _seeds(circuit: TaskCircuit) -> Measure:
    value = None if circuit.seeds_agree is None else float(circuit.seeds_agree)
    note = "only one seed was searched" if value is None else ""
    return Measure("seeds", "circuits of several seeds agree", value, Criterion(">=", 1.0), note=note)


def _nulls(coupling: CoupledModels) -> Measure:
    nulls, why = stored_task_nulls(coupling, card_rules_digest())
    nulls = nulls or ()
    weak = [f"the null {null.name!r} is too weak to show anything" for null in nulls if null.note]
    missing = [f"the null {name!r} was not run" for name in NULLS if name not in {null.name for null in nulls}]
    return nulls_measure(nulls, why or "; ".join(weak + missing), "; ".join(map(_passed_tests_text, nulls)))


def _passed_tests_text(null: TaskNull) -> str:
    """The single tests that a null passes; such a test is no evidence by itself."""
    found = {test: null.passing(test) for test in TESTS if (null.name, test) not in UNAFFECTED_TESTS}
    passed = [f"{test} on {count} of {len(null.tasks)}" for test, count in found.items() if count]
    return f"{null.name} passes {', '.join(passed) or 'no test'}"
