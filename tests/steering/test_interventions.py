"""Nodes that are set or moved: their values, what they add at which site, and that it lasts over generated text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bridge.explanations.explanation import ExplainError
from bridge.models.bridges import Bridges, CoupledModels
from bridge.models.circuit import Node
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.models.sparse import Location
from bridge.nodes.statistics import NodeError
from bridge.steering.interventions import (
    Intervention,
    Steerer,
    SteerError,
    collect_interventions,
    intervene_on_every_node,
    parse_intervention,
    run_patched,
)
from tests.conftest import CONTEXT, untrained

TOKENS_T = torch.tensor([3, 5, 7, 9, 2, 30])
OTHER_T = torch.tensor([3, 5, 8, 9, 2, 31])


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> CoupledModels:
    coupling = untrained(dense)
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return coupling


@pytest.fixture(scope="module")
def itself(coupled: CoupledModels) -> CoupledModels:
    """A coupling whose dense model is the sparse one, bridges between them changing nothing."""
    width = coupled.sparse.width
    bridges = Bridges(coupled.n_sites, width, width, 1.0).requires_grad_(False)
    for site in range(len(bridges)):
        bridges[site].decoder.weight.copy_(torch.eye(width))
    return CoupledModels(cast(Any, coupled.sparse), coupled.sparse, bridges, coupled.recipe)


def interventions(*texts: str, coupling: CoupledModels) -> list[Intervention]:
    return [parse_intervention(text, coupling.sparse.locations()) for text in texts]


def recorded(coupling: CoupledModels, tokens_t: Tensor) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def record(location: Location, x_btn: Tensor) -> Tensor:
        values[str(location)] = x_btn
        return x_btn

    coupling.sparse.run(tokens_t[None], gate=record)
    return {name: x_btn[0] for name, x_btn in values.items()}


def test_a_text_names_a_change(coupled: CoupledModels) -> None:
    sizes, node = coupled.sparse.locations(), Location(1, "mlp_act")
    assert parse_intervention("1.mlp_act[7]", sizes) == Intervention(Node(node, 7))
    assert parse_intervention(" L1.mlp_act[7]@3 ", sizes) == Intervention(Node(node, 7, 3))
    assert parse_intervention("1.mlp_act[7]=2.5", sizes) == Intervention(Node(node, 7), value=2.5)
    assert parse_intervention("1.mlp_act[7]@0=-2", sizes) == Intervention(Node(node, 7, 0), value=-2)
    assert parse_intervention("1.mlp_act[7]@12+1e-1", sizes) == Intervention(Node(node, 7, 12), amount=0.1)
    assert parse_intervention("1.mlp_act[7]-3", sizes) == Intervention(Node(node, 7), amount=-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp_act", "'mlp_act' is not an intervention; write a node such as 1.mlp_act[37], optionally with @4"),
        ("1.mlp_act[7]@x", "is not an intervention"),
        ("1.mlp_act[7]=much", "'much' in '1.mlp_act[7]=much' is not a number from -1e6 to 1e6; write =2.5, +1 or -1"),
        ("1.mlp_act[7]=nan", "'nan' in"),
        ("1.mlp_act[7]=1e30", "is not a number from -1e6 to 1e6"),
        ("7.mlp_act[7]", "there is no location 7.mlp_act"),
        ("1.mlp_act[700]", "1.mlp_act has no channel 700"),
    ],
)
def test_what_names_no_change_is_refused(coupled: CoupledModels, text: str, message: str) -> None:
    with pytest.raises((SteerError, NodeError)) as error:
        parse_intervention(text, coupled.sparse.locations())
    assert message in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def test_nodes_get_the_values_they_are_told(coupled: CoupledModels) -> None:
    chosen = interventions(
        "0.mlp_act[3]@2=4", "0.v[5]", "1.q[1]@4+2", "0.mlp_act[3]=1", "0.mlp_act[9]=7", "0.mlp_act[9]=8", coupling=coupled
    )
    plain, other = recorded(coupled, TOKENS_T), recorded(coupled, OTHER_T)
    count, changed = Steerer(coupled, TOKENS_T, chosen, OTHER_T).changed_nodes()
    found = {(each.node, each.position): (each.before, each.after) for each in changed}
    expected: dict[tuple[str, int], float] = {("L0.mlp_act[3]", p): 4.0 if p == 2 else 1.0 for p in range(6)}
    expected |= {("L0.mlp_act[9]", p): 8.0 for p in range(6)}  # the later one
    expected |= {("L0.v[5]", p): float(other["0.v"][p, 5]) for p in range(6)}
    expected[("L1.q[1]", 4)] = float(plain["1.q"][4, 1]) + 2
    expected = {at: value for at, value in expected.items() if value != _value(plain, *at)}
    assert count == len(found) and found.keys() == expected.keys()
    for (name, position), (before, after) in found.items():
        assert before == pytest.approx(_value(plain, name, position))
        assert after == pytest.approx(expected[name, position], abs=1e-6)


def _value(values: dict[str, Tensor], name: str, position: int) -> float:
    location, _, index = name.removeprefix("L").removesuffix("]").partition("[")
    return float(values[location][position, int(index)])


def literal(coupled: CoupledModels, held: dict[str, Tensor]) -> list[Tensor]:
    """Residuals of the sparse model with whole locations held, written out sublayer by sublayer."""

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        return held.get(str(location), x_btn)

    return list(coupled.sparse.run(TOKENS_T[None], gate=gate).residuals)


@torch.no_grad()
def test_every_node_on_the_counterfactual_is_the_hand_written_transport(coupled: CoupledModels) -> None:
    held = {name: x_tn[None] for name, x_tn in recorded(coupled, OTHER_T).items()}
    changed, plain = literal(coupled, held), coupled.sparse.run(TOKENS_T[None]).residuals
    dense, tokens_1t = coupled.dense, TOKENS_T[None]
    whole = intervene_on_every_node(coupled.sparse.locations())
    for site in (1, 3, coupled.n_sites - 1):
        h_1td = dense.run(tokens_1t).residuals[site]
        bridge = coupled.bridges[site]
        h_1td = h_1td + bridge.decode(changed[site]) - bridge.decode(plain[site])
        expected = dense.run(tokens_1t, Enter.at(site, h_1td)).logits_btv
        added = Steerer(coupled, TOKENS_T, whole, OTHER_T, site=site).residual_changes(tokens_1t)
        assert list(added) == [site]
        actual = run_patched(coupled, tokens_1t, dense.run(tokens_1t), added).logits_btv
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert (actual - dense.run(tokens_1t).logits_btv).abs().max() > 1e-2
    trace = dense.run(tokens_1t)
    for site in range(1, coupled.n_sites):
        bridge, left_alone = coupled.bridges[site], coupled.sparse.sublayer(site - 1)(changed[site - 1])
        h_1td = trace.residuals[site] + bridge.decode(changed[site]) - bridge.decode(left_alone)
        trace = dense.run(tokens_1t, Enter.at(site, h_1td))
    steerer = Steerer(coupled, TOKENS_T, whole, OTHER_T)
    assert steerer.sites == tuple(range(1, coupled.n_sites))
    actual = run_patched(coupled, tokens_1t, dense.run(tokens_1t), steerer.residual_changes(tokens_1t)).logits_btv
    torch.testing.assert_close(actual, trace.logits_btv, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("site", [None, 3, 4])
def test_where_the_dense_model_is_the_sparse_one_it_is_exact(itself: CoupledModels, site: int | None) -> None:
    chosen = interventions("0.mlp_act[3]=4", "0.v[5]@1", "1.q[1]@4+2", "0.attn_in[2]@3=1.5", coupling=itself)
    values, other = recorded(itself, TOKENS_T), recorded(itself, OTHER_T)

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        x_btn = x_btn.clone()
        if str(location) == "0.mlp_act":
            x_btn[..., 3] = 4
        elif str(location) == "0.v":
            x_btn[:, 1, 5] = other["0.v"][1, 5]
        elif str(location) == "1.q":
            x_btn[:, 4, 1] = values["1.q"][4, 1] + 2
        elif str(location) == "0.attn_in":
            x_btn[:, 3, 2] = 1.5
        return x_btn

    tokens_1t = TOKENS_T[None]
    expected = itself.sparse.run(tokens_1t, gate=gate).logits_btv
    plain = itself.dense.run(tokens_1t)
    actual = run_patched(
        itself, tokens_1t, plain, Steerer(itself, TOKENS_T, chosen, OTHER_T, site=site).residual_changes(tokens_1t)
    )
    torch.testing.assert_close(actual.logits_btv, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain.logits_btv).abs().max() > 1e-2


@torch.no_grad()
def test_nodes_of_one_sublayer_are_carried_alike_either_way(coupled: CoupledModels) -> None:
    chosen = interventions("0.mlp_act[3]=4", "0.mlp_in[2]@1+3", coupling=coupled)
    own, at_once = (Steerer(coupled, TOKENS_T, chosen, site=site).residual_changes(TOKENS_T[None]) for site in (None, 2))
    assert list(own) == list(at_once) == [2]
    torch.testing.assert_close(own[2], at_once[2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_it_lasts_over_text_behind_the_prompt(coupled: CoupledModels) -> None:
    longer_1t = torch.cat([TOKENS_T, torch.tensor([11, 12, 13])])[None]
    for texts, lasts in (
        (["0.mlp_act[3]=4"], True),
        (["0.mlp_act[3]+4"], True),
        (["0.mlp_act[3]"], False),
        (["0.mlp_act[3]@5=4"], False),
    ):
        steerer = Steerer(coupled, TOKENS_T, interventions(*texts, coupling=coupled), OTHER_T)
        short, long = steerer.residual_changes(TOKENS_T[None])[2], steerer.residual_changes(longer_1t)[2]
        torch.testing.assert_close(long[:, :6], short, rtol=1e-4, atol=1e-5)  # no step alters an earlier one
        assert bool((long[0, 6:].norm(dim=-1) > 1e-4).all()) == lasts, texts
    keys = Steerer(coupled, TOKENS_T, interventions("0.v[5]@1=9", coupling=coupled)).residual_changes(longer_1t)[1]
    assert (keys[0, 6:].norm(dim=-1) > 1e-5).any()  # by attention to what was changed


@torch.no_grad()
def test_generation(coupled: CoupledModels) -> None:
    dense, chosen = coupled.dense, interventions("0.mlp_act[3]=40", "1.mlp_act[1]@5=-30", coupling=coupled)
    steerer = Steerer(coupled, TOKENS_T, chosen)
    greedy_t = TOKENS_T
    for _ in range(6):
        greedy_t = torch.cat([greedy_t, dense.run(greedy_t[None]).logits_btv[0, -1].argmax()[None]])
    assert steerer.generate(0, 6).tolist() == greedy_t[6:].tolist()
    own = cast(Any, dense.model).generate(
        TOKENS_T[None], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones(1, 6)
    )
    assert steerer.generate(0, 6).tolist() == own[0, 6:].tolist()
    written_t = steerer.generate(1.0, 6)
    assert written_t.tolist() != greedy_t[6:].tolist()
    text_1t = torch.cat([TOKENS_T, written_t])[None]  # one pass over the whole text says the same as each step did
    trace = run_patched(coupled, text_1t, dense.run(text_1t), steerer.residual_changes(text_1t))
    assert trace.logits_btv[0, 5:-1].argmax(-1).tolist() == written_t.tolist()
    assert len(steerer.generate(1.0, 100)) == CONTEXT - 6  # and no further than the context


def test_what_cannot_be_steered_is_one_line(coupled: CoupledModels) -> None:
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {}, "no node is chosen; name at least one"),
        (["0.v[5]@6=1"], {}, "L0.v[5]@6 is outside the prompt, whose tokens go from 0 to 5"),
        (["0.v[5]"], {}, "L0.v[5] has no counterfactual value, because no counterfactual is given; give one, or write =1 or +1"),
        (
            ["0.v[5]"],
            {"counterfactual_t": OTHER_T[:4]},
            "the prompt is 6 tokens long and the counterfactual 4; make them equally long",
        ),
        (["0.v[5]=1"], {"site": 9}, "site 9 does not exist; give a site from 0 to 4"),
        (["0.v[5]=1"], {"site": -1}, "site -1 does not exist"),
        (["1.v[5]=1"], {"site": 2}, "no chosen node is before site 2; give site 3 or a later one"),
    ]
    for texts, options, message in cases:
        with pytest.raises(SteerError) as error:
            Steerer(coupled, TOKENS_T, interventions(*texts, coupling=coupled), **options)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SteerError, match="cannot be both set and changed"):
        Intervention(Node(Location(0, "v"), 1), value=1.0, amount=1.0)
    with pytest.raises(SteerError, match="the prompt is missing; give prompt="):
        collect_interventions(coupled, None, [], None, None)
    with pytest.raises(ExplainError, match="there is no file 'nowhere.json'; name one that"):
        collect_interventions(coupled, "w3", [], None, Path("nowhere.json"))
