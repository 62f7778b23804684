"""The order of deletion is that of trying every deletion in turn, where misses are linear in the masks."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, planted_pairs
from torch import Tensor

from bridge.circuits import deletion_order as deletion_order_module
from bridge.circuits.deletion_order import deletion_order
from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.masked_model import Masked
from bridge.circuits.question import Question
from bridge.models.sparse import Gate, Location

AT, NODES = Location(0, "mlp_act"), 24


class LinearModel(Masked):
    """Logits that are sums over the nodes kept, weight_bfv on each of the prompts: every node is 1, and its mean 0."""

    def __init__(self, question: Question, generator: torch.Generator) -> None:
        super().__init__(question, {AT: NODES}, {AT: torch.zeros(NODES)})
        self.weight_bfv = torch.randn(len(question), NODES, VOCABULARY, generator=generator)

    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        kept_rtf = gate(AT, torch.ones(len(row_r), self.n_tokens, NODES))
        return torch.einsum("rf,rfv->rv", kept_rtf[:, -1], self.weight_bfv[row_r])


def loss_on(question: Question, seed: int) -> CircuitLoss:
    masked = LinearModel(question, torch.Generator().manual_seed(seed))
    return CircuitLoss(
        masked, masked.logits(torch.ones(len(question), NODES, dtype=torch.bool)), SearchConfig(densities=(0.3, 0.6))
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "question", [Question.of_prompt(torch.tensor([0]), 3, 4), Question.of_pairs(planted_pairs(3, (4, 6)).both_members())]
)
def test_each_next_node_is_the_one_whose_deletion_costs_least(question: Question, seed: int) -> None:
    loss, level = loss_on(question, seed), Level(0.9)
    kept_f = torch.rand(NODES, generator=torch.Generator().manual_seed(seed)) < 0.6
    node_k = kept_f.nonzero().flatten()[1:]  # one stays

    def cost(fewer_f: Tensor) -> float:
        left_b = loss.fraction_left(loss.logits(loss.complement(fewer_f[None])))
        beyond_b = (left_b - loss.config.left).clamp(min=0) / loss.config.left
        return loss.distances_and_terms(fewer_f[None], level)[1][0] + float(beyond_b.square().mean())

    order, here_f = [], kept_f.clone()
    for _ in node_k:
        costs = {node: cost(here_f.index_fill(0, torch.tensor(node), False)) for node in node_k.tolist() if node not in order}
        order.append(min(costs, key=costs.__getitem__))
        here_f[order[-1]] = False
    assert deletion_order(loss, loss.superset_uf, kept_f, node_k, level).tolist() == order


def test_of_many_nodes_several_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, node_k, level = loss_on(Question.of_prompt(torch.tensor([0]), 3, 4), 2), torch.arange(NODES), Level(0.9)
    kept_f = torch.ones(NODES, dtype=torch.bool)
    alone = deletion_order(loss, loss.superset_uf, kept_f, node_k, level).tolist()
    monkeypatch.setattr(deletion_order_module, "_MAX_NODES_ONE_BY_ONE", NODES // 2)
    monkeypatch.setattr(deletion_order_module, "_STEP_DIVISOR", 3)
    several = deletion_order(loss, loss.superset_uf, kept_f, node_k, level).tolist()
    assert several[0] == alone[0] and several != alone and sorted(several) == sorted(alone)


def test_of_the_whole_distribution_every_node_has_its_place_once() -> None:
    loss, node_k = loss_on(Question.of_prompt(torch.tensor([0]), 3), 1), torch.arange(1, NODES)
    order_k = deletion_order(loss, loss.superset_uf, torch.ones(NODES, dtype=torch.bool), node_k, Level(None))
    assert sorted(order_k.tolist()) == node_k.tolist()


def test_a_circuit_without_nodes_to_delete_has_an_empty_order() -> None:
    loss = loss_on(Question.of_prompt(torch.tensor([0]), 3), 0)
    none_k = torch.zeros(0, dtype=torch.long)
    assert not len(deletion_order(loss, loss.superset_uf, torch.zeros(NODES, dtype=torch.bool), none_k, Level(0.9)))
