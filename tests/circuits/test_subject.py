"""A masked model on a task's prompts: exact with every node kept, and what a literal forward gives otherwise."""

from __future__ import annotations

import pytest
import torch
from support.circuits_subject_cases import corpus, switched_on_f
from support.models import planted_pairs
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.subject import SparseSubject, edge_count, masked_gate, sort_pairs
from bridge.data.task_tokens import TokenPairs
from bridge.models.circuit import ablation_gate, recording_gate
from bridge.models.sparse import Gate, Location, identity_gate


@torch.no_grad()
def recorded(subject: SparseSubject, pairs: TokenPairs, gate: Gate = identity_gate) -> dict[Location, Tensor]:
    """value_btn of every node on some prompts, under a gate."""
    values: dict[Location, Tensor] = {}
    subject.logits(pairs, recording_gate(values, gate))
    return values


def test_switched_on_are_the_nodes_of_each_prompt_by_itself(subject: SparseSubject) -> None:
    pairs = planted_pairs(lengths=(4, 7))
    masked = MaskedModel(subject.sparse, Question.of_pairs(pairs), subject.means, by_position=False)
    assert torch.equal(masked.active_f, switched_on_f(subject, pairs))


def test_keeping_every_node_is_the_model_exactly(subject: SparseSubject) -> None:
    pairs = planted_pairs().both_members()
    every_f = torch.ones(subject.space.size, dtype=torch.bool)
    whole_bv = subject.logits(pairs)
    assert torch.equal(subject.logits(pairs, masked_gate(subject, every_f)), whole_bv)
    torch.testing.assert_close(whole_bv, pairs.logits_at_last(subject.sparse.run(pairs.prompt_bt).logits_btv))


def test_prompts_of_several_lengths_are_asked_at_their_last_tokens(subject: SparseSubject) -> None:
    pairs = planted_pairs(lengths=(4, 7))
    assert len(set(pairs.last_b.tolist())) == 2
    together_bv = subject.logits(pairs)
    for row in range(len(pairs)):
        torch.testing.assert_close(subject.logits(pairs.rows(torch.tensor([row])))[0], together_bv[row], atol=1e-4, rtol=1e-4)


def test_a_mask_per_prompt_is_every_prompt_with_its_mask(subject: SparseSubject) -> None:
    pairs = planted_pairs()
    kept_bf = torch.rand(len(pairs), subject.space.size, generator=torch.Generator().manual_seed(0)) < 0.5
    together_bv = subject.logits(pairs, masked_gate(subject, kept_bf))
    for row in range(len(pairs)):
        one_1v = subject.logits(pairs.rows(torch.tensor([row])), masked_gate(subject, kept_bf[row]))
        torch.testing.assert_close(together_bv[row], one_1v[0], atol=1e-4, rtol=1e-4)


def test_nodes_outside_have_their_means_and_a_missing_mean_is_an_error(subject: SparseSubject) -> None:
    pairs = planted_pairs()
    kept_f = torch.rand(subject.space.size, generator=torch.Generator().manual_seed(1)) < 0.5
    values = recorded(subject, pairs, masked_gate(subject, kept_f))
    for location, kept_1n in subject.space.split(kept_f).items():
        outside = ~kept_1n[0]
        expected = subject.means[location][outside].expand(*values[location].shape[:2], -1)
        assert torch.equal(values[location][..., outside], expected)
    fewer = dict(list(subject.means.items())[1:])
    with pytest.raises(ValueError, match="no corpus mean for"):
        ablation_gate(subject.space.split(kept_f), fewer)


def test_means_are_those_of_recorded_values(subject: SparseSubject) -> None:
    tokens_bt = corpus()
    pairs = planted_pairs().rows(torch.zeros(len(tokens_bt), dtype=torch.long))
    from dataclasses import replace

    values = recorded(subject, replace(pairs, prompt_bt=tokens_bt, last_b=torch.full((len(tokens_bt),), 11)))
    for location, value_btn in values.items():
        torch.testing.assert_close(subject.means[location], value_btn.mean((0, 1)), atol=1e-5, rtol=1e-5)


def test_edges_are_nonzero_weights_between_kept_nodes(subject: SparseSubject) -> None:
    kept_f = torch.rand(subject.space.size, generator=torch.Generator().manual_seed(2)) < 0.4
    kept = subject.space.split(kept_f)
    count = 0
    for matrix in subject.matrices():
        for j, i in matrix.weight_ji.nonzero().tolist():
            count += bool(kept[matrix.target][0, matrix.target_j[j]]) and bool(kept[matrix.source][0, matrix.source_i[i]])
    assert edge_count(subject, kept_f) == count > 0


def test_pairs_have_an_order_of_their_own() -> None:
    pairs = planted_pairs(lengths=(4, 7))
    shuffled = pairs.rows(torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)))
    one, other = sort_pairs(pairs), sort_pairs(shuffled)
    assert torch.equal(one.prompt_bt, other.prompt_bt) and torch.equal(one.answer_bk, other.answer_bk)
