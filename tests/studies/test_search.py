"""A task's circuit from the gate to the evidence, on a model of which it is known; and nulls, which fail on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, planted_pairs, planted_sparse, untrained

from bridge.circuits.task_search import NoCircuitError, SearchError, held_out_prompts
from bridge.data.task_tokens import Resolved, TokenPairs
from bridge.models.circuit import ablation_gate
from bridge.models.dense import DenseModel
from bridge.models.sparse import Location
from bridge.studies import search
from bridge.studies.result import Null
from bridge.studies.search import Explains, Subjects, UnsolvedError, exchange_answers, random_labels, search_task
from bridge.verdicts.null_couplings import permuted_weights

BUDGET = 0.2


def task(**splits: TokenPairs) -> Resolved:
    pairs = {"train": planted_pairs(32), "validation": planted_pairs(12, seed=1), "test": planted_pairs(12, seed=2), **splits}
    return Resolved("planted", "toy", pairs, 80, {"ambiguous": 20})  # pyright: ignore[reportArgumentType]


def subjects(dense: DenseModel) -> Subjects:
    corpus_bt = torch.randint(2, VOCABULARY, (12, CONTEXT), generator=torch.Generator().manual_seed(5))
    coupling = replace(untrained(dense), sparse=planted_sparse(dense, decoys=20), reference_bt=corpus_bt)
    return Subjects.of(coupling)


def test_a_planted_circuit_is_found_and_passes(dense: DenseModel) -> None:
    said: list[str] = []
    result = search_task(
        subjects(dense), task(), explains="sparse", seeds=2, budget=BUDGET, progress=lambda phase: said.append(str(phase))
    )
    facts = result.facts
    assert {node.name for node in result.circuit.nodes} == {
        "L0.mlp_in[0]", "L0.mlp_in[1]", "L0.mlp_act[0]", "L0.mlp_act[1]", "L0.mlp_out[2]", "L0.mlp_out[3]"
    }  # fmt: skip
    assert result.report.verdict == "behavioural" and result.passed
    assert (facts.task, facts.drop_rate, facts.null, facts.explains) == ("planted", 0.25, None, "sparse")
    assert facts.size.nodes == 6 and facts.size.edges == 4 and facts.entries == {"embedding": 2, "unembedding": 4, "bigram": 4}
    assert result.report["stable"].value == 1 and [run.nodes for run in facts.runs] == [6, 6]
    assert [level.circuit.asked for level in facts.levels] == [0.8, 0.9, 0.95, 0.99] and facts.opening == 1
    inclusion = torch.cat([share_n for share_n in result.inclusion.values()])
    assert set(inclusion.tolist()) == {0.0, 1.0} and int(inclusion.sum()) == 6
    assert facts.dense is None and "nothing to explain" in facts.why_not_dense  # a random model, which does not do the task
    for phase in ("gate", "seed 0: F 0.9: descent", "seed 1: ", "edges", "evidence"):
        assert any(phase in text for text in said), phase


def test_one_level_alone_has_the_circuit_of_the_nested_ones(dense: DenseModel) -> None:
    alone, among = (
        search_task(subjects(dense), task(), explains="sparse", dense=False, nested=nested, budget=BUDGET)
        for nested in (False, True)
    )
    assert [level.circuit.asked for level in alone.facts.levels] == [0.9] and alone.facts.opening == 0
    assert alone.circuit.nodes == among.circuit.nodes and alone.report.verdict == among.report.verdict


def test_the_dense_models_answers_are_explained_and_its_own_circuit_found(
    dense: DenseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are those that a random model prefers after one last token rather than the other."""
    pairs = planted_pairs(64)
    after = [pairs.logits_at_last(dense.run(tokens_bt).logits_btv) for tokens_bt in (pairs.prompt_bt, pairs.counterfactual_bt)]
    preferred_v = (after[0] - after[1]).mean(0)
    answer, wrong = int(preferred_v.argmax()), int(preferred_v.argmin())
    splits = {
        name: replace(some, answer_bk=torch.full_like(some.answer_bk, answer), wrong_bk=torch.full_like(some.wrong_bk, wrong))
        for name, some in task().splits.items()
    }
    of, resolved = subjects(dense), replace(task(), splits=splits)
    monkeypatch.setattr(search, "TASK_SEARCH", replace(search.TASK_SEARCH, least_span=0.3))  # of a random model
    facts = search_task(of, resolved, gated=False, budget=BUDGET, level=0.8).facts
    assert facts.search.opens_at == 0.8 and facts.opening == 0 and facts.explains == "dense"
    assert facts.dense is not None and facts.dense_whole is not None and 0 < facts.dense.edges <= facts.dense_whole.edges
    # the planted model does something else, so that errors are let in
    assert facts.errors and all(name.startswith("error[") for name in facts.errors)
    assert facts.opened.circuit.errors == len(facts.errors)


def test_an_edge_adds_to_the_answer_what_a_little_more_of_it_does(dense: DenseModel) -> None:
    """Literally: a write is given a little more of what one neuron adds to it beyond its mean, all else being the circuit."""
    of, resolved = subjects(dense), task()
    result = search_task(of, resolved, explains="sparse", budget=BUDGET, dense=False)
    edges, sparse, means, pairs = result.circuit.edges, of.sparse.sparse, of.sparse.means, held_out_prompts(resolved)
    assert edges is not None and len(edges) == 4 and {edge.weight for edge in edges} == {2.0}
    for edge in (edge for edge in edges if edge.target.location.kind == "mlp_out"):
        d: list[float] = []
        for more in (-1e-3, 1e-3):
            kept = ablation_gate(result.circuit.kept, result.circuit.means)
            change: list[torch.Tensor] = []

            def gate(at: Location, x_btn: torch.Tensor, edge=edge, more=more, kept=kept, change=change) -> torch.Tensor:
                y_btn = kept(at, x_btn)
                if at == edge.source.location:
                    change.append(y_btn[..., edge.source.index] - means[at][edge.source.index])
                if at == edge.target.location:
                    y_btn = y_btn.clone()
                    y_btn[..., edge.target.index] += more * edge.weight * change[0] * (y_btn[..., edge.target.index] != 0)
                return y_btn

            d.append(
                float(pairs.difference(pairs.logits_at_last(sparse.run(pairs.prompt_bt, gate=gate).logits_btv)).double().mean())
            )
        assert edge.effect == pytest.approx((d[1] - d[0]) / 2e-3, rel=0.05) and edge.effect > 0.1


@pytest.mark.parametrize("null", ["labels", "weights", "shuffled"])
@pytest.mark.parametrize("explains", ["sparse", "dense"])
def test_nulls_fail(dense: DenseModel, null: Null, explains: Explains) -> None:
    try:
        result = search_task(subjects(dense), task(), null=null, explains=explains, dense=False, budget=BUDGET / 2)
    except NoCircuitError as error:
        assert "nothing to explain" in str(error)
    else:
        assert result.facts.null == null and not result.passed
        assert "fails, as it must" in str(result)


def test_what_the_sparse_model_does_not_do_has_no_circuit(dense: DenseModel) -> None:
    coupling = replace(untrained(dense), reference_bt=torch.randint(2, VOCABULARY, (4, CONTEXT)))
    with pytest.raises(
        UnsolvedError, match=r"answers \d.*% of planted right .*less than the 90% that .* take another task"
    ) as caught:
        search_task(Subjects.of(coupling), task())
    assert "\n" not in str(caught.value)
    with pytest.raises(SearchError, match="no reference text"):
        Subjects.of(replace(coupling, reference_bt=None))


def test_a_split_without_pairs_is_an_error_and_validation_is_made_up_for(dense: DenseModel) -> None:
    nothing = planted_pairs(2).rows(torch.zeros(0, dtype=torch.long))
    with pytest.raises(SearchError, match="the task planted has no test pairs"):
        search_task(subjects(dense), task(test=nothing))
    result = search_task(subjects(dense), task(validation=nothing), explains="sparse", dense=False, budget=BUDGET / 2)
    assert result.facts.dense is None and "not asked for" in str(result)


def test_labels_are_replaced_everywhere_alike_and_names_dealt_out_anew() -> None:
    pairs = planted_pairs(40)
    labels = random_labels(pairs, VOCABULARY, 0)
    assert len(set(labels.answer_bk.flatten().tolist())) == 1 and len(set(labels.wrong_bk.flatten().tolist())) == 1
    assert {int(labels.answer_bk[0]), int(labels.wrong_bk[0])} != {4, 5}
    dealt = exchange_answers(pairs, 0)
    right = (dealt.answer_bk == 4).flatten()
    assert int(right.sum()) == 20 and torch.equal(dealt.wrong_bk.flatten(), torch.where(right, 5, 4))
    assert torch.equal(dealt.prompt_bt, pairs.prompt_bt)


def test_permuted_weights_are_the_same_weights_elsewhere(dense: DenseModel) -> None:
    sparse = planted_sparse(dense)
    other = permuted_weights(sparse, 0)
    for (name, one), two in zip(sparse.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.flatten().sort().values, two.flatten().sort().values), name
    assert not torch.equal(sparse.embedding, other.embedding)
