"""Evidence on a prompt: controls, sufficiency, deletion, effects and patching, each held to a literal run of both models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed, error_means, follow_dense
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel, integrated_gradients
from bridge.circuits.necessity import backup_nodes
from bridge.circuits.question import Question
from bridge.circuits.search import NestedMasks
from bridge.evidence.carry import Transporter
from bridge.evidence.controls import circuits_of_other_prompts, matched_nodes
from bridge.evidence.deletion import Deletion, delete_circuits, delete_groups
from bridge.evidence.effects import Effect, effect_profile, permuted_null, profile_measure, profile_nodes, rank_correlation
from bridge.evidence.measures import Criterion
from bridge.evidence.patching import Counterfactual, counterfactual_effect, dense_losses, mean_share, patch_circuits
from bridge.evidence.sufficiency import adversarial_faithfulness, first_node_names, measure_nested, superset_draws
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import corpus_means
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.models.schema import ERROR
from bridge.models.sparse import Location
from tests.conftest import CONTEXT, VOCABULARY, untrained

LENGTH = 6


@dataclass(frozen=True, eq=False)
class Case:
    """A coupling, a prompt that was followed, and a circuit of some nodes and two errors."""

    coupling: CoupledModels
    tokens_t: Tensor
    followed: Followed
    loss: CircuitLoss
    kept_f: Tensor

    @property
    def masked(self) -> MaskedModel:
        return self.loss.masked

    def sparse_run(self, kept_f: Tensor, values: dict[Location, Tensor] | None = None, enter: Enter | None = None):
        """The sparse model with every node and error placed by hand, nothing narrowed and nothing batched."""
        parts, means = self.masked.space.split(kept_f), self.masked.means
        values = values or {}

        def gate(at: Location, x_1tn: Tensor) -> Tensor:
            x_1tn = values.get(at, x_1tn)
            return torch.stack([torch.where(k_n, x_n, means[at]) for k_n, x_n in zip(parts[at], x_1tn[0], strict=True)])[None]

        def correct(at: Location, x_1ts: Tensor) -> Tensor:
            errors_bts = self.followed.errors[at]
            if at.layer == self.coupling.n_sites:
                return x_1ts + (errors_bts if bool(parts[at][-1]) else means[at])
            return x_1ts + torch.stack([e if k else means[at] for e, k in zip(errors_bts[0], parts[at], strict=True)])

        return self.coupling.sparse.run(self.tokens_t[None], enter, gate, correct=correct)

    def d(self, logits_v: Tensor) -> float:
        """Log-odds of the answer, literally."""
        probability = logits_v.double().softmax(-1)[self.loss.masked.question.answer]
        return float((probability / (1 - probability)).log())

    def lost(self, site: int, change_ts: Tensor) -> float:
        """Share of the span that the dense model loses where its residual at a site is changed by the decoder's difference."""
        bridge, h_1td = self.coupling.bridges[site], self.followed.dense.residuals[site]
        zero_ts = torch.zeros_like(change_ts)
        changed_1td = h_1td + bridge.decode(change_ts) - bridge.decode(zero_ts)
        logits_v = self.coupling.dense.run(self.tokens_t[None], Enter.at(site, changed_1td)).logits_btv[0, -1]
        return (self.d(self.followed.dense_bv[0]) - self.d(logits_v)) / self.loss.span


@pytest.fixture(scope="module")
def case(dense: DenseModel) -> Case:
    torch.manual_seed(3)
    coupling = untrained(dense)
    coupling.sparse.project(0.3)
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    reference_bt = torch.randint(2, VOCABULARY, (6, CONTEXT), generator=torch.Generator().manual_seed(5))
    coupling = CoupledModels(coupling.dense, coupling.sparse, coupling.bridges, coupling.recipe, reference_bt)
    tokens_t = torch.randint(2, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(6))
    followed = follow_dense(coupling, tokens_t[None], torch.tensor([LENGTH - 1]))
    means = {**corpus_means(coupling.sparse, reference_bt), **error_means(coupling, reference_bt)}
    question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()))
    loss = CircuitLoss(MaskedModel(coupling.sparse, question, means, followed.errors), followed.dense_bv, SearchConfig())
    kept_f = torch.rand(loss.masked.space.size, generator=torch.Generator().manual_seed(7)) < 0.2
    error_k = loss.masked.is_error_f.nonzero().flatten()
    kept_f[error_k] = False
    kept_f[error_k[[LENGTH + 2, len(error_k) - 1]]] = True
    return Case(coupling, tokens_t, followed, loss, kept_f)


@pytest.fixture(scope="module")
def transporter(case: Case) -> Transporter:
    return Transporter(case.coupling, case.loss, case.followed.dense, case.kept_f)


def assert_close(value: float, expected: float) -> None:
    assert value == pytest.approx(expected, abs=2e-4)


# -- carried changes and deletion -------------------------------------------------------------------------------------------


def test_deletion_is_the_literal_one_at_every_site(case: Case, transporter: Transporter) -> None:
    (found,) = delete_circuits(transporter, case.kept_f[None])
    whole = case.sparse_run(transporter.reference_f)
    without = case.sparse_run(transporter.reference_f & ~case.kept_f)
    d_whole = case.d(whole.logits_btv[0, -1])
    assert_close(found.lost, (d_whole - case.d(without.logits_btv[0, -1])) / case.loss.span)
    for site in range(case.coupling.n_sites):
        change_ts = without.residuals[site][0] - whole.residuals[site][0]
        assert_close(found.dense_j[site], case.lost(site, change_ts))
        entered = case.sparse_run(transporter.reference_f, enter=Enter.at(site, whole.residuals[site] + change_ts))
        assert_close(found.sparse_j[site], (d_whole - case.d(entered.logits_btv[0, -1])) / case.loss.span)
    assert max(map(abs, found.dense_j)) > 1e-2


def test_a_deletion_that_deletes_nothing_loses_nothing(case: Case, transporter: Transporter) -> None:
    (found,) = delete_circuits(transporter, torch.zeros_like(case.kept_f)[None])
    assert found.lost == 0
    assert max(map(abs, (*found.dense_j, *found.sparse_j))) < 1e-4
    assert found.ratio(1 / 3) is None


def test_the_ratio_is_the_least_behind_the_nodes() -> None:
    dense_jb, sparse_jb = (np.array([lost_j]).T for lost_j in ((0.0, 0.1, 0.6, 0.2), (0.0, 0.2, 0.8, 0.4)))
    found = Deletion(np.array([0.9]), dense_jb, sparse_jb)
    assert found.sites_after_circuit(1 / 3) == (2, 3)
    assert found.ratio(1 / 3) == pytest.approx(0.5) and found.ratio_interval(1 / 3, 0) is None
    assert found.best == 0.6


def test_a_group_is_deleted_in_nats_behind_its_last_node(case: Case, transporter: Transporter) -> None:
    space = case.masked.space
    places = [
        place for place in case.kept_f.nonzero().flatten().tolist() if space.node(place).location == Location(0, "attn_out")
    ]
    group_f = torch.zeros_like(case.kept_f)
    group_f[places] = True
    (lost,) = delete_groups(transporter, [group_f])
    whole, without = case.sparse_run(transporter.reference_f), case.sparse_run(transporter.reference_f & ~group_f)
    drop = case.masked.question.difference(whole.logits_btv[:, -1]) - case.masked.question.difference(without.logits_btv[:, -1])
    assert_close(lost.sparse, float(drop))
    assert_close(lost.dense / case.loss.span, case.lost(1, without.residuals[1][0] - whole.residuals[1][0]))


# -- controls ---------------------------------------------------------------------------------------------------------------


def test_matched_nodes_are_active_others_of_the_same_places(case: Case) -> None:
    masked, space = case.masked, case.masked.space
    active_f = masked.active_f
    values = masked.node_values(torch.ones_like(case.kept_f), torch.arange(1))
    for at, active_tn in space.split(active_f).items():
        expected_tn = torch.zeros_like(active_tn) if at.kind == ERROR else values[at][0] != 0
        assert torch.equal(active_tn, expected_tn)
    drawn_cf = matched_nodes(masked, case.kept_f, 3, torch.Generator().manual_seed(0))
    assert not bool((drawn_cf & case.kept_f).any())
    assert not bool((drawn_cf & ~active_f).any())
    pool = space.split(active_f & ~case.kept_f)
    for drawn_f in drawn_cf:
        for at, drawn_tn in space.split(drawn_f).items():
            if at.kind != ERROR:
                wanted_t = torch.minimum(space.split(case.kept_f)[at].sum(-1), pool[at].sum(-1))
                assert torch.equal(drawn_tn.sum(-1), wanted_t)
    assert not torch.equal(drawn_cf[0], drawn_cf[1])


def test_another_prompts_circuit_has_as_many_nodes_and_no_errors(case: Case) -> None:
    other_cf = circuits_of_other_prompts(case.coupling, case.masked, case.kept_f, 2, torch.Generator().manual_seed(0))
    count = int((case.kept_f & ~case.masked.is_error_f).sum())
    assert other_cf.sum(1).tolist() == [count, count]
    assert not bool((other_cf & case.masked.is_error_f).any())
    without = CoupledModels(case.coupling.dense, case.coupling.sparse, case.coupling.bridges, case.coupling.recipe)
    assert len(circuits_of_other_prompts(without, case.masked, case.kept_f, 2, torch.Generator())) == 0


def test_integrated_gradients_add_up_to_the_difference_along_the_path(case: Case) -> None:
    over_f, loss = torch.ones_like(case.kept_f), case.loss
    score_f = integrated_gradients(case.masked, lambda mask_rf: loss.gradient(mask_rf, loss.fraction_left), over_f, 1)
    low, high = (float(loss.fraction_left(case.masked.logits((mix * over_f)[None]))) for mix in (0.498, 0.502))
    assert float(score_f.sum()) == pytest.approx((high - low) / 0.004, rel=0.02)
    half_f = torch.rand(len(over_f), generator=torch.Generator().manual_seed(1)) < 0.5
    half = integrated_gradients(case.masked, lambda mask_rf: loss.gradient(mask_rf, loss.fraction_left), half_f, 2)
    assert not bool(half[~half_f].any())


# -- nested circuits in the sparse model ------------------------------------------------------------------------------------


def nested_of(case: Case) -> NestedMasks:
    levels = case.loss.config.nested()
    draw_f = torch.rand(len(case.kept_f), generator=torch.Generator().manual_seed(11))
    level_f = torch.where(case.kept_f, 1, (2 + 4 * draw_f).long().clamp(max=len(levels)))
    return NestedMasks(levels, level_f, (0.9, 0.9, 1.1, 0.5, 0.5))


def test_nested_circuits_are_measured_as_they_are_defined(case: Case) -> None:
    nested, loss = nested_of(case), case.loss
    measured = measure_nested(loss, nested, seed=4)
    nothing = case.d(case.sparse_run(torch.zeros_like(case.kept_f)).logits_btv[0, -1])
    model = case.d(case.followed.dense_bv[0])

    def d(kept_f: Tensor) -> float:
        return case.d(case.sparse_run(kept_f).logits_btv[0, -1])

    for place in (0, 1, 2):
        circuit, kept_f = measured[place], nested.kept(place)
        error_f = kept_f & case.masked.is_error_f
        assert circuit.nodes + circuit.errors == int(kept_f.sum()) and circuit.errors == int(error_f.sum())
        assert_close(circuit.faithfulness, 1 - abs(d(kept_f) - model) / abs(model - nothing))
        assert_close(circuit.left, (d(~kept_f & loss.nodes_f) - nothing) / (model - nothing))
        share = (d(kept_f) - d(kept_f & ~error_f) + d(error_f) - nothing) / (2 * (model - nothing))
        assert_close(circuit.error_share, share)
        draws = superset_draws(loss, 20, 4 + place)
        assert not bool((draws & case.masked.is_error_f).any())
        off = [(d(kept_f | draw_f) - model) / (model - nothing) for draw_f in draws]
        assert_close(circuit.supersets_worst, 1 - max(map(abs, off)))
        assert_close(circuit.supersets_rms, float(np.sqrt(np.mean(np.square(off)))))
        assert circuit.within is (place != 2)
    assert all(circuit.adversary is None for circuit in measured)  # it is sent to the one that is drawn, when that is known
    assert measured[4].asked is None


def test_the_adversary_does_worse_than_its_start_and_its_draws(case: Case) -> None:
    (lowest,) = adversarial_faithfulness(case.loss, case.kept_f[None]).tolist()
    half_f = torch.where(case.loss.complement(case.kept_f), 0.5, case.kept_f.float())
    start = 1 - abs(float(case.loss.miss(case.masked.logits(half_f[None]))))
    draws = 1 - case.loss.miss(case.masked.logits(case.kept_f | superset_draws(case.loss, 20, 0))).abs()
    assert lowest < start and lowest < float(draws.min())


def test_a_backup_is_enough_and_no_larger_than_it_must_be(case: Case) -> None:
    none_f = torch.zeros_like(case.kept_f)
    node_k = backup_nodes(case.loss, none_f)
    whole_f = case.loss.complement(none_f)

    def left(count: int) -> float:
        return float(case.loss.fraction_left(case.masked.logits(whole_f.index_fill(0, node_k[:count], False)[None])))

    if left(0) <= case.loss.config.left:
        assert not len(node_k)
    else:
        assert len(node_k) and len(first_node_names(case.masked, node_k)) == min(5, len(node_k))
        assert left(len(node_k)) <= case.loss.config.left or len(node_k) == int(case.masked.active_f.sum())
        assert left(0) > case.loss.config.left
    assert not len(backup_nodes(case.loss, torch.ones_like(none_f)))


# -- effects ----------------------------------------------------------------------------------------------------------------


def test_effects_are_those_of_one_node_ablated_in_both_models(case: Case, transporter: Transporter) -> None:
    node_p = profile_nodes(transporter, case.kept_f, 8, torch.Generator().manual_seed(0))
    assert int(case.kept_f[node_p].sum()) == 4 and not bool(case.masked.is_error_f[node_p].any())
    whole = case.sparse_run(transporter.reference_f)
    for place, effect in zip(node_p.tolist(), effect_profile(transporter, case.kept_f, node_p), strict=True):
        alone_f = transporter.reference_f.clone()
        alone_f[place] = False
        without = case.sparse_run(alone_f)
        d = case.d(whole.logits_btv[0, -1]) - case.d(without.logits_btv[0, -1])
        assert effect.node == str(case.masked.space.node(place)) and effect.inside == bool(case.kept_f[place])
        assert_close(effect.sparse, d / case.loss.span)
        assert_close(effect.dense, case.lost(effect.site, without.residuals[effect.site][0] - whole.residuals[effect.site][0]))


def test_ranks_correlate_as_scipy_says() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 30).astype(float), generator.normal(size=30)
    expected = scipy.stats.spearmanr(x, y)
    assert float(rank_correlation(x, y)) == pytest.approx(float(expected.statistic))  # pyright: ignore[reportAttributeAccessIssue]


def test_a_profile_that_only_sites_explain_is_no_better_than_its_null() -> None:
    generator = np.random.default_rng(1)
    site_p = np.repeat([1, 2, 3], 20)
    sparse_p, dense_p = site_p + 0.1 * generator.normal(size=60), site_p + 0.1 * generator.normal(size=60)
    null = permuted_null(sparse_p, dense_p, site_p, generator)
    assert float(np.quantile(null, 0.95)) > 0.8  # the sites alone
    alike = tuple(Effect(str(p), p < 30, int(site_p[p]), float(sparse_p[p]), float(2 * sparse_p[p])) for p in range(60))
    measure = profile_measure(alike, Criterion(">=", 0.6, True), 0)
    assert measure.value == pytest.approx(1) and measure.passed and float(measure.note.partition("; p ")[2]) < 0.01
    measure = profile_measure(alike[:5], Criterion(">=", 0.6, True), 0)
    assert measure.passed is None and "; p " not in measure.note and "too few" in measure.note


# -- patching ---------------------------------------------------------------------------------------------------------------


def other_prompt(case: Case) -> Counterfactual:
    tokens_t = torch.randint(2, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(16))
    return Counterfactual(tokens_t[None], follow_dense(case.coupling, tokens_t[None], torch.tensor([LENGTH - 1])))


def test_patching_takes_the_circuits_values_from_the_counterfactual(case: Case, transporter: Transporter) -> None:
    there = other_prompt(case)
    moved_j = dense_losses(transporter, patch_circuits(transporter, there, case.kept_f[None]))[0, :, 0].tolist()
    other = Case(case.coupling, there.prompt_bt[0], there.followed, case.loss, case.kept_f)
    parts, reference, space = case.masked.space.split(case.kept_f), transporter.reference_f, case.masked.space
    values: dict[Location, Tensor] = {}
    kept, means = space.split(reference), case.masked.means

    def errors(of: Case, at: Location) -> Tensor:
        return torch.where(kept[at][-of.followed.errors[at].shape[1] :], of.followed.errors[at][0], means[at])

    def record(at: Location, x_1tn: Tensor) -> Tensor:
        values[at] = x_1tn
        return x_1tn

    case.coupling.sparse.run(there.prompt_bt, gate=record, correct=lambda at, x: x + errors(other, at)[-x.shape[1] :])

    def gate(at: Location, x_1tn: Tensor) -> Tensor:
        return torch.where(parts[at], values[at], x_1tn)

    def correct(at: Location, x_1ts: Tensor) -> Tensor:
        taken = torch.where(parts[at][-errors(case, at).shape[0] :], errors(other, at), errors(case, at))
        return x_1ts + taken

    changed = case.coupling.sparse.run(case.tokens_t[None], gate=gate, correct=correct)
    plain = case.sparse_run(reference)
    for site in range(case.coupling.n_sites):
        assert_close(moved_j[site], case.lost(site, changed.residuals[site][0] - plain.residuals[site][0]))


def test_patching_with_the_prompt_itself_moves_nothing(case: Case, transporter: Transporter) -> None:
    same = Counterfactual(case.tokens_t[None], case.followed)
    assert float(dense_losses(transporter, patch_circuits(transporter, same, case.kept_f[None])).abs().max()) < 1e-4
    assert float(counterfactual_effect(transporter, same)) == pytest.approx(0, abs=1e-4)
    there = other_prompt(case)
    expected = case.d(case.followed.dense_bv[0]) - case.d(there.followed.dense_bv[0])
    assert float(counterfactual_effect(transporter, there)) == pytest.approx(expected, abs=1e-3)
    assert mean_share(transporter, torch.tensor([[9.0], [1.0], [2.0]]), torch.tensor([case.loss.span])) == pytest.approx(1.5)


def test_a_counterfactual_of_another_length_is_refused(case: Case, transporter: Transporter) -> None:
    with pytest.raises(ValueError, match="5 tokens and the prompt 6"):
        patch_circuits(transporter, Counterfactual(case.tokens_t[None, 1:], case.followed), case.kept_f[None])
