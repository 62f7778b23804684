"""The evidence: controls of the circuit's size, transport as it is written, a null without bias, a verdict that cannot be set."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuit import Ablations, Circuit, Question, corpus_means
from bridge.dense import DenseModel
from bridge.prune import reachable
from bridge.residual import Enter
from bridge.sparse import Location
from bridge.validate import (
    RANDOM_CIRCUITS,
    Control,
    Effect,
    Faithfulness,
    Measure,
    _correlated,
    _random_circuits,
    effect_profile,
    permuted_null,
    rank_correlation,
    validate,
)
from tests.conftest import untrained

LENGTH = 6


@pytest.fixture(scope="module")
def reference_bt() -> Tensor:
    return torch.randint(2, 40, (6, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> Coupling:
    """An untrained coupling made to agree with the dense model on the prompt, by its output bias."""
    coupling = untrained(dense)
    coupling.sparse.project(0.3)
    with torch.no_grad():
        coupling.sparse.unembedding.bias.copy_(2 * dense.run(question().tokens_t[None]).logits_btv[0, -1])
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return coupling


def question() -> Question:
    return Question(torch.randint(2, 40, (LENGTH,), generator=torch.Generator().manual_seed(6)), 4, 7)


@pytest.fixture(scope="module")
def ablations(coupled: Coupling, reference_bt: Tensor) -> Ablations:
    return Ablations(coupled.sparse, question(), corpus_means(coupled.sparse, reference_bt))


def circuit_of(ablations: Ablations, share: float) -> tuple[Circuit, Tensor]:
    """A circuit of some of the nodes that can reach the answer."""
    kept_f = torch.rand(ablations.space.size, generator=torch.Generator().manual_seed(1)) < share
    kept_f &= reachable(ablations.sparse, ablations.space)
    return Circuit(ablations.question, ablations.space.split(kept_f), ablations.means, {}), kept_f


@pytest.mark.parametrize("outside", [False, True])
def test_random_circuits_have_the_circuits_size_at_every_location(ablations: Ablations, outside: bool):
    _, kept_f = circuit_of(ablations, 0.2)
    random_cf = _random_circuits(ablations, kept_f, torch.Generator().manual_seed(0), outside=outside)
    assert random_cf.shape == (RANDOM_CIRCUITS, ablations.space.size)
    active_f = ablations.value_f != 0
    for circuit_f in random_cf:
        for like_f in (active_f, ~active_f):
            pair = (ablations.space.split(mask_f & like_f) for mask_f in (kept_f, circuit_f))
            wanted, drawn = ({at: int(mask.sum()) for at, mask in masks.items()} for masks in pair)
            assert wanted == drawn
        assert not (outside and bool((circuit_f & kept_f).any()))
    assert len({tuple(circuit_f.tolist()) for circuit_f in random_cf}) == RANDOM_CIRCUITS


def test_attention_is_compared_where_the_circuit_uses_it(coupled: Coupling, ablations: Ablations, reference_bt: Tensor):
    circuit, _ = circuit_of(ablations, 0.1)
    sparse, found = coupled.sparse, []
    values = {}
    for name, gate in (("whole", lambda _, x: x), ("circuit", circuit.gate)):

        def record(location: Location, x_btn: Tensor, name=name, gate=gate) -> Tensor:
            values[name, location] = gate(location, x_btn)
            return values[name, location]

        sparse.run(ablations.question.tokens_t[None], gate=record)
    channels = sparse.shape.head_channels
    for layer in range(2):
        q, k, v, out = (Location(layer, kind) for kind in ("q", "k", "v", "attn_out"))
        patterns = [sparse.pattern(layer, values[name, q], values[name, k])[0] for name in ("whole", "circuit")]
        for head in range(sparse.width // channels):
            for query in range(LENGTH):
                if circuit.kept[v][:, head * channels : (head + 1) * channels].any() and circuit.kept[out][query].any():
                    whole, alone = ([*each[head, query].tolist(), 1 - float(each[head, query].sum())] for each in patterns)
                    found.append(sum(abs(a - b) for a, b in zip(whole, alone, strict=True)) / 2)
    measure = validate(coupled, ablations, circuit, reference_bt).attention
    assert measure.value == pytest.approx(sum(found) / len(found), abs=1e-5) and sum(found) > 1e-3
    assert measure.control is not None and measure.control.draws == RANDOM_CIRCUITS
    nothing = Circuit(circuit.question, {at: torch.zeros_like(kept) for at, kept in circuit.kept.items()}, circuit.means, {})
    assert "no head's values" in validate(coupled, ablations, nothing, reference_bt).attention.note


def test_measures_are_their_definitions(coupled: Coupling, ablations: Ablations, reference_bt: Tensor):
    circuit, kept_f = circuit_of(ablations, 0.1)
    result = validate(coupled, ablations, circuit, reference_bt)
    tokens_1t = ablations.question.tokens_t[None]
    sparse = coupled.sparse
    deleted = Circuit(circuit.question, {at: ~kept for at, kept in circuit.kept.items()}, circuit.means, {})
    whole_v, alone_v, less_v = (
        sparse.run(tokens_1t, gate=gate).logits_btv[0, -1] for gate in (lambda _, x: x, circuit.gate, deleted.gate)
    )

    def kl(from_v: Tensor, to_v: Tensor) -> float:
        return float((from_v.softmax(-1) * (from_v.softmax(-1) / to_v.softmax(-1)).log()).sum())

    def difference(logits_v: Tensor) -> float:
        return float(logits_v[4] - logits_v[7])

    assert result.kl_kept.value == pytest.approx(kl(whole_v, alone_v), abs=1e-5)
    assert result.kl_lost.value == pytest.approx(kl(whole_v, less_v), abs=1e-5)
    assert result.share_kept.value == pytest.approx(difference(alone_v) / difference(whole_v), rel=1e-3)
    assert result.share_lost.value == pytest.approx(difference(less_v) / difference(whole_v), rel=1e-3)
    dense_v = coupled.dense.run(tokens_1t).logits_btv[0, -1]
    assert result.agreement.value == pytest.approx(kl(dense_v, whole_v), abs=1e-5)
    corpus = []
    for row_t in reference_bt:
        dense_tv, sparse_tv = coupled.dense.run(row_t[None]).logits_btv[0], sparse(row_t[None])[0]
        corpus += [kl(dense_tv[t], sparse_tv[t]) for t in range(len(row_t))]
    assert result.agreement.control is not None
    assert result.agreement.control.mean == pytest.approx(np.mean(corpus), rel=1e-3)
    assert all(measure.control is not None for measure in result.measures)


def test_the_transported_effect_is_the_computation_it_describes(coupled: Coupling, ablations: Ablations):
    _, kept_f = circuit_of(ablations, 0.1)
    node_p = kept_f.nonzero().flatten()[::9]
    effects = effect_profile(coupled, ablations, node_p, kept_f)
    assert [effect.node for effect in effects] == [str(ablations.space.node(place)) for place in node_p.tolist()]
    tokens_1t = ablations.question.tokens_t[None]
    sparse, dense = coupled.sparse, coupled.dense
    base, base_dense = sparse.run(tokens_1t), dense.run(tokens_1t)

    def difference(logits_btv: Tensor) -> float:
        return float(logits_btv[0, -1, 4] - logits_btv[0, -1, 7])

    after = {"attn_in": 1, "q": 1, "k": 1, "v": 1, "attn_out": 1, "mlp_in": 2, "mlp_act": 2, "mlp_out": 2}
    for effect, place in zip(effects, node_p.tolist(), strict=True):
        node = ablations.space.node(place)

        def gate(location: Location, x_btn: Tensor, node=node) -> Tensor:
            x_btn = x_btn.clone()
            if location == node.location:
                x_btn[0, node.position, node.index] = ablations.means[location][node.index]
            return x_btn

        less = sparse.run(tokens_1t, gate=gate)
        site = 2 * node.location.layer + after[node.location.kind]
        bridge = coupled.bridges[site]
        change_btd = bridge.decode(less.residuals[site]) - bridge.decode(base.residuals[site])
        changed = dense.run(tokens_1t, Enter.at(site, base_dense.residuals[site] + change_btd))
        assert effect.site == site
        assert effect.sparse == pytest.approx(difference(base.logits_btv) - difference(less.logits_btv), abs=1e-4)
        assert effect.dense == pytest.approx(difference(base_dense.logits_btv) - difference(changed.logits_btv), abs=1e-4)
    assert any(abs(effect.dense) > 0.01 for effect in effects)


def test_rank_correlation_is_spearmans_with_ties_and_rows():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (4, 30)).astype(float), generator.normal(size=(4, 30))
    for row in range(4):
        assert rank_correlation(x, y)[row] == pytest.approx(scipy.stats.spearmanr(x[row], y[row])[0])  # pyright: ignore[reportArgumentType]
    assert math.isnan(rank_correlation(np.zeros(5), np.arange(5.0)))


def test_the_null_of_unrelated_effects_is_centred_on_0_and_keeps_what_sites_explain():
    generator = np.random.default_rng(1)
    site_p = np.repeat(np.arange(4), 25)
    x_p, y_p = generator.normal(size=100), generator.normal(size=100)
    null = permuted_null(x_p, y_p, site_p, generator)
    assert abs(null.mean()) < 0.06
    assert null.std() == pytest.approx(1 / math.sqrt(99), rel=0.15)
    # effects that grow with the site alone correlate, and so does their null
    x_p, y_p = x_p * 0.1 + site_p, y_p * 0.1 + site_p
    null = permuted_null(x_p, y_p, site_p, generator)
    assert null.mean() > 0.8
    assert rank_correlation(x_p, y_p) == pytest.approx(null.mean(), abs=0.05)


def effects_of(sparse_p: np.ndarray, dense_p: np.ndarray, sites: int = 3) -> tuple[Effect, ...]:
    pairs = zip(sparse_p.tolist(), dense_p.tolist(), strict=True)
    return tuple(Effect(f"n{i}", i % 2 == 0, 1 + i % sites, x, y) for i, (x, y) in enumerate(pairs))


def test_the_profile_passes_for_effects_that_agree_and_not_for_others():
    generator = np.random.default_rng(2)
    x_p = generator.normal(size=60)
    measure, interval, p_value = _correlated(effects_of(x_p, x_p + 0.3 * generator.normal(size=60)), seed=0)
    assert measure.passed and interval is not None and p_value is not None
    assert interval[0] < measure.value < interval[1] and p_value < 0.01  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    measure, _, p_value = _correlated(effects_of(x_p, generator.normal(size=60)), seed=0)
    assert measure.passed is False and p_value is not None and p_value > 0.01


def test_effects_below_resolution_are_ties():
    generator = np.random.default_rng(3)
    noise_p = 1e-6 * generator.normal(size=(2, 40))
    x_p = np.where(np.arange(40) < 20, generator.normal(size=40), 0)
    measure, _, _ = _correlated(effects_of(x_p + noise_p[0], x_p + noise_p[1]), seed=0)
    assert measure.value == pytest.approx(1)
    assert "20 without any effect" in measure.note


@pytest.mark.parametrize(
    ("effects", "note"),
    [
        (effects_of(np.arange(9.0), np.arange(9.0)), "9 nodes are too few to rank"),
        (effects_of(np.arange(20.0), np.zeros(20)), "no node has an effect in the dense model"),
        (effects_of(np.full(20, 1e-6), np.arange(20.0)), "no node has an effect in the sparse model"),
        (effects_of(np.arange(20.0), np.arange(20.0), sites=20), "no two nodes are of one site"),
    ],
)
def test_a_profile_that_cannot_be_taken_has_not_passed(effects: tuple[Effect, ...], note: str):
    measure, interval, p_value = _correlated(effects, seed=0)
    assert (measure.passed, measure.value, interval, p_value) == (None, None, None, None)
    assert note in measure.note


def measured(passed: bool | None = True, note: str = "") -> Measure:
    control = Control("random", 20, 2.0, 1.0, "best")
    return Measure("KL", 0.5, control if passed is not None else None, "<= 0.1", passed, note)


def faithfulness(**changes: Measure) -> Faithfulness:
    good = measured()
    whole = Faithfulness(good, good, good, good, good, good, good, good, good, (0.1, 0.2), 0.01, ())
    return dataclasses.replace(whole, **changes)


def test_the_verdict_follows_from_the_measures():
    assert faithfulness().verdict == "behavioural"
    assert "rank as in the sparse one" in faithfulness().reasons[-1]
    only_sparse = faithfulness(profile=measured(False))
    assert only_sparse.verdict == "behavioural"
    assert "evidence about the sparse model only" in only_sparse.reasons[-1]
    unknown = faithfulness(profile=measured(None, "too few"))
    assert "not known: too few" in unknown.reasons[-1]
    for name in ("kl_kept", "share_kept", "company_mean", "company_worst", "kl_lost"):
        refuted = faithfulness(**{name: measured(False)})
        assert refuted.verdict == "refuted" and "KL is 0.5, not <= 0.1." in refuted.reasons
        assert faithfulness(**{name: measured(None, "no control")}).verdict == "undecided"
    assert faithfulness(kl_kept=measured(False), kl_lost=measured(None)).verdict == "refuted"
    assert faithfulness(share_lost=measured(False)).verdict == "behavioural"
    apart = faithfulness(agreement=measured(False, "The sparse model gives another answer than the dense one"))
    assert apart.verdict == "no explanation"
    assert apart.reasons == (
        "The sparse model gives another answer than the dense one, so nothing found in the sparse model explains the dense one "
        "here.",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        apart.verdict = "behavioural"  # type: ignore[misc]


def test_a_measure_without_its_control_cannot_pass():
    for passed in (True, False):
        with pytest.raises(ValueError, match="cannot be judged without a value and its control"):
            Measure("KL", 0.01, None, "<= 0.1", passed)


def test_models_that_disagree_are_told_apart(coupled: Coupling, ablations: Ablations, reference_bt: Tensor):
    circuit, _ = circuit_of(ablations, 0.1)
    assert validate(coupled, ablations, circuit, reference_bt).agreement.passed
    tokens_t = torch.tensor([3, 9, 9, 30, 2, 5])
    other = Ablations(coupled.sparse, Question(tokens_t, 4, 7), ablations.means)
    dense_v, sparse_v = coupled.dense.run(tokens_t[None]).logits_btv[0, -1], other.logits_v
    assert int(dense_v.argmax()) != int(sparse_v.argmax())
    result = validate(coupled, other, dataclasses.replace(circuit, explains=other.question), reference_bt)
    assert result.agreement.passed is False and result.verdict == "no explanation"


def test_an_empty_circuit_has_no_control_and_everything_has_none_to_delete(
    coupled: Coupling, ablations: Ablations, reference_bt: Tensor
):
    for value in (False, True):
        kept = {at: torch.full_like(kept, value) for at, kept in circuit_of(ablations, 0.1)[0].kept.items()}
        result = validate(coupled, ablations, Circuit(ablations.question, kept, ablations.means, {}), reference_bt)
        missing = (result.kl_kept, result.kl_lost) if not value else (result.kl_lost,)
        for measure in missing:
            assert (
                measure.control is None
                and measure.passed is None
                and ("no other nodes" in measure.note or "too few" in measure.note)
            )
        assert result.verdict != "behavioural"


def test_the_same_seed_gives_the_same_evidence(coupled: Coupling, ablations: Ablations, reference_bt: Tensor):
    circuit, _ = circuit_of(ablations, 0.1)
    assert validate(coupled, ablations, circuit, reference_bt) == validate(coupled, ablations, circuit, reference_bt)
    assert validate(coupled, ablations, circuit, reference_bt, seed=1) != validate(coupled, ablations, circuit, reference_bt)
