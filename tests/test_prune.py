"""The search: what it drops can change nothing, what it finds is the circuit that was built in, and it keeps to its bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bridge.circuit import Ablations, NodeSpace, Question, corpus_means
from bridge.prune import COMPANY_BOUND, MISS_BOUND, find_circuit, reachable
from bridge.recipe import SparseShape
from bridge.sparse import Location, SparseTransformer

SEQUENTIAL, PARALLEL = ("attn", "mlp", "attn", "mlp"), ("parallel", "parallel")
A, B, QUERY, YES, NO = 1, 2, 3, 9, 10  # tokens of the hand-built model


def random_model(kinds: tuple[str, ...], l0: float, **shape) -> SparseTransformer:
    values = {"width": 16, "head_channels": 4, "mlp_ratio": 2, "positions": "learned", "bigram": "none", **shape}
    sparse = SparseTransformer(SparseShape(**values), kinds, 20, 8, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    sparse.project(l0)
    return sparse.requires_grad_(False)


def built_model() -> tuple[SparseTransformer, Tensor]:
    """Says YES at the end if the first token is A and NO if it is B, by one path of six nodes; and a corpus for its means.

    A second path, equal on all tokens, is active too; a third writes what nobody reads.
    """
    sparse = SparseTransformer(SparseShape(width=16, head_channels=4, mlp_ratio=1, bigram="none"), ("attn", "mlp"), 12, 8)
    weights = dict(sparse.named_parameters())
    with torch.no_grad():
        for parameter in weights.values():
            parameter.zero_()
        weights["embedding"][:, 15] = 10.0  # what all tokens share, and most of the norm
        weights["embedding"][A, 0], weights["embedding"][B, 0] = 3.0, -3.0
        weights["embedding"][torch.arange(3, 12), 2] = torch.linspace(-2, 2, 9)
        weights["blocks.0.v.weight"][1, 0] = 2.0  # with all scores 0, attention is uniform over positions and sink
        weights["blocks.0.o.weight"][5, 1] = 5.0
        weights["blocks.0.up.weight"][7, 5] = 3.0
        weights["blocks.0.down.weight"][6, 7] = 1.0
        weights["blocks.0.up.weight"][9, 15] = 1.0  # the path that is always the same
        weights["blocks.0.down.weight"][11, 9] = 1.0
        weights["blocks.0.up.weight"][3, 2] = 2.0  # the path that leads nowhere
        weights["blocks.0.up.weight"][[12, 13], 15] = 1.0  # and two neurons more, so that one that is off is silenced
        weights["unembedding.weight"][YES, 6], weights["unembedding.weight"][NO, 6] = 2.0, -2.0
        weights["unembedding.bias"][YES], weights["unembedding.bias"][NO] = 3.0, 5.0
    generator = torch.Generator().manual_seed(0)
    corpus_bt = torch.randint(3, 9, (64, 4), generator=generator)
    corpus_bt[:, 0] = torch.tensor([A, B]).repeat(32)
    return sparse.requires_grad_(False), corpus_bt


def ablations_of(
    sparse: SparseTransformer, tokens: list[int], corpus_bt: Tensor, target: int = 4, contrast: int = 7
) -> Ablations:
    return Ablations(sparse, Question(torch.tensor(tokens), target, contrast), corpus_means(sparse, corpus_bt))


BUILT = {"L0.attn_in[0]@0", "L0.v[1]@0", "L0.attn_out[5]@3", "L0.mlp_in[5]@3", "L0.mlp_act[7]@3", "L0.mlp_out[6]@3"}


@pytest.mark.parametrize("seed", range(5))
def test_the_circuit_that_was_built_is_the_one_found(seed: int):
    sparse, corpus_bt = built_model()
    ablations = ablations_of(sparse, [A, 4, 8, QUERY], corpus_bt, YES, NO)
    assert float(ablations.question.difference(ablations.logits_v)) > 1
    found = find_circuit(ablations, seed=seed)
    assert {str(node) for node in found.circuit.nodes} == BUILT
    assert found.complete
    assert found.circuit.losses["miss"] <= MISS_BOUND


def test_each_node_of_the_built_circuit_is_needed():
    # a check of the test above: nothing smaller could have met the bounds
    sparse, corpus_bt = built_model()
    ablations = ablations_of(sparse, [A, 4, 8, QUERY], corpus_bt, YES, NO)
    places = [flat for flat in range(ablations.space.size) if str(ablations.space.node(flat)) in BUILT]
    kept_f = torch.zeros(ablations.space.size, dtype=torch.bool)
    kept_f[places] = True
    assert float(ablations.kl(ablations.logits(kept_f[None]))) < MISS_BOUND
    for place in places:
        less_f = kept_f.clone()
        less_f[place] = False
        logits_1v = ablations.logits(less_f[None])
        answer = float(ablations.question.difference(ablations.logits_v))
        off = abs(float(ablations.question.difference(logits_1v)) / answer - 1)
        assert float(ablations.kl(logits_1v)) > MISS_BOUND or off > 0.1


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
@pytest.mark.parametrize("l0", [0.02, 0.06, 0.2])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_nodes_declared_unreachable_change_nothing(kinds: tuple[str, ...], l0: float, positions: str):
    sparse = random_model(kinds, l0, positions=positions)
    tokens_1t = torch.randint(20, (1, 6), generator=torch.Generator().manual_seed(1))
    space = NodeSpace(sparse.locations(), 6)
    reached = space.split(reachable(sparse, space))
    generator = torch.Generator().manual_seed(2)
    values: dict[Location, Tensor] = {}

    def record(location: Location, x_btn: Tensor) -> Tensor:
        values[location] = x_btn
        return x_btn

    def disturb(location: Location, x_btn: Tensor) -> Tensor:
        noise_tn = 5 * torch.randn(x_btn.shape[1:], generator=generator)
        return torch.where(reached[location], values[location], noise_tn[None])

    whole_v = sparse.run(tokens_1t, gate=record).logits_btv[0, -1]
    assert sum(int((~reached_tn).sum()) for reached_tn in reached.values()) > 50
    # reached nodes are free, so that what is disturbed could get through if there were a way
    free_v = sparse.run(tokens_1t, gate=lambda at, x: torch.where(reached[at], x, disturb(at, x))).logits_btv[0, -1]
    assert torch.equal(free_v, whole_v)


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_reachable_nodes_mostly_can_change_something(kinds: tuple[str, ...]):
    # or declaring nothing unreachable would pass the test above
    sparse = random_model(kinds, 0.06, keep=1.0)
    tokens_1t = torch.randint(20, (1, 6), generator=torch.Generator().manual_seed(1))
    space = NodeSpace(sparse.locations(), 6)
    reached_f = reachable(sparse, space)
    probe_f = torch.zeros(space.size, requires_grad=True)
    probe = space.split(probe_f)
    logits_v = sparse.run(tokens_1t, gate=lambda at, x: x + probe[at]).logits_btv[0, -1]
    slope_f = torch.autograd.grad(logits_v.square().sum(), probe_f)[0]
    assert not bool((slope_f[~reached_f] != 0).any())
    assert float((slope_f[reached_f] != 0).float().mean()) > 0.8


def test_positions_that_nothing_looks_back_at_are_unreachable():
    sparse = random_model(("attn", "mlp"), 0.5)
    reached = NodeSpace(sparse.locations(), 6).split(reachable(sparse, NodeSpace(sparse.locations(), 6)))
    for kind in ("q", "attn_out", "mlp_in", "mlp_act", "mlp_out"):
        assert not reached[Location(0, kind)][:-1].any(), kind
        assert reached[Location(0, kind)][-1].any(), kind
    for kind in ("attn_in", "k", "v"):
        assert reached[Location(0, kind)].any(1).all(), kind


def test_what_is_found_keeps_to_the_bounds_and_depends_on_the_seed_alone():
    sparse = random_model(SEQUENTIAL, 0.3)
    corpus_bt = torch.randint(20, (16, 8), generator=torch.Generator().manual_seed(4))
    ablations = ablations_of(sparse, [1, 5, 9, 2, 8, 3], corpus_bt)
    phases: list[str] = []
    found = find_circuit(ablations, seed=1, progress=phases.append)
    assert [phase.split(":")[0] for phase in phases][:2] == ["candidates", "masks"]
    again = find_circuit(ablations, seed=1)
    assert torch.equal(found.kept_f, again.kept_f)
    assert found.circuit.losses["miss"] <= MISS_BOUND
    assert found.circuit.losses["company"] <= COMPANY_BOUND
    assert 0 < len(found.circuit.nodes) < found.n_candidates / 2
    # the bounds as numbers, from the definition
    whole_v = ablations.logits_v.softmax(-1)
    alone_v = sparse.run(ablations.tokens_1t, gate=found.circuit.gate).logits_btv[0, -1]
    kl = float((whole_v * (whole_v.log() - alone_v.log_softmax(-1))).sum())
    answer, kept = (float(ablations.question.difference(logits_v)) for logits_v in (ablations.logits_v, alone_v))
    assert found.circuit.losses["miss"] == pytest.approx(
        kl + 5 * ((kept - answer) / max(abs(answer), 1)) ** 2, rel=1e-3, abs=1e-5
    )


def test_where_the_search_is_complete_no_node_can_be_spared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bridge.prune.COMPANY_BOUND", float("inf"))  # or a node may be needed in company only
    sparse = random_model(SEQUENTIAL, 0.3)
    corpus_bt = torch.randint(20, (16, 8), generator=torch.Generator().manual_seed(4))
    ablations = ablations_of(sparse, [1, 5, 9], corpus_bt)
    found = find_circuit(ablations)
    assert found.complete
    place_k = found.kept_f.nonzero().flatten()
    logits_kv = ablations.logits_without(found.kept_f, place_k)
    answer = float(ablations.question.difference(ablations.logits_v))
    off_k = (ablations.question.difference(logits_kv) - answer) / max(abs(answer), 1)
    miss_k = ablations.kl(logits_kv) + 5 * off_k.square()
    assert bool((miss_k > MISS_BOUND).all())


def test_work_that_runs_out_is_admitted():
    sparse = random_model(SEQUENTIAL, 0.3)
    corpus_bt = torch.randint(20, (16, 8), generator=torch.Generator().manual_seed(4))
    ablations = ablations_of(sparse, [1, 5, 9, 2, 8, 3], corpus_bt)
    found = find_circuit(ablations, work=2000)
    assert not found.complete
    assert found.circuit.losses["miss"] <= MISS_BOUND


def test_silenced_nodes_are_candidates_only_where_they_matter():
    sparse, corpus_bt = built_model()
    built = find_circuit(ablations_of(sparse, [A, 4, 8, QUERY], corpus_bt, YES, NO))
    assert not built.silenced
    assert built.n_candidates == built.n_active
    # on B the neuron is silent, and that it is off is the answer
    off = find_circuit(ablations_of(sparse, [B, 4, 8, QUERY], corpus_bt, NO, YES))
    assert off.silenced
    assert "L0.mlp_out[6]@3" in {str(node) for node in off.circuit.nodes}
