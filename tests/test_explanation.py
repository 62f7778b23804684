"""Explanations: complete or not made, the same after JSON, readable in a terminal; what cannot be explained is one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.bridges import Coupling
from bridge.dense import DenseModel, load_dense
from bridge.explain import explain
from bridge.explanation import Answered, Drawn, ExplainedNode, ExplainError, Explanation, render_answer, render_text
from bridge.prompts import PromptError
from bridge.recipe import UserError
from bridge.sparse import Location
from tests.conftest import CONTEXT, tiny_gpt2, untrained

PROMPT = "w5 w9 w12 w5 w30 w2"


def agreeing(dense: DenseModel, prompt: str = PROMPT) -> Coupling:
    """An untrained coupling that gives the dense model's answer to the prompt, by its output bias; with reference text."""
    coupling = untrained(dense)
    coupling.sparse.project(0.3)
    assert dense.tokenizer is not None
    tokens_1t = torch.tensor([dense.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        coupling.sparse.unembedding.bias.copy_(2 * dense.run(tokens_1t).logits_btv[0, -1])
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    reference_bt = torch.randint(2, 40, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(coupling, reference_bt=reference_bt, path="somewhere/coupling")


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> Coupling:
    return agreeing(dense)


@pytest.fixture(scope="module")
def explanation(coupled: Coupling) -> Explanation:
    return explain(coupled, PROMPT)


def test_an_explanation_says_what_it_explains(explanation: Explanation, coupled: Coupling):
    dense = coupled.dense
    logits_v = dense.run(torch.tensor([[token.id for token in explanation.tokens]])).logits_btv[0, -1]
    probability_v = logits_v.softmax(-1)
    first, second = logits_v.topk(2).indices.tolist()
    assert [token.text for token in explanation.tokens] == PROMPT.split()
    assert (explanation.target.id, explanation.contrast.id) == (first, second)
    assert explanation.dense[0].probability == pytest.approx(float(probability_v[first]))
    assert len(explanation.dense) == len(explanation.sparse) == 5
    assert explanation.dense_difference == pytest.approx(float(logits_v[first] - logits_v[second]), abs=1e-5)
    assert explanation.agree and explanation.faithfulness.agreement.passed
    where = explanation.provenance
    assert where.dense_fingerprint == dense.fingerprint() and where.coupling == "somewhere/coupling"
    assert where.l0 == coupled.recipe.sparsity.l0 and "128 tokens" in where.reference


def recorded(coupled: Coupling, tokens_bt: torch.Tensor | None) -> dict[str, torch.Tensor]:
    assert tokens_bt is not None
    values: dict[str, torch.Tensor] = {}

    def record(location: Location, x_btn: torch.Tensor) -> torch.Tensor:
        values[str(location)] = x_btn
        return x_btn

    coupled.sparse.run(tokens_bt, gate=record)
    return values


def test_nodes_tell_what_their_deletion_does(explanation: Explanation, coupled: Coupling):
    assert explanation.nodes
    tokens_1t = torch.tensor([[token.id for token in explanation.tokens]])
    values, corpus = recorded(coupled, tokens_1t), recorded(coupled, coupled.reference_bt)
    means = {name: value_btn.mean((0, 1)) for name, value_btn in corpus.items()}
    values = {name: value_1tn[0] for name, value_1tn in values.items()}
    for node in explanation.nodes:
        assert node.activation == pytest.approx(float(values[f"{node.layer}.{node.kind}"][node.position, node.index]), abs=1e-5)
        assert node.id == f"L{node.layer}.{node.kind}[{node.index}]@{node.position}"
    # effects and importances of single deletions, from masks built from the node list alone
    kept = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in values.items()}
    for node in explanation.nodes:
        kept[f"{node.layer}.{node.kind}"][node.position, node.index] = True

    def logits(without: ExplainedNode | None = None) -> torch.Tensor:
        def gate(location: Location, x_btn: torch.Tensor) -> torch.Tensor:
            mask = kept[str(location)].clone()
            if without is not None and str(location) == f"{without.layer}.{without.kind}":
                mask[without.position, without.index] = False
            return torch.where(mask, x_btn, means[str(location)])

        return coupled.sparse.run(tokens_1t, gate=gate).logits_btv[0, -1]

    def difference(logits_v: torch.Tensor) -> float:
        return float(logits_v[explanation.target.id] - logits_v[explanation.contrast.id])

    whole_v = coupled.sparse(tokens_1t)[0, -1].log_softmax(-1)

    def kl(logits_v: torch.Tensor) -> float:
        return float((whole_v.exp() * (whole_v - logits_v.log_softmax(-1))).sum())

    alone_v = logits()
    assert explanation.faithfulness.kl_kept.value == pytest.approx(kl(alone_v), abs=1e-5)
    for node in explanation.nodes[::5]:
        assert node.mean == pytest.approx(float(means[f"{node.layer}.{node.kind}"][node.index]), abs=1e-5)
        assert node.effect == pytest.approx(difference(alone_v) - difference(logits(node)), abs=1e-4)
        assert node.importance == pytest.approx(kl(logits(node)) - kl(alone_v), abs=1e-4)


def test_in_a_large_circuit_only_the_nodes_that_matter_most_are_measured(
    coupled: Coupling, explanation: Explanation, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.import_module("bridge.explain"), "DELETED_TOKENS", 3 * len(explanation.tokens))
    some = explain(coupled, PROMPT)
    measured = [node for node in some.nodes if node.effect is not None]
    assert len(measured) == 6 < len(some.nodes) == len(explanation.nodes)
    effects = {node.id: node.effect for node in explanation.nodes}
    assert all(node.effect == pytest.approx(effects[node.id], abs=1e-5) for node in measured)
    assert "effect" in render_text(some) and Explanation.from_json(some.to_json()) == some


def test_edges_run_between_nodes_that_are_there(explanation: Explanation):
    ids = {node.id for node in explanation.nodes}
    last = len(explanation.tokens) - 1
    for edge in explanation.edges:
        assert edge.source in ids or edge.source.startswith(("embedding[", "bigram["))
        assert edge.target in ids or edge.target == f"L2.answer[{explanation.target.id}]@{last}"
    counts = explanation.counts
    assert len(explanation.edges) < 5000  # so that these are all
    assert counts.nodes == len(ids)
    assert counts.edges == sum(edge.kind in ("weight", "value") for edge in explanation.edges)
    assert counts.weights <= counts.edges and counts.bigram == 1


def test_heads_are_told(explanation: Explanation):
    ids = {node.id for node in explanation.nodes}
    assert explanation.attention
    for head in explanation.attention:
        assert 0 <= head.query < len(explanation.tokens)
        assert head.effect == pytest.approx(head.pattern_effect + head.value_effect + head.interaction, abs=1e-5)
        assert sum(read.weight for read in head.reads) + head.sink <= 1 + 1e-5
        assert all(read.position <= head.query for read in head.reads)
        assert {term.node for read in head.reads for term in read.moved} <= ids
    first = explanation.attention[0]
    assert f"L{first.layer}.head {first.head}@{first.query}" in render_text(explanation)
    none = dataclasses.replace(explanation, attention=(), attention_left_out=0)
    assert "No head of the circuit does anything" in render_text(none)


def test_json_goes_there_and_back_and_holds_no_nan(explanation: Explanation):
    values = explanation.to_json()
    text = json.dumps(values, allow_nan=False)
    assert Explanation.from_json(json.loads(text)) == explanation
    assert values["faithfulness"]["verdict"] == explanation.faithfulness.verdict
    assert values["counts"]["nodes"] == len(values["nodes"])
    with pytest.raises(ExplainError, match="not an explanation"):
        Explanation.from_json({"prompt": "w5"})
    without = {key: value for key, value in values.items() if key != "faithfulness"}
    with pytest.raises(ExplainError, match="not an explanation"):
        Explanation.from_json(without)


def test_an_explanation_without_evidence_cannot_be_built(explanation: Explanation):
    fields = {field.name: getattr(explanation, field.name) for field in dataclasses.fields(explanation)}
    del fields["faithfulness"]
    with pytest.raises(TypeError, match="faithfulness"):
        Explanation(**fields)
    with pytest.raises(ValueError, match="nan|NaN|JSON"):
        dataclasses.replace(explanation, dense_difference=float("nan")).to_json()


@pytest.mark.parametrize("width", [72, 100, 120])
def test_the_text_fits_and_leads_with_answer_and_verdict(explanation: Explanation, width: int):
    text = render_text(explanation, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("prompt    'w5 w9")
    assert f"dense     '{explanation.target.text}'" in lines[1]
    where = {
        head: next(i for i, line in enumerate(lines) if line.startswith(head))
        for head in ("VERDICT", "CIRCUIT", "ATTENTION", "EVIDENCE")
    }
    assert where["VERDICT"] < where["CIRCUIT"] < where["ATTENTION"] < where["EVIDENCE"]
    assert explanation.faithfulness.verdict.upper() in lines[where["VERDICT"]]
    strongest = max(explanation.nodes, key=lambda node: abs(node.effect or 0))
    assert any(line.strip().startswith(strongest.name) for line in lines)
    for measure in explanation.faithfulness.measures:
        assert any(measure.name in line for line in lines[where["EVIDENCE"] :])
    assert str(explanation) == render_text(explanation)


def test_odd_characters_in_the_prompt_are_shown_as_escapes(explanation: Explanation):
    odd = dataclasses.replace(explanation, prompt="def f():\n\treturn\u200b x ")
    assert "prompt    'def f():\\n\\treturn\\u200b x '" in render_text(odd)


def test_models_that_disagree_give_no_explanation(dense: DenseModel, coupled: Coupling):
    other = explain(coupled, "w30 w31 w4 w8")
    assert not other.agree
    assert other.faithfulness.verdict == "no explanation"
    text = render_text(other)
    assert "DISAGREES" in text and "VERDICT   NO EXPLANATION. The sparse model gives another answer" in text


def test_target_and_contrast_can_be_named(coupled: Coupling, explanation: Explanation):
    first, second = explanation.target.text, explanation.contrast.text
    third = explanation.dense[2].token.text
    chosen = explain(coupled, PROMPT, target=third)
    assert (chosen.target.text, chosen.contrast.text) == (third, first)
    assert chosen.dense_difference < 0 and "which is not the dense model's answer" in render_text(chosen)
    swapped = explain(coupled, PROMPT, target=second, contrast=third)
    assert (swapped.target.text, swapped.contrast.text) == (second, third)
    against = explain(coupled, PROMPT, contrast=third)
    assert (against.target.text, against.contrast.text) == (first, third)


def test_the_phases_are_said_and_the_seed_decides(coupled: Coupling, explanation: Explanation):
    phases: list[str] = []
    again = explain(coupled, PROMPT, progress=phases.append)
    assert again == explanation
    said = [phase.split(":")[0] for phase in phases]
    for phase in ("tokens", "means", "candidates", "masks", "levels", "agreement", "controls", "effect profile"):
        assert phase in said


def test_what_cannot_be_explained_is_one_line(coupled: Coupling, explanation: Explanation):
    first = explanation.target.text
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ""}, "the prompt is empty; give the text whose next token is to be explained"),
        ({"prompt": "<end>"}, "the prompt is empty"),
        ({"prompt": " ".join(["w5"] * 17)}, "the prompt is 17 tokens long, and the context is 16; give its last part only"),
        ({"target": "w5 w6"}, "target 'w5 w6' is 2 tokens ('w5' 'w6'), and only a single token can be explained"),
        ({"target": "w5 w6"}, "; give one, such as 'w5'"),
        ({"contrast": ""}, "contrast '' is 0 tokens (none), and only a single token can be explained; give one"),
        ({"target": "zebra"}, "target 'zebra' is not in the dense model's vocabulary; give one of its tokens"),
        ({"target": "w7", "contrast": "#7"}, "target and contrast are both 'w7' (#7); name two different tokens"),
        ({"prompt": "w5 \udcff"}, r"the prompt holds '\udcff', which is no character of UTF-8 text; give it in UTF-8"),
        ({"target": "\ud800"}, r"target '\ud800' holds '\ud800', which is no character of UTF-8 text; give one token in UTF-8"),
        ({"counterfactual": "w5 \ud800"}, r"the prompt holds '\ud800'"),
        ({"contrast": first}, "target and contrast are the dense model's own answer; name two different tokens"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises((ExplainError, PromptError)) as error:
            explain(coupled, arguments.pop("prompt", PROMPT), **arguments)
        assert message in str(error.value), arguments
        assert "\n" not in str(error.value) and isinstance(error.value, UserError)


def test_a_coupling_that_cannot_explain_says_why(coupled: Coupling):
    with pytest.raises(ExplainError, match="holds no reference text to take corpus means over; pass reference_bt"):
        explain(dataclasses.replace(coupled, reference_bt=None), PROMPT)
    with pytest.raises(ExplainError, match="no reference text"):
        explain(coupled, PROMPT, reference_bt=torch.zeros(0, 16, dtype=torch.long))
    silent = dataclasses.replace(coupled, dense=load_dense(tiny_gpt2()))
    with pytest.raises(PromptError, match="'GPT2LMHeadModel' has no tokenizer, so no text can be read; load it with one"):
        explain(silent, PROMPT)


def test_a_saved_coupling_explains_itself(coupled: Coupling, dense: DenseModel, tmp_path: Path, explanation: Explanation):
    coupled.save_pretrained(tmp_path / "coupling")
    loaded = Coupling.from_pretrained(tmp_path / "coupling", dense=dense)
    again = explain(loaded, PROMPT)
    assert [node.id for node in again.nodes] == [node.id for node in explanation.nodes]
    assert again.provenance.coupling == str(tmp_path / "coupling")


def test_what_is_handed_over_first_is_what_is_said_in_the_end(coupled: Coupling, explanation: Explanation):
    stages: list[Answered | Drawn] = []
    whole = explain(coupled, PROMPT, stage=stages.append)
    assert whole == explanation
    answered, drawn = stages
    assert isinstance(answered, Answered) and isinstance(drawn, Drawn)
    for early in (answered, drawn):
        for field in dataclasses.fields(early):
            if field.name != "sufficiency":
                assert getattr(early, field.name) == getattr(whole, field.name), field.name
    assert drawn.sufficiency == (whole.faithfulness.kl_kept, whole.faithfulness.share_kept)
    assert f"{render_answer(answered)}\n\n{render_text(whole, answer=False)}" == render_text(whole)


def test_the_whole_is_handed_over_before_its_card(coupled: Coupling, explanation: Explanation):
    stages: list[Answered | Drawn] = []
    carded = explain(coupled, PROMPT, card=True, stage=stages.append)
    assert [type(known) for known in stages] == [Answered, Drawn, Explanation]
    assert carded.card is not None and stages[2] == explanation == dataclasses.replace(carded, card=None)


def test_work_that_is_ended_leaves_nothing_behind(dense: DenseModel, explanation: Explanation):
    class EndedError(Exception):
        pass

    def raise_at(phase: str):
        def heard(said: str) -> None:
            if said.startswith(phase):
                raise EndedError

        return heard

    def end(known: Answered | Drawn) -> None:
        if isinstance(known, Drawn):
            raise EndedError

    fresh = agreeing(dense)
    for phase in ("means", "masks", "agreement", "effect profile"):
        with pytest.raises(EndedError):
            explain(fresh, PROMPT, progress=raise_at(phase))
    with pytest.raises(EndedError):
        explain(fresh, PROMPT, stage=end)
    assert explain(fresh, PROMPT) == explanation


def test_levels_go_from_few_nodes_to_all(explanation: Explanation):
    assert explanation.levels[-1].nodes == len(explanation.nodes)
    for number, level in enumerate(explanation.levels):
        assert sum(node.level <= number for node in explanation.nodes) == level.nodes
