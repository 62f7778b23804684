"""All evidence on a prompt: what it gathers, the table of rules, and the nulls kept with a coupling."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import NestedMasks
from bridge.evidence.measures import Control, Report
from bridge.evidence.patching import Counterfactual
from bridge.evidence.sufficiency import NestedCircuit, measure_nested
from bridge.models.bridges import CoupledModels
from bridge.verdicts import nulls as nulls_module
from bridge.verdicts.null_couplings import NULL_NAMES, NullError, null_coupling
from bridge.verdicts.null_table import FILE, PromptNull, PromptVerdict, keep_nulls, rules_digest, stored_prompt_nulls
from bridge.verdicts.nulls import judged, prompt_means, run_prompt_nulls
from bridge.verdicts.prompt import Evidence, EvidenceConfig, gather_evidence, opening_of
from tests.conftest import VOCABULARY

LENGTH = 6
SEARCH = SearchConfig(steps=2, rounds=1, sweeps=1, least_span=0.0)
CONFIG = EvidenceConfig(nodes=12, matched_draws=3)


def prompt(seed: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loaded(coupling_folder: Path) -> CoupledModels:
    return CoupledModels.from_pretrained(coupling_folder)


def gathered(coupling: CoupledModels, counterfactual: bool) -> tuple[Evidence, CircuitLoss]:
    tokens_t, other_t = prompt(1), prompt(2)
    last_b = torch.tensor([LENGTH - 1])
    followed = follow_dense(coupling, tokens_t[None], last_b)
    question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()))
    masked = MaskedModel(coupling.sparse, question, prompt_means(coupling), followed.errors)
    loss = CircuitLoss(masked, followed.dense_bv, SEARCH)
    levels = SEARCH.nested()
    level_f = (6 * torch.rand(masked.space.size, generator=torch.Generator().manual_seed(3))).long().clamp(max=len(levels))
    nested = NestedMasks(levels, level_f, (1.0,) * len(levels))
    other = Counterfactual(other_t[None], follow_dense(coupling, other_t[None], last_b)) if counterfactual else None
    groups = [nested.kept(SEARCH.opening) & (torch.arange(masked.space.size) % 3 == part) for part in range(3)]
    circuits = measure_nested(loss, nested, 5)
    return gather_evidence(coupling, loss, nested, circuits, SEARCH.opening, followed, groups, other, config=CONFIG, seed=5), loss


def test_evidence_is_whole_and_repeats_itself(loaded: CoupledModels) -> None:
    evidence, loss = gathered(loaded, True)
    again, _ = gathered(loaded, True)
    assert evidence.report == again.report and evidence.group_losses == again.group_losses
    assert len(evidence.group_losses) == 3 and len(evidence.nested) == 5
    report, opening = evidence.report, evidence.nested[SEARCH.opening]
    assert report["faithfulness"].value == opening.faithfulness
    assert [circuit.adversary is None for circuit in evidence.nested] == [place != SEARCH.opening for place in range(5)]
    assert report["adversary"].value == opening.adversary
    assert report["span"].value == abs(loss.span)
    assert len(report["dense_ratio"].points) == loaded.n_sites
    assert (evidence.backup is not None) == (opening.left > SEARCH.left)
    assert report["nulls"].passed is None and "not run" in report["nulls"].note
    json.dumps([measure.note for measure in report.measures])
    without, _ = gathered(loaded, False)
    with pytest.raises(KeyError, match="patching"):
        without.report["patching"]


def circuit_of(asked: float | None, nodes: int, faithfulness: float, mean: float, worst: float) -> NestedCircuit:
    return NestedCircuit(asked, nodes, 0, faithfulness, 0.0, 0.0, mean, 0.0, worst, None, 0.0, 0.0, True)


HOLDS, SCATTERS = (0.96, 0.9, 0.7), (0.96, 0.9, 0.3)


@pytest.mark.parametrize(
    ("asked", "after", "opening"),
    [
        ((10, *HOLDS), (12, *HOLDS), 0),
        ((10, *SCATTERS), (12, *HOLDS), 1),
        ((10, 0.8, 0.9, 0.7), (40, *HOLDS), 1),
        ((10, *SCATTERS), (41, *HOLDS), 0),  # too large to be read instead
        ((10, *SCATTERS), (12, *SCATTERS), 0),
        ((10, *SCATTERS), (12, 0.94, 0.9, 0.7), 0),
    ],
)
def test_the_next_circuit_is_drawn_where_one_does_not_hold(
    asked: tuple[int, float, float, float], after: tuple[int, float, float, float], opening: int
) -> None:
    first, second = circuit_of(0.9, *asked), circuit_of(0.95, *after)
    assert opening_of((first, second), 0) == opening
    assert opening_of((first,), 0) == 0 and opening_of((first, circuit_of(None, *after)), 0) == 0


@pytest.fixture(scope="module")
def template(loaded: CoupledModels) -> Report:
    return gathered(loaded, True)[0].report


GOOD = {
    "span": 5.0, "error_share": 0.1, "faithfulness": 0.93, "supersets_mean": 0.9, "supersets_worst": 0.7, "matched": 0.02,
    "dense_ratio": 0.8, "dense_matched": 0.01, "lost": 0.9, "profile": 0.7, "patching": 0.8, "nulls": 0.0,
}  # fmt: skip


def report_of(template: Report, **values: float | None) -> Report:
    control = Control("control", 1, 0.0, 0.0, "it")
    values = {**GOOD, **values}
    measures = tuple(
        replace(measure, value=values.get(measure.key, measure.value), control=control) for measure in template.measures
    )
    return Report(measures, CONFIG.rules(counterfactual=True, by_deletion=True))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, "mechanistic support"),
        ({"span": -1.0}, "no explanation"),  # the search of these tests asks for no more than 0
        ({"error_share": 0.6}, "no explanation"),
        ({"faithfulness": 0.8}, "refuted"),
        ({"supersets_mean": 0.5}, "refuted"),
        ({"matched": 0.5}, "refuted"),
        ({"matched": None}, "undecided"),
        ({"dense_ratio": 0.0}, "behavioural"),
        ({"dense_ratio": None}, "behavioural"),
        ({"dense_matched": 0.3}, "behavioural"),
        ({"lost": 0.5}, "representational"),
        ({"profile": 0.2}, "representational"),
        ({"patching": 0.1}, "representational"),
        ({"nulls": 0.1}, "representational"),
        ({"nulls": None}, "representational"),
    ],
)
def test_the_table_gives_every_verdict(template: Report, values: dict[str, float | None], verdict: str) -> None:
    report = report_of(template, **values)
    assert report.verdict == verdict
    with_effects = replace(report, rules=CONFIG.rules(counterfactual=True, by_deletion=False)).verdict
    assert with_effects == ("behavioural" if "profile" in values else verdict)
    assert report.reasons and all(reason[0].isupper() for reason in report.reasons)


def test_nulls_are_kept_beside_others_and_only_for_their_coupling(
    loaded: CoupledModels, coupling_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(coupling_folder, folder)
    (folder / FILE).write_text('{"format": 1, "nulls": [], "tasks": {"nulls": []}}')  # the first are an earlier version's
    coupling = replace(loaded, path=str(folder))
    rules = rules_digest(SEARCH, CONFIG)
    assert stored_prompt_nulls(coupling, rules)[0] is None
    found = [
        ("refuted", "refuted", None),
        ("representational", "representational", 0.4),
        ("behavioural", "representational", 0.2),
    ]
    nulls = (PromptNull.of("bridges", [PromptVerdict(*each) for each in found]),)
    keep_nulls(coupling, "prompts", nulls, rules)
    assert stored_prompt_nulls(coupling, rules) == (nulls, "")
    assert nulls[0].strong == 1 and nulls[0].verdicts == {"refuted": 1, "representational": 1, "behavioural": 1}
    assert nulls[0].by_deletion == 2 and nulls[0].ratio == 0.4
    kept = json.loads((folder / FILE).read_text())
    assert set(kept) == {"prompts", "tasks"} and kept["tasks"] == {"nulls": []}
    assert "other bounds" in stored_prompt_nulls(coupling, rules_digest(SEARCH, replace(CONFIG, ratio=0.9)))[1]
    (folder / FILE).write_text((folder / FILE).read_text().replace('"coupling": "', '"coupling": "x'))
    assert "another coupling" in stored_prompt_nulls(coupling, rules)[1]
    assert "in no folder" not in stored_prompt_nulls(replace(loaded, path=None), rules)[1]


def test_nulls_are_judged_alike(
    loaded: CoupledModels, coupling_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(coupling_folder, folder)
    coupling = replace(loaded, path=str(folder))
    seen = []
    monkeypatch.setattr(nulls_module, "judged", lambda null, *_: seen.append(null) or PromptVerdict("refuted", "refuted", 0.1))
    found = run_prompt_nulls(coupling, [prompt(1), prompt(2)], None, names=("bridges", "weights"), search=SEARCH, config=CONFIG)
    assert [(null.name, null.prompts, null.strong, null.ratio) for null in found] == [
        ("bridges", 2, 0, 0.1), ("weights", 2, 0, 0.1),
    ]  # fmt: skip
    assert stored_prompt_nulls(coupling, rules_digest(SEARCH, CONFIG))[0] == found
    bridges, _, weights, _ = seen
    assert bridges.sparse is coupling.sparse and weights.sparse is not coupling.sparse
    for name, weight in coupling.sparse.named_parameters():
        moved = weights.sparse.get_parameter(name)
        assert torch.equal(weight.flatten().sort().values, moved.flatten().sort().values)
    order = bridges.bridges[1].decoder.weight.abs().sum(0).sort().values
    torch.testing.assert_close(order, coupling.bridges[1].decoder.weight.abs().sum(0).sort().values)
    assert not torch.equal(bridges.bridges[1].decoder.weight, coupling.bridges[1].decoder.weight)


def test_one_prompt_is_judged_by_search_and_evidence(loaded: CoupledModels) -> None:
    found = judged(loaded, prompt(1), prompt_means(loaded), SEARCH, CONFIG)
    assert found.verdict in ("no explanation", "refuted", "behavioural", "representational", "undecided")
    assert found.by_deletion in (found.verdict, "representational")
    nothing = judged(loaded, prompt(1), prompt_means(loaded), replace(SEARCH, least_span=1e6), CONFIG)
    assert nothing == PromptVerdict("no explanation", "no explanation", None)


@pytest.mark.parametrize(("by_deletion", "asked"), [(None, True), (0, False), (1, True)])
def test_effects_are_asked_where_a_null_passes_by_deletion_alone(
    loaded: CoupledModels, coupling_folder: Path, tmp_path: Path, by_deletion: int | None, asked: bool
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(coupling_folder, folder)
    coupling = replace(loaded, path=str(folder))
    if by_deletion is not None:
        null = PromptNull("uncoupled", 2, {"behavioural": 2}, 0.3, by_deletion)
        keep_nulls(coupling, "prompts", (null,), rules_digest(SEARCH, CONFIG))
    rules = {rule.verdict: rule for rule in gathered(coupling, counterfactual=False)[0].report.rules}
    assert ("profile" in rules["representational"].needs) == asked
    assert ("effects" in rules["representational"].says) == asked


def test_a_null_says_what_it_lacks(loaded: CoupledModels) -> None:
    assert NULL_NAMES == ("uncoupled", "bridges", "weights")
    with pytest.raises(NullError, match="name one with against="):
        null_coupling(loaded, "uncoupled")
    with pytest.raises(NullError, match="no reference text"):
        null_coupling(replace(loaded, reference_bt=None), "bridges")
