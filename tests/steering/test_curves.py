"""Steering: at strength 0 the dense model, at 1 the whole change; random directions as long as they say; refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import torch
from support.cli_cases import assert_refused, run

import bridge
from bridge.circuits.loss import SearchConfig
from bridge.explanations.build import explain
from bridge.huggingface.prompts import PromptError
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from bridge.nodes.statistics import NodeError
from bridge.steering.curves import Steering, random_directions, steer
from bridge.steering.figure import figure_of, panels_of, render_steering, steering_plot
from bridge.steering.interventions import Steerer, SteerError, parse_intervention, run_patched
from tests.conftest import CONTEXT, untrained

PROMPT, OTHER = "w5 w9 w12 w5 w30 w2", "w5 w9 w13 w5 w31 w2"
CHANGES = ["0.mlp_act[3]=4", "1.v[5]=3", "0.v[5]@2"]


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> CoupledModels:
    coupling = untrained(dense)
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    reference_bt = torch.randint(2, 40, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(coupling, reference_bt=reference_bt)


@pytest.fixture(scope="module")
def steered(coupled: CoupledModels) -> Steering:
    return steer(coupled, PROMPT, CHANGES, counterfactual=OTHER, strengths=(0.5, 1.0), tokens=4)


def tokens(coupled: CoupledModels, text: str) -> torch.Tensor:
    assert coupled.dense.tokenizer is not None
    return torch.tensor(coupled.dense.tokenizer(text)["input_ids"])


@torch.no_grad()
def test_at_strength_0_it_is_the_dense_model(coupled: CoupledModels, steered: Steering) -> None:
    logits_v = coupled.dense.run(tokens(coupled, PROMPT)[None]).logits_btv[0, -1]
    probability_v, first = logits_v.softmax(-1), steered.curve[0]
    assert first.strength == 0 and [each.strength for each in steered.curve] == [0, 0.5, 1]
    assert first.probability_target == float(probability_v[steered.target.id])  # exactly
    assert first.probability_contrast == float(probability_v[steered.contrast.id])
    assert [answer.probability for answer in first.dense] == probability_v.topk(5).values.tolist()
    assert steered.beside[0].random_target.low == steered.beside[0].random_target.high == first.probability_target


@torch.no_grad()
def test_each_strength_adds_that_much_of_the_change(coupled: CoupledModels, steered: Steering) -> None:
    tokens_t, sizes = tokens(coupled, PROMPT), coupled.sparse.locations()
    plain = coupled.dense.run(tokens_t[None])
    chosen = [parse_intervention(text, sizes) for text in CHANGES]
    changes = Steerer(coupled, tokens_t, chosen, tokens(coupled, OTHER)).residual_changes(tokens_t[None])
    assert steered.sites == tuple(changes) == (1, 2, 3) and not steered.at_once
    for each in steered.curve[1:]:
        added = {site: each.strength * change for site, change in changes.items()}
        probability_v = run_patched(coupled, tokens_t[None], plain, added).logits_btv[0, -1].softmax(-1)
        assert each.probability_contrast == pytest.approx(float(probability_v[steered.contrast.id]), abs=1e-5)
        assert each.probability_target == pytest.approx(float(probability_v[steered.target.id]), abs=1e-5)
        assert each.dense[0].probability == pytest.approx(float(probability_v.max()), abs=1e-5)
    for site, norm in zip(steered.sites, steered.norms, strict=True):
        share_t = changes[site][0].norm(dim=-1) / plain.residuals[site][0].norm(dim=-1)
        assert norm == pytest.approx(float(share_t.sum() / (share_t > 0).sum().clamp(min=1)))
    assert min(steered.norms[1:]) > 0


@torch.no_grad()
def test_target_and_contrast_are_the_answers_to_both_prompts(coupled: CoupledModels, steered: Steering) -> None:
    logits = [coupled.dense.run(tokens(coupled, text)[None]).logits_btv[0, -1] for text in (PROMPT, OTHER)]
    assert steered.target.id == int(logits[0].argmax())
    ranked = logits[1].topk(2).indices.tolist()
    assert steered.contrast.id == (ranked[1] if ranked[0] == steered.target.id else ranked[0])
    assert steered.counterfactual_contrast == pytest.approx(float(logits[1].softmax(-1)[steered.contrast.id]))
    named = steer(coupled, PROMPT, ["0.v[1]=1"], target="w7", contrast="w8", strengths=(1,), tokens=0)
    assert (named.target.text, named.contrast.text) == ("w7", "w8") and named.counterfactual_target is None
    assert steer(coupled, PROMPT, ["0.v[1]=1"], target=7, contrast=8, strengths=(1,), tokens=0) == named
    assert named.beside[0].every_target is None and named.curve[-1].text is None


def test_random_directions_are_as_long_at_every_position() -> None:
    change_td = torch.randn(5, 16) * torch.tensor([0.0, 1, 2, 3, 4])[:, None]
    drawn_rtd = random_directions(change_td, 30, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn_rtd.norm(dim=-1), change_td.norm(dim=-1).expand(30, -1))
    cosine_rt = torch.nn.functional.cosine_similarity(drawn_rtd[:, 1:], change_td[None, 1:], dim=-1)
    assert cosine_rt.abs().max() < 0.95 and abs(float(cosine_rt.mean())) < 0.1
    assert not torch.equal(drawn_rtd[0], drawn_rtd[1])


@torch.no_grad()
def test_random_directions_are_carried_like_the_change(coupled: CoupledModels) -> None:
    steering = steer(coupled, PROMPT, ["0.mlp_act[3]=9"], strengths=(0.3, 1), draws=3, seed=4, tokens=0)
    tokens_t = tokens(coupled, PROMPT)
    plain = coupled.dense.run(tokens_t[None])
    change = Steerer(coupled, tokens_t, [parse_intervention("0.mlp_act[3]=9", coupled.sparse.locations())]).residual_changes(
        tokens_t[None]
    )
    drawn_rtd = random_directions(change[2][0], 3, torch.Generator().manual_seed(4))
    for beside in steering.beside[1:]:
        found = [
            float(
                run_patched(coupled, tokens_t[None], plain, {2: beside.strength * drawn_td[None]})
                .logits_btv[0, -1]
                .softmax(-1)[i]
            )
            for drawn_td in drawn_rtd
            for i in [steering.contrast.id]
        ]
        spread = beside.random_contrast
        assert spread.low == pytest.approx(min(found), abs=1e-5) and spread.high == pytest.approx(max(found), abs=1e-5)
        assert spread.mean == pytest.approx(sum(found) / 3, abs=1e-5)


def test_without_nodes_every_one_goes_to_the_counterfactual(coupled: CoupledModels) -> None:
    some = steer(coupled, PROMPT, ["0.v[5]"], counterfactual=OTHER, strengths=(1,), tokens=0)
    every = steer(coupled, PROMPT, counterfactual=OTHER, strengths=(1,), tokens=0)
    assert every.n_changed > 100 and every.sites == tuple(range(1, coupled.n_sites))
    assert some.beside[-1].every_contrast == pytest.approx(every.curve[-1].probability_contrast, abs=1e-5)
    assert every.beside[-1].every_contrast is None  # the curve is that already


def test_text_is_written_at_the_ends(coupled: CoupledModels, steered: Steering) -> None:
    assert [each.text is None for each in steered.curve] == [False, True, False]
    tokens_t = tokens(coupled, PROMPT)
    own = cast(Any, coupled.dense.model).generate(
        tokens_t[None], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, attention_mask=torch.ones(1, 6)
    )
    assert coupled.dense.tokenizer is not None
    decode = coupled.dense.tokenizer.decode
    assert f"{decode(tokens_t)}{steered.curve[0].text}" == decode(own[0])  # what follows the prompt, with the space before it


def test_refusals_are_one_line(coupled: CoupledModels) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"strengths": (1.5,)}, "strength 1.5 is not between 0 and 1"),
        ({"strengths": (float("nan"),)}, "strength nan is not between 0 and 1"),
        ({"draws": 0}, "0 random directions are no control; give 1 to 1,000"),
        ({"draws": 10**8}, "100,000,000 random directions are more than the limit; give 1 to 1,000"),
        ({"counterfactual": PROMPT}, "the counterfactual is the prompt itself; change what decides the answer"),
        ({"counterfactual": "w5 w9"}, "the prompt is 6 tokens long and the counterfactual 2"),
        (
            {"interventions": None},
            "the intervention is missing; name nodes, a circuit, an explanation or a counterfactual prompt",
        ),
        ({"interventions": ["9.v[1]=1"]}, "there is no location 9.v"),
        ({"interventions": ["0.v[1]@6=1"]}, "L0.v[1]@6 is outside the prompt"),
        ({"target": "w7", "contrast": "w7"}, "target and contrast are the same token; name two different ones"),
        ({"contrast": "w7 w8"}, "contrast 'w7 w8' is 2 tokens"),
        ({"target": 40}, "target 40 is not a token of the dense model; give an id from 0 to 39"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "w5 \udcff"}, r"the prompt has '\udcff', which is not a character of UTF-8 text"),
        ({"counterfactual": "w5 \udcff"}, r"the prompt has '\udcff', which is not a character of UTF-8 text"),
        ({"contrast": "\udcff"}, r"contrast '\udcff' has '\udcff', which is not a character of UTF-8 text"),
    ]
    for options, message in cases:
        arguments = {"prompt": PROMPT, "interventions": ["0.v[5]=1"], **options}
        with pytest.raises((SteerError, NodeError, PromptError)) as error:
            steer(coupled, **arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_the_function_stays_one() -> None:
    assert bridge.steer is steer and bridge.Steering is Steering


def test_the_table_and_the_plot(steered: Steering) -> None:
    for width in (72, 100, 120):
        text = render_steering(steered, width)
        assert max(map(len, text.splitlines())) <= width and "strength" in text and "text at strength 1:" in text
    assert "is added at the site after each sublayer (1, 2, 3)" in " ".join(render_steering(steered, 120).split())
    hostile = dataclasses.replace(steered, contrast=dataclasses.replace(steered.contrast, text='<script>&"'))
    drawing = steering_plot(dataclasses.replace(hostile, target=dataclasses.replace(steered.target, text="$x_{")))
    ElementTree.fromstring(drawing)
    assert "<script>" not in drawing and "$x_{" in drawing
    axes = figure_of("", "", panels_of(steered)).axes
    for axis, name in zip(axes, ("probability_contrast", "probability_target"), strict=True):
        chosen = next(line for line in axis.lines if line.get_label() == "chosen nodes")
        assert list(chosen.get_ydata()) == [getattr(each, name) for each in steered.curve]
        assert list(chosen.get_xdata()) == [each.strength for each in steered.curve] and len(axis.collections) == 1  # the band


@pytest.fixture(scope="module")
def folder(coupled: CoupledModels, dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The coupling beside its dense model, as `bridge steer` is given it."""
    folder = tmp_path_factory.mktemp("steer") / "coupling"
    bound = bridge.load_dense(str(dense_folder))
    dataclasses.replace(coupled, dense=bound).save_pretrained(folder)
    return folder


def test_the_command(folder: Path, coupled: CoupledModels, tmp_path: Path) -> None:
    files = tmp_path / "plot.svg", tmp_path / "steering.json"
    options = ["--svg", files[0], "--json", files[1], "--strength", 1, "--tokens", 3, "--draws", 2]
    nodes = [word for move in CHANGES for word in ("--node", move)]
    result = run("steer", "--bridge", folder, "--prompt", PROMPT, "--counterfactual", OTHER, *nodes, *options)
    assert result.exit_code == 0, result.output
    assert "strength" in result.stdout and "text at strength 1:" in result.stdout
    ElementTree.fromstring(files[0].read_text())
    values = json.loads(files[1].read_text())
    assert values["sites"] == [1, 2, 3] and [each["strength"] for each in values["curve"]] == [0, 1]
    explanation = explain(coupled, PROMPT, config=SearchConfig(least_span=0.0))
    assert explanation.nodes
    (tmp_path / "explanation.json").write_text(json.dumps(explanation.to_json()))
    result = run("steer", "--bridge", folder, "--explanation", tmp_path / "explanation.json", "--counterfactual", OTHER, *options)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node", "9.v[1]=1"], "there is no location 9.v"),
        (["--node", "0.v[1]@9=1"], "is outside the prompt, whose tokens go from 0 to 5"),
        (["--node", "0.v[1]=1", "--strength", "2"], "strength 2 is not between 0 and 1"),
        (["--counterfactual", "w5"], "make them equally long"),
        (["--node", "0.v[1]"], "because no counterfactual is given; give one, or write =1 or +1"),
        ([], "the intervention is missing"),
        (["--circuit", "nowhere"], "'nowhere' does not exist"),
        (["--explanation", "nowhere.json"], "there is no file 'nowhere.json'"),
        (["--node", "0.v[1]=1", "--site", "0"], "no chosen node is before site 0"),
        (
            ["--node", "0.v[1]=1", "--svg", "no/where/plot.svg"],
            "--svg 'no/where/plot.svg' cannot be written; name a file in a folder",
        ),
        (["--node", "0.v[1]=1", "--json", "."], "--json '.' cannot be written; name a file in a folder"),
    ],
)
def test_the_command_refuses(folder: Path, options: list[str], message: str) -> None:
    assert_refused(run("steer", "--bridge", folder, "--prompt", PROMPT, *options), message)
