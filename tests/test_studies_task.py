"""Evidence on a task: its circuit on pairs in both models, and the rules; a coupling that is known to be the dense model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CONTEXT, VOCABULARY, planted_pairs, tiny_gpt2, tiny_tokenizer, untrained
from torch import Tensor

from bridge import start
from bridge.bootstrap import interval
from bridge.bridges import Coupling, new_coupling
from bridge.circuit import NodeSpace, corpus_means
from bridge.circuits.error_nodes import error_means
from bridge.dense import DenseModel, load_dense
from bridge.evidence.carry import Carrier
from bridge.evidence.controls import active_nodes, node_values
from bridge.evidence.deletion import delete
from bridge.evidence.measures import Criterion, Measure, Report, Verdict
from bridge.recipe import resolve
from bridge.residual import Enter
from bridge.sparse import Location
from bridge.studies.task import NULLS, TESTS, gather_task, held_out, holds, null_task, task_rules, with_nulls
from bridge.studies.task_circuit import CardError, TaskCircuit
from bridge.tasks.tokens import Resolved, TokenPairs
from bridge.training import resolve_for


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def copied(dense: DenseModel | None = None) -> Coupling:
    """A coupling whose sparse model computes what its dense model does, at every site."""
    dense = load_dense(tiny_gpt2(), tokenizer=tiny_tokenizer()) if dense is None else dense
    values = {
        "dense": "tiny", "sparse": {"width": 64, "head_channels": 8, "positions": "learned"}, "sparsity": {"l0": 0.25},
        "data": {"context": CONTEXT},
    }  # fmt: skip
    coupling = new_coupling(dense, resolve_for(dense, resolve(values)))
    with pytest.MonkeyPatch.context() as patch:  # so that the copy is exact
        patch.setattr(start, "SMALL", 0.0)
        patch.setattr(start, "SINKS", ())
        start.start_from_dense(coupling, torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5)))
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return replace(coupling, reference_bt=corpus())


@torch.no_grad()
def answered(dense: DenseModel, pairs: TokenPairs) -> TokenPairs:
    """The pairs with those two tokens as answers that the dense model tells apart best by what tells the prompts apart."""
    first_bv, second_bv = (
        pairs.at_last(dense.run(tokens_bt).logits_btv) for tokens_bt in (pairs.prompt_bt, pairs.counterfactual_bt)
    )
    margin_vv = torch.minimum(
        (first_bv[:, :, None] - first_bv[:, None]).mean(0), (second_bv[:, None] - second_bv[:, :, None]).mean(0)
    )
    answer, wrong = divmod(int(margin_vv.argmax()), VOCABULARY)
    return replace(
        pairs, answer_bk=torch.full((len(pairs), 1), answer), wrong_bk=torch.full((len(pairs), 1), wrong)
    )  # fmt: skip


def circuit_of(coupling: Coupling, kept_f: Tensor | None = None, *, errors: bool = False) -> TaskCircuit:
    """A circuit of a coupling, found with errors at their means or without any; all nodes are kept where no mask is given."""
    means = corpus_means(coupling.sparse, corpus()) | (error_means(coupling, corpus()) if errors else {})
    space = NodeSpace(coupling.sparse.locations(), 1)
    kept_f = torch.ones(space.size, dtype=torch.bool) if kept_f is None else kept_f
    return TaskCircuit("planted", space.split(kept_f), means, "behavioural", True)


def case_of(
    coupling: Coupling, kept_f: Tensor | None = None, pairs: TokenPairs | None = None, *, errors: bool = False
) -> tuple[Carrier, Tensor, TokenPairs]:
    """Both models on pairs, the shortest first, and the mask of a circuit."""
    pairs = answered(coupling.dense, planted_pairs(12, lengths=(6, 5))) if pairs is None else pairs
    pairs, circuit = pairs.rows(pairs.last_b.argsort(stable=True)), circuit_of(coupling, kept_f, errors=errors)
    carrier = circuit.on(coupling, pairs)
    return carrier, circuit.kept_f(carrier.masked.space, torch.device("cpu")), pairs


def some_nodes(coupling: Coupling, fraction: float = 0.4, seed: int = 0) -> Tensor:
    size = sum(coupling.sparse.locations().values())
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < fraction


def dense_difference(coupling: Coupling, pairs: TokenPairs, row: int, enter: Enter | None = None) -> float:
    """D of one row, run by itself without its padding."""
    length = int(pairs.last_b[row]) + 1
    if enter is not None:
        enter = Enter(enter.site_b, enter.x_btd[:, :length])
    logits_v = coupling.dense.run(pairs.prompt_bt[row : row + 1, :length], enter).logits_btv[0, -1]
    return float(logits_v[pairs.answer_bk[row, 0]] - logits_v[pairs.wrong_bk[row, 0]])


def literal_run(carrier: Carrier, row: int, kept_f: Tensor, enter: Enter | None = None):
    """The sparse model on one prompt without its padding, every node and every error placed by hand."""
    masked, length = carrier.masked, int(carrier.masked.question.last_b[row]) + 1
    parts, means, errors, last = masked.space.split(kept_f), masked.means, masked.errors, carrier.coupling.n_sites

    def gate(at: Location, x_1tn: Tensor) -> Tensor:
        return torch.where(parts[at][0], x_1tn, means[at])

    def correct(at: Location, x_1ts: Tensor) -> Tensor:
        assert errors is not None
        error_ts = errors[at][row] if at.layer == last else errors[at][row, :length]
        added_ts = error_ts if bool(parts[at]) else means[at].expand_as(error_ts)
        return torch.cat([x_1ts[:, : -len(added_ts)], x_1ts[:, -len(added_ts) :] + added_ts], 1)

    tokens_1t = masked.question.prompt_bt[row : row + 1, :length]
    return carrier.coupling.sparse.run(tokens_1t, enter, gate, correct=None if errors is None else correct)


def decoded(carrier: Carrier, site: int, change_1ts: Tensor) -> Tensor:
    """The difference that a change makes behind a decoder."""
    decode = carrier.coupling.bridges[site].decode
    return decode(change_1ts) - decode(torch.zeros_like(change_1ts))


@torch.no_grad()
def test_differences_are_those_of_rows_alone(dense: DenseModel) -> None:
    coupling = untrained(dense)
    carrier, _, pairs = case_of(coupling)
    for row in range(len(pairs)):
        assert float(carrier.loss.model_b[row]) == pytest.approx(dense_difference(coupling, pairs, row), abs=1e-4)


@torch.no_grad()
def test_what_is_changed_is_run_from_there(dense: DenseModel) -> None:
    coupling = untrained(dense)
    carrier, _, pairs = case_of(coupling)
    row_k, site_k = torch.tensor([11, 0, 3, 0]), torch.tensor([1, 4, 0, 2])
    change_ktd = torch.randn(4, pairs.prompt_bt.shape[1], dense.width, generator=torch.Generator().manual_seed(0))
    lost_k = carrier.lost_by(row_k, site_k, change_ktd)
    for item, (row, site) in enumerate(zip(row_k.tolist(), site_k.tolist(), strict=True)):
        enter = Enter.at(site, carrier.dense.residuals[site][row : row + 1] + change_ktd[item : item + 1])
        expected = float(carrier.loss.model_b[row]) - dense_difference(coupling, pairs, row, enter)
        assert float(lost_k[item]) * carrier.loss.span == pytest.approx(expected, abs=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("errors", [False, True])
def test_a_deletion_is_the_literal_one_on_every_prompt(dense: DenseModel, errors: bool) -> None:
    coupling = untrained(dense)
    carrier, kept_f, pairs = case_of(coupling, some_nodes(coupling), errors=errors)
    assert (carrier.masked.errors is not None) is errors
    (found,) = delete(carrier, kept_f[None])
    for row in (0, 5, 11):
        whole, without = (literal_run(carrier, row, mask_f) for mask_f in (carrier.reference_f, carrier.reference_f & ~kept_f))
        answer, wrong = int(pairs.answer_bk[row, 0]), int(pairs.wrong_bk[row, 0])

        def d(trace, answer=answer, wrong=wrong) -> float:
            return float(trace.logits_btv[0, -1, answer] - trace.logits_btv[0, -1, wrong])

        span = carrier.loss.span
        assert found.lost_b[row] * span == pytest.approx(d(whole) - d(without), abs=2e-4)
        for site in range(coupling.n_sites):
            change_1ts = without.residuals[site] - whole.residuals[site]
            h_1td = carrier.dense.residuals[site][row : row + 1, : change_1ts.shape[1]] + decoded(carrier, site, change_1ts)
            expected = float(carrier.loss.model_b[row]) - dense_difference(coupling, pairs, row, Enter.at(site, h_1td))
            assert found.dense_jb[site, row] * span == pytest.approx(expected, abs=1e-3)
            entered = literal_run(carrier, row, carrier.reference_f, Enter.at(site, whole.residuals[site] + change_1ts))
            assert found.sparse_jb[site, row] * span == pytest.approx(d(whole) - d(entered), abs=1e-3)
    ratio, bounds = found.ratio(1 / 3), found.ratio_interval(1 / 3, 0)
    assert ratio is None or (bounds is not None and bounds[0] <= bounds[1])


@torch.no_grad()
def test_nodes_are_active_that_are_so_for_any_prompt(dense: DenseModel) -> None:
    coupling = untrained(dense)
    coupling.sparse.project(0.1)
    carrier, _, pairs = case_of(coupling)
    active = carrier.masked.space.split(active_nodes(carrier.masked))
    values = node_values(carrier.masked, torch.ones_like(carrier.reference_f))
    for at, active_1n in active.items():
        expected_n = torch.zeros_like(active_1n[0])
        for row in range(len(pairs)):
            expected_n |= (values[at][row, : int(pairs.last_b[row]) + 1] != 0).any(0)
        assert torch.equal(active_1n[0], expected_n)


def test_intervals_are_those_of_the_mean() -> None:
    values_b = np.random.default_rng(1).normal(size=400)
    bounds = interval(lambda pick_kb: values_b[pick_kb].mean(1), 400, 0)
    assert bounds is not None and bounds[0] < values_b.mean() < bounds[1]
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * values_b.std() / 20, rel=0.15)
    assert interval(lambda pick_kb: values_b[pick_kb].mean(1), 1, 0) is None


# -- the rules ----------------------------------------------------------------------------------------------------------------


OTHERS = "substitution", "effect profile", "prediction"
KEYS = ("dense_solves", "sparse_solves", "searched", "span", "sufficient", *(key for keys in TESTS.values() for key in keys))


def report(**values: float | None) -> Report:
    """A report in which everything passes (1 where at least 1 is asked) but what is named."""
    asked = dict.fromkeys((*KEYS, "lost", "seeds", "nulls"), 1.0) | values
    measures = tuple(Measure(key, f"of {key}", value, Criterion(">=", 1.0), note="not run") for key, value in asked.items())
    return Report(measures, task_rules(measures))


def test_everything_together_is_mechanistic_support() -> None:
    assert report().verdict == "mechanistic support" and len(report().reasons) == 1
    assert null_task("one", report(), 1.0).passed


@pytest.mark.parametrize("value", [0.0, None])
@pytest.mark.parametrize(
    "key", [*TESTS["substitution"], *TESTS["effect profile"], *TESTS["prediction"], "lost", "seeds", "nulls"]
)
def test_without_one_of_the_others_it_is_representational(key: str, value: float | None) -> None:
    found = report(**{key: value})
    assert found.verdict == "representational"
    assert f"Of {key} {'is 0, not >= 1' if value == 0 else 'could not be judged (not run)'}." in found.reasons
    test = next((test for test, keys in TESTS.items() if key in keys), None)
    if test is not None:
        assert holds(found, test) is (None if value is None else False) and not null_task("one", found, 1.0).passed


@pytest.mark.parametrize("value", [0.0, None])
@pytest.mark.parametrize("key", [*TESTS["patching"], *TESTS["deletion"]])
def test_without_patching_or_deletion_it_is_behavioural(key: str, value: float | None) -> None:
    assert report(**{key: value}).verdict == "behavioural"


def test_the_sparse_model_comes_first() -> None:
    expected: dict[Verdict, Report] = {
        "refuted": report(sufficient=0.0, patching=0.0), "undecided": report(sufficient=None),
    }  # fmt: skip
    for verdict, found in expected.items():
        assert found.verdict == verdict
    for key in ("dense_solves", "sparse_solves", "searched", "span"):
        assert report(**{key: 0.0}, sufficient=0.0).verdict == "no explanation"


def test_a_null_is_not_spared_by_what_no_model_does() -> None:
    assert null_task("one", report(dense_solves=0.0, sufficient=0.0), 0.5).passed
    assert not null_task("one", report(complement=0.0), 1.0).passed


def test_mistakes_are_not_asked_where_there_are_few() -> None:
    measures = tuple(measure for measure in report().measures if measure.key != "mistakes")
    found = Report(measures, task_rules(measures))
    assert found.verdict == "mechanistic support" and holds(found, "prediction") is True
    assert holds(Report((), ()), "prediction") is None


def test_held_out_pairs_go_either_way() -> None:
    pairs = planted_pairs(7, lengths=(6, 5))
    task = Resolved("planted", "test", {"train": pairs, "validation": pairs, "test": pairs}, 7, {})
    found = held_out(task, 4)
    assert len(found) == 4 and found.last_b.diff().min() >= 0
    assert sorted(found.answer_bk[:, 0].tolist()) == [4, 4, 5, 5]
    with pytest.raises(CardError, match="no test pairs"):
        held_out(replace(task, splits={**task.splits, "test": pairs.rows(torch.arange(0))}))


def test_a_copy_of_the_dense_model_passes_what_it_can() -> None:
    coupling, said = copied(), []
    kept_f = some_nodes(coupling, 0.9)
    pairs = answered(coupling.dense, planted_pairs(12, lengths=(6, 5)))
    task = Resolved("planted", "test", {"train": pairs, "validation": pairs, "test": pairs}, 12, {})
    found = gather_task(coupling, circuit_of(coupling, kept_f), task, progress=said.append)
    assert found["profile"].passed and found["dense_ratio"].passed and found["seeds"].passed
    assert found["nulls"].value is None and "were not run" in found["nulls"].note and "stress prompts" in found["signs"].note
    assert with_nulls(found, coupling) == found and any("patching" in text for text in said)
    again = gather_task(coupling, circuit_of(coupling, kept_f), task)
    assert again == found and set(NULLS) == {"uncoupled", "bridges", "weights", "labels"}
