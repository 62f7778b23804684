"""A task's circuit from the gate to the evidence, on a model of which it is known; and nulls, which fail on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, planted_pairs, planted_sparse, untrained

from bridge.circuits import search
from bridge.circuits.masks import Aim, FoundNodes, MaskError
from bridge.studies.search import Subjects, UnsolvedError, dealt_anew, permuted_weights, random_labels, search_task
from bridge.circuits.subject import Subject
from bridge.dense import DenseModel
from bridge.meanwhile import meanwhile
from bridge.tasks.tokens import Resolved, TokenPairs

WORK = 3e9


def task(**splits: TokenPairs) -> Resolved:
    pairs = {"train": planted_pairs(32), "validation": planted_pairs(12, seed=1), "test": planted_pairs(12, seed=2), **splits}
    return Resolved("planted", "toy", pairs, 80, {"ambiguous": 20})  # pyright: ignore[reportArgumentType]


def subjects(dense: DenseModel) -> Subjects:
    corpus_bt = torch.randint(2, VOCABULARY, (12, CONTEXT), generator=torch.Generator().manual_seed(5))
    coupling = replace(untrained(dense), sparse=planted_sparse(dense, decoys=20), reference_bt=corpus_bt)
    return Subjects.of(coupling)


def test_a_planted_circuit_is_found_and_passes(dense: DenseModel) -> None:
    said: list[str] = []
    result = search_task(subjects(dense), task(), Aim(target=0.02), seeds=2, work=WORK, progress=said.append)
    assert {node.name for node in result.circuit.nodes} == {
        "L0.mlp_in[0]", "L0.mlp_in[1]", "L0.mlp_act[0]", "L0.mlp_act[1]", "L0.mlp_out[2]", "L0.mlp_out[3]"
    }  # fmt: skip
    assert result.circuit.edges is not None and len(result.circuit.edges) == 4
    assert result.faithfulness.verdict == "behavioural" and result.passed
    facts = result.facts
    assert (facts.task, facts.drop_rate, facts.null) == ("planted", 0.25, None) and len(facts.runs) == 2
    assert facts.size.nodes == 6 and facts.size.edges == 4 and facts.loss <= 0.02
    assert facts.entries == {"embedding": 2, "unembedding": 4, "bigram": 4}
    inclusion = torch.cat([share_n for share_n in result.inclusion.values()])
    assert set(inclusion.tolist()) <= {0.0, 0.5, 1.0} and float(inclusion.max()) == 1
    # the dense model, pruned in the same run to the same bound; its edges are all weights between kept nodes
    assert facts.dense is not None and facts.dense_whole is not None and facts.dense_loss is not None
    assert facts.dense_loss <= 0.02 and 0 < facts.dense.edges <= facts.dense_whole.edges
    for phase in ("gate", "candidates", "masks: step", "threshold", "consensus", "edges", "judging"):
        assert any(phase in text for text in said), phase


def test_edges_that_no_lesson_needs_stay_where_the_validation_split_needs_them(dense: DenseModel) -> None:
    pairs = planted_pairs(32)
    one_sided = replace(pairs, counterfactual_bt=pairs.prompt_bt)  # only token 2, which one of the two neurons reads
    few = search_task(subjects(dense), task(train=one_sided, validation=one_sided), Aim(target=0.02), work=WORK, dense=False)
    all_four = search_task(subjects(dense), task(train=one_sided), Aim(target=0.02), work=WORK, dense=False)
    assert few.facts.size.edges < 4 and all_four.facts.size.edges == 4


@pytest.mark.parametrize("seeds", [1, 2])
def test_nodes_that_miss_the_bound_where_edges_are_held_to_it_get_what_they_lack(
    dense: DenseModel, seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neuron is taken from what was found; without it no edge could go, and the circuit would be above the bound."""
    of = subjects(dense)
    place = int(of.sparse.space.join({at: torch.arange(n)[None] == (1 if str(at) == "0.mlp_act" else -1)
                                      for at, n in of.sparse.space.sizes.items()}).nonzero())  # fmt: skip
    whole = search.find_nodes

    def short_of_one(*args: Any, **options: Any) -> FoundNodes:
        found = whole(*args, **options)
        return replace(found, kept_f=found.kept_f.index_fill(0, torch.tensor([place]), False))

    monkeypatch.setattr(search, "find_nodes", short_of_one)
    monkeypatch.setattr(search, "_consensus", lambda subject, held, aim, found, work, say: found[0].kept_f)
    said: list[str] = []
    result = search_task(of, task(), Aim(target=0.02), seeds=seeds, work=WORK, dense=False, progress=said.append)
    assert result.facts.loss <= 0.02 and len(result.circuit.edges or ()) == 4
    assert "L0.mlp_act[1]" in {node.name for node in result.circuit.nodes}
    assert any("with what other templates need" in text for text in said)


def test_seeds_that_share_too_little_leave_the_smallest_ones_circuit(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three have voted for what does nothing here: to do the task by their votes takes their nodes and its own."""
    of = subjects(dense)
    whole = search.find_nodes

    def with_others(*args: Any, seed: int, **options: Any) -> FoundNodes:
        found = whole(*args, seed=seed, **options)
        idle_k = (~found.kept_f).nonzero().flatten()[:40]
        idle_f = torch.zeros_like(found.kept_f).index_fill(0, idle_k, True)
        return found if seed == 1 else replace(found, kept_f=idle_f, tau_f=torch.where(idle_f, 0.9, -0.9))

    monkeypatch.setattr(search, "find_nodes", with_others)
    monkeypatch.setattr(search, "deleted", lambda goal, kept_f, say, given_up: (kept_f, False))
    said: list[str] = []
    result = search_task(of, task(), Aim(target=0.02), seeds=3, work=WORK, dense=False, progress=said.append)
    assert any("consensus: 46 nodes of 3 seeds" in text for text in said)
    assert len(result.circuit.nodes) == 6 and [run.nodes for run in result.facts.runs] == [40, 6, 40]


def test_work_that_goes_on_meanwhile_says_how_far_it_is_when_waited_for_and_ends_with_the_caller() -> None:
    said: list[str] = []
    begun, ended, threads = threading.Event(), threading.Event(), set[str]()

    def work(tell: Callable[[str], None]) -> int:
        tell("begun")
        begun.set()
        ended.wait(0.5)
        return 3

    def say(text: str) -> None:
        said.append(text)
        threads.add(threading.current_thread().name)

    with meanwhile(work, say) as result:
        assert begun.wait(10) and not said
        assert result() == 3 and said == ["begun"] and threads == {threading.current_thread().name}

    steps = 0

    def endless(tell: Callable[[str], None]) -> None:
        nonlocal steps
        while True:
            steps += 1
            tell("another step")
            ended.wait(0.01)

    with pytest.raises(MaskError, match="none"), meanwhile(endless, say):
        raise MaskError("none")
    there = steps
    ended.wait(0.1)
    assert steps == there

    def fails(tell: Callable[[str], None]) -> None:
        raise MaskError("of its own")

    with pytest.raises(MaskError, match="of its own"), meanwhile(fails, say) as result:
        result()


@pytest.mark.parametrize("null", ["labels", "weights", "shuffled"])
@pytest.mark.parametrize("objective", ["superset", "paper"])
def test_nulls_fail(dense: DenseModel, null: str, objective: str) -> None:
    aim = Aim(objective, 0.05)  # pyright: ignore[reportArgumentType]
    try:
        result = search_task(subjects(dense), task(), aim, null=null, dense=False, work=WORK / 4)  # pyright: ignore
    except MaskError as error:
        assert "no circuit within the target" in str(error)
    else:
        assert result.facts.null == null and not result.passed
        assert "fails, as it must" in str(result)


def test_what_the_sparse_model_does_not_do_has_no_circuit(dense: DenseModel) -> None:
    coupling = replace(untrained(dense), reference_bt=torch.randint(2, VOCABULARY, (4, CONTEXT)))
    with pytest.raises(UnsolvedError, match=r"answers \d.*% of planted right and 90% are asked .* take another task") as caught:
        search_task(Subjects.of(coupling), task())
    assert "\n" not in str(caught.value)
    with pytest.raises(MaskError, match="no reference text"):
        Subjects.of(replace(coupling, reference_bt=None))


def test_a_split_without_pairs_is_an_error_and_validation_is_made_up_for(dense: DenseModel) -> None:
    nothing = planted_pairs(2).rows(torch.zeros(0, dtype=torch.long))
    with pytest.raises(MaskError, match="the task planted has no test pairs"):
        search_task(subjects(dense), task(test=nothing))
    result = search_task(subjects(dense), task(validation=nothing), Aim(target=0.02), dense=False, work=WORK / 2)
    assert result.facts.dense is None and "not pruned: not asked for" in str(result)


def test_labels_are_replaced_everywhere_alike_and_names_dealt_out_anew() -> None:
    pairs = planted_pairs(40)
    labels = random_labels(pairs, VOCABULARY, 0)
    assert len(set(labels.answer_bk.flatten().tolist())) == 1 and len(set(labels.wrong_bk.flatten().tolist())) == 1
    assert {int(labels.answer_bk[0]), int(labels.wrong_bk[0])} != {4, 5}
    dealt = dealt_anew(pairs, 0)
    right = (dealt.answer_bk == 4).flatten()
    assert int(right.sum()) == 20 and torch.equal(dealt.wrong_bk.flatten(), torch.where(right, 5, 4))
    assert torch.equal(dealt.prompt_bt, pairs.prompt_bt)


def test_permuted_weights_are_the_same_weights_elsewhere(dense: DenseModel) -> None:
    sparse = planted_sparse(dense)
    other = permuted_weights(sparse, 0)
    for (name, one), two in zip(sparse.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.flatten().sort().values, two.flatten().sort().values), name
    assert not torch.equal(sparse.embedding, other.embedding)


def test_what_was_found_on_the_way_is_not_searched_again(
    dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, parts, aim, work = subjects(dense), tmp_path / "parts", Aim(target=0.02), WORK / 4
    alone = search_task(of, task(), aim, work=work, seeds=2, dense=False)
    searched: list[tuple[str, int]] = []
    find_nodes = search.find_nodes

    def find(subject: Subject, *arguments: Any, seed: int, **others: Any) -> FoundNodes:
        searched.append((type(subject).__name__, seed))
        return find_nodes(subject, *arguments, seed=seed, **others)

    monkeypatch.setattr(search, "find_nodes", find)
    first = search_task(of, task(), aim, work=work, parts=parts)
    assert sorted(searched) == [("DenseSubject", 0), ("SparseSubject", 0)]
    both = search_task(of, task(), aim, work=work, parts=parts, seeds=2)
    assert searched[2:] == [("SparseSubject", 1)]
    for at, kept_1n in alone.circuit.kept.items():
        assert torch.equal(kept_1n, both.circuit.kept[at]) and torch.equal(alone.inclusion[at], both.inclusion[at])
    assert both.circuit.edges == alone.circuit.edges
    assert both.facts.runs == alone.facts.runs
    assert first.facts.dense is not None and both.facts.dense == first.facts.dense
    (parts / "seed-1.json").write_text("{")
    search_task(of, task(), aim, work=work, parts=parts, seeds=2, dense=False)
    assert searched[3:] == [("SparseSubject", 1)]  # what is damaged is made again
    search_task(of, task(), Aim(target=0.03), work=work, parts=parts, dense=False)
    assert searched[4:] == [("SparseSubject", 0)]  # and so is what another search has found
