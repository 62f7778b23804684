"""Explanations: complete or not made, the same after JSON, readable in a terminal; what cannot be explained is one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from support.explained import made_up
from support.explanation_cases import PROMPT, agreeing

from bridge.display.progress import Phase
from bridge.errors import UserError
from bridge.explanations.build import explain
from bridge.explanations.explanation import ExplainError, Explanation
from bridge.explanations.parts import Answered, Drawn, ExplainedNode
from bridge.explanations.text import LISTED_HEADS, render_answer, render_text
from bridge.huggingface.prompts import PromptError
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel, load_dense
from bridge.models.residual import Enter
from bridge.models.schema import ERROR
from bridge.models.sparse import Location
from tests.conftest import VOCABULARY, tiny_gpt2, untrained

SPANLESS = "w9 w12 w5 w30 w2"  # of which the answer is as likely with everything at its mean


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> CoupledModels:
    return agreeing(dense)


@pytest.fixture(scope="module")
def explanation(coupled: CoupledModels) -> Explanation:
    return explain(coupled, PROMPT)


def log_odds(logits_v: torch.Tensor, answer: int) -> float:
    """Of a token against all others, from its probability."""
    probability = float(logits_v.double().softmax(-1)[answer])
    return math.log(probability / (1 - probability))


def test_an_explanation_says_what_it_explains(explanation: Explanation, coupled: CoupledModels):
    dense = coupled.dense
    tokens_1t = torch.tensor([[token.id for token in explanation.tokens]])
    logits_v = dense.run(tokens_1t).logits_btv[0, -1]
    first = int(logits_v.argmax())
    assert [token.text for token in explanation.tokens] == PROMPT.split()
    assert (explanation.answer.id, explanation.contrast) == (first, None)
    assert explanation.dense[0].probability == pytest.approx(float(logits_v.softmax(-1)[first]))
    assert len(explanation.dense) == len(explanation.sparse) == 5
    assert explanation.dense_d == pytest.approx(log_odds(logits_v, first), abs=1e-4)
    assert explanation.sparse_d == pytest.approx(log_odds(coupled.sparse(tokens_1t)[0, -1], first), abs=1e-4)
    assert explanation.agree and explanation.span == explanation.dense_d - explanation.nothing_d
    where = explanation.provenance
    assert where.dense_fingerprint == dense.fingerprint() and where.coupling == "somewhere/coupling"
    assert where.l0 == coupled.recipe.sparsity.l0 and "128 tokens" in where.reference


Values = dict[Location, torch.Tensor]


def recorded(coupled: CoupledModels, tokens_bt: torch.Tensor) -> Values:
    values: Values = {}

    def record(location: Location, x_btn: torch.Tensor) -> torch.Tensor:
        values[location] = x_btn
        return x_btn

    coupled.sparse.run(tokens_bt, gate=record)
    return values


def errors_of(coupled: CoupledModels, tokens_bt: torch.Tensor) -> Values:
    """Every error, from the definition: what a sparse sublayer makes of the encoded residual, and what it should."""
    sparse, dense = coupled.sparse, coupled.dense.run(tokens_bt)
    encoded = [coupled.bridges[site].encode(x_btd.float()) for site, x_btd in enumerate(dense.residuals)]
    found = {Location(0, ERROR): encoded[0] - sparse.embed(tokens_bt)}
    for site, x_bts in enumerate(encoded[:-1]):
        found[Location(site + 1, ERROR)] = encoded[site + 1] - sparse.run(tokens_bt, Enter.at(site, x_bts)).residuals[site + 1]
    last = len(encoded) - 1
    found[Location(last + 1, ERROR)] = dense.logits_btv - sparse.run(tokens_bt, Enter.at(last, encoded[last])).logits_btv
    return found


class Literal:
    """A circuit run by masks that are made of the node list alone, every mean and error taken from its definition."""

    def __init__(self, coupled: CoupledModels, tokens_1t: torch.Tensor, nodes: Sequence[ExplainedNode]) -> None:
        assert coupled.reference_bt is not None
        self.coupled, self.tokens_1t, self.seen = coupled, tokens_1t, dict[Location, torch.Tensor]()
        every = recorded(coupled, coupled.reference_bt) | errors_of(coupled, coupled.reference_bt)
        self.means = {at: value_btn.mean((0, 1)) for at, value_btn in every.items()}
        self.errors = errors_of(coupled, tokens_1t)
        self.kept = {(Location(node.layer, node.kind), node.position, node.index) for node in nodes}

    def logits(self, without: ExplainedNode | None = None) -> torch.Tensor:
        out = None if without is None else (Location(without.layer, without.kind), without.position, without.index)

        def mask(at: Location, position: int, index: int) -> bool:
            return (at, position, index) in self.kept and (at, position, index) != out

        def gate(at: Location, x_1tn: torch.Tensor) -> torch.Tensor:
            self.seen[at] = x_1tn[0]
            kept_tn = torch.tensor([[mask(at, t, n) for n in range(x_1tn.shape[2])] for t in range(x_1tn.shape[1])])
            return torch.where(kept_tn, x_1tn, self.means[at])

        def correct(at: Location, x_1ts: torch.Tensor) -> torch.Tensor:
            kept_t1 = torch.tensor([[mask(at, t, 0)] for t in range(x_1ts.shape[1])])
            return x_1ts + torch.where(kept_t1, self.errors[at], self.means[at])

        return self.coupled.sparse.run(self.tokens_1t, gate=gate, correct=correct).logits_btv[0, -1]


def test_nodes_say_what_their_ablation_does(explanation: Explanation, coupled: CoupledModels):
    opened = [node for node in explanation.nodes if node.level <= explanation.opening]
    assert {node.kind == ERROR for node in opened} == {True, False}
    literal = Literal(coupled, torch.tensor([[token.id for token in explanation.tokens]]), opened)
    alone = log_odds(literal.logits(), explanation.answer.id)
    seen = dict(literal.seen)
    assert explanation.circuit.miss == pytest.approx(abs(alone - explanation.dense_d), abs=1e-3)
    assert explanation.circuit.faithfulness == pytest.approx(
        1 - abs(alone - explanation.dense_d) / abs(explanation.span), abs=1e-3
    )
    assert Literal(coupled, literal.tokens_1t, ()).logits().shape == (VOCABULARY,)
    nothing = log_odds(Literal(coupled, literal.tokens_1t, ()).logits(), explanation.answer.id)
    assert explanation.nothing_d == pytest.approx(nothing, abs=1e-3)
    for node in opened:
        at = Location(node.layer, node.kind)
        if node.kind == ERROR:
            assert node.id == f"error[{node.layer}]@{node.position}"
            assert node.activation == pytest.approx(float(literal.errors[at][0, node.position].norm()), abs=1e-4)
            assert node.mean == pytest.approx(float(literal.means[at].norm()), abs=1e-4)
        else:
            assert node.id == f"L{node.layer}.{node.kind}[{node.index}]@{node.position}"
            assert node.activation == pytest.approx(float(seen[at][node.position, node.index]), abs=1e-4)
            assert node.mean == pytest.approx(float(literal.means[at][node.index]), abs=1e-5)
        assert node.effect == pytest.approx(alone - log_odds(literal.logits(node), explanation.answer.id), abs=1e-3)
    above = [node for node in explanation.nodes if node.level > explanation.opening]
    assert above and all(node.effect is None and node.group is None for node in above)


def test_in_a_large_circuit_only_the_nodes_that_matter_most_are_measured_and_listed(
    coupled: CoupledModels, explanation: Explanation, monkeypatch: pytest.MonkeyPatch
):
    module = importlib.import_module("bridge.explanations.build")
    monkeypatch.setattr(module, "DELETED_TOKENS", 3 * len(explanation.tokens))
    monkeypatch.setattr(module, "MOST_NODES", 30)
    some = explain(coupled, PROMPT)
    measured = [node for node in some.nodes if node.effect is not None]
    assert len(measured) == 6 < some.counts.nodes < len(some.nodes) == 30 < len(explanation.nodes)
    effects = {node.id: node.effect for node in explanation.nodes}
    assert all(node.effect == pytest.approx(effects[node.id], abs=1e-5) for node in measured)
    assert "effect" in render_text(some) and Explanation.from_json(some.to_json()) == some


def test_edges_run_between_nodes_that_are_there(explanation: Explanation):
    ids = {node.id for node in explanation.nodes if node.level <= explanation.opening}
    last = len(explanation.tokens) - 1
    for edge in explanation.edges:
        assert edge.source in ids or edge.source.startswith(("embedding[", "bigram["))
        assert edge.target in ids or edge.target == f"L2.answer[{explanation.answer.id}]@{last}"
    counts = explanation.counts
    assert len(explanation.edges) < 5000  # so that these are all
    assert counts.nodes == len(ids) and counts.errors == sum(id.startswith("error[") for id in ids)
    assert counts.edges == sum(edge.kind in ("weight", "value") for edge in explanation.edges)
    assert counts.weights <= counts.edges and counts.bigram == 1 and counts.active > counts.nodes


def test_groups_have_every_node_once_and_say_what_their_ablation_does(explanation: Explanation, coupled: CoupledModels):
    opened = [node for node in explanation.nodes if node.level <= explanation.opening]
    members = [id for group in explanation.groups for id in group.nodes]
    assert sorted(members) == sorted(node.id for node in opened)
    for node in opened:
        assert node.group is not None and node.id in explanation.groups[node.group].nodes
    tokens_1t = torch.tensor([[token.id for token in explanation.tokens]])
    alone = log_odds(Literal(coupled, tokens_1t, opened).logits(), explanation.answer.id)
    for place, group in enumerate(explanation.groups):
        assert group.id == place and group.name
        rest = [node for node in opened if node.id not in group.nodes]
        lost = alone - log_odds(Literal(coupled, tokens_1t, rest).logits(), explanation.answer.id)
        assert group.effect == pytest.approx(lost, abs=1e-3)
    sparse_dense = [(group.sparse_effect, group.dense_effect) for group in explanation.groups]
    assert explanation.group_correlation == pytest.approx(scipy.stats.pearsonr(*zip(*sparse_dense, strict=True))[0])
    assert dataclasses.replace(explanation, groups=explanation.groups[:2]).group_correlation is None
    ends = {f"group:{group.id}" for group in explanation.groups} | {"answer"}
    assert {edge.target for edge in explanation.group_edges} <= ends
    assert all(edge.source in ends or edge.source.startswith(("input:", "error:")) for edge in explanation.group_edges)


def test_heads_are_told(explanation: Explanation):
    ids = {node.id for node in explanation.nodes}
    for head in explanation.attention:
        assert 0 <= head.query < len(explanation.tokens)
        assert head.effect == pytest.approx(head.pattern_effect + head.value_effect + head.interaction, abs=1e-5)
        assert sum(read.weight for read in head.reads) + head.sink <= 1 + 1e-5
        assert all(read.position <= head.query for read in head.reads)
        assert {term.node for read in head.reads for term in read.moved} <= ids
    for head in explanation.attention[:LISTED_HEADS]:
        assert f"L{head.layer}.head {head.head}@{head.query}" in render_text(explanation)
    none = dataclasses.replace(explanation, attention=(), attention_left_out=0)
    assert "No head of the circuit has an effect on d" in render_text(none)


def test_json_goes_there_and_back_and_holds_no_nan(explanation: Explanation):
    values = explanation.to_json()
    text = json.dumps(values, allow_nan=False)
    assert Explanation.from_json(json.loads(text)) == explanation
    assert values["report"]["verdict"] == explanation.report.verdict
    assert [m["passed"] for m in values["report"]["measures"]] == [m.passed for m in explanation.report.measures]
    assert values["counts"]["nodes"] == sum(node["level"] <= values["opening"] for node in values["nodes"])
    with pytest.raises(ExplainError, match="no explanation"):
        Explanation.from_json({"prompt": "w5"})
    without = {key: value for key, value in values.items() if key != "report"}
    with pytest.raises(ExplainError, match="no explanation"):
        Explanation.from_json(without)


def test_an_explanation_without_evidence_cannot_be_built(explanation: Explanation):
    fields = {field.name: getattr(explanation, field.name) for field in dataclasses.fields(explanation)}
    del fields["report"]
    with pytest.raises(TypeError, match="report"):
        Explanation(**fields)
    with pytest.raises(ValueError, match="nan|NaN|JSON"):
        dataclasses.replace(explanation, dense_d=float("nan")).to_json()


@pytest.mark.parametrize("width", [72, 100, 120])
def test_the_text_fits_and_leads_with_answer_and_verdict(explanation: Explanation, width: int):
    text = render_text(explanation, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("prompt    'w30 w31")
    assert f"dense     '{explanation.answer.text}'" in lines[1]
    where = {
        head: next(i for i, line in enumerate(lines) if line.startswith(head))
        for head in ("question", "VERDICT", "CIRCUITS", "PATH", "GROUPS", "NODES", "ATTENTION", "EVIDENCE")
    }
    assert list(where.values()) == sorted(where.values())
    assert explanation.report.verdict.upper() in lines[where["VERDICT"]]
    strongest = max(explanation.nodes, key=lambda node: abs(node.effect or 0) * (node.kind != ERROR))
    assert any(line.strip().startswith(strongest.name) for line in lines)
    for measure in explanation.report.measures:
        assert any(measure.name in line for line in lines[where["EVIDENCE"] :])
    assert str(explanation) == render_text(explanation)


@pytest.mark.parametrize("width", [72, 100])
@pytest.mark.parametrize(
    "shape", [{"nodes": 60}, {"nodes": 1}, {"explained": False}, {"nodes": 400, "tokens": 40}, {"backup": True}]
)
def test_any_explanation_has_a_text_that_fits(shape: dict[str, Any], width: int):
    made = Explanation.from_json(made_up(**shape)["explanation"])
    text = render_text(made, width)
    assert max(map(len, text.splitlines())) <= width
    listed = [group for group in made.groups if f"[{group.id}]" in text.partition("GROUPS")[2].partition("NODES")[0]]
    assert len(listed) >= min(20, len(made.groups))
    if made.backup is not None:
        assert all(name in text for name in made.backup.strongest)
    if not made.counts.nodes:
        assert "NO EXPLANATION" in text and "a span of 0.4 nats" in " ".join(text.split())


def test_the_table_of_circuits_has_their_numbers(explanation: Explanation):
    lines = render_text(explanation).splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("CIRCUITS"))
    for place, circuit in enumerate(explanation.nested):
        cells = lines[first + 1 + place].split()
        assert f"{circuit.nodes:,}" in cells and f"{circuit.faithfulness:.3f}" in cells and f"{circuit.miss:.2f}" in cells
        assert cells[0].startswith(">") == (place == explanation.opening)


def test_odd_characters_in_the_prompt_are_shown_as_escapes(explanation: Explanation):
    odd = dataclasses.replace(explanation, prompt="def f():\n\treturn\u200b x ")
    assert "prompt    'def f():\\n\\treturn\\u200b x '" in render_text(odd)


def test_where_the_span_is_too_small_nothing_is_explained(coupled: CoupledModels):
    nothing = explain(coupled, SPANLESS)
    assert abs(nothing.span) < nothing.config.least_span
    assert nothing.report.verdict == "no explanation" and nothing.counts.nodes == 0 and not nothing.nodes
    assert Explanation.from_json(nothing.to_json()) == nothing
    text = render_text(nothing)
    assert "VERDICT   NO EXPLANATION" in text and f"a span of {abs(nothing.span):.1f} nats" in " ".join(text.split())


def test_a_prompt_on_which_the_models_disagree_is_explained(dense: DenseModel, coupled: CoupledModels):
    other = dataclasses.replace(untrained(dense), reference_bt=coupled.reference_bt)
    other.sparse.project(0.3)
    found = explain(other, PROMPT)
    assert not found.agree and found.counts.nodes and "gives another answer by itself" in render_text(found)
    assert found.circuit.faithfulness > 0.8  # of the dense model's own answer, which the errors lead to


def test_target_and_contrast_can_be_named(coupled: CoupledModels, explanation: Explanation):
    first, second, third = [answer.token for answer in explanation.dense if answer.token.id > 1][:3]
    logits_v = coupled.dense.run(torch.tensor([[token.id for token in explanation.tokens]])).logits_btv[0, -1]
    chosen = explain(coupled, PROMPT, target=third.text)
    assert (chosen.answer, chosen.contrast) == (third, None)
    assert chosen.dense_d == pytest.approx(log_odds(logits_v, third.id), abs=1e-4)
    assert "which is not the dense model's answer" in " ".join(render_text(chosen).split())
    swapped = explain(coupled, PROMPT, target=second.text, contrast=third.text)
    assert (swapped.answer, swapped.contrast) == (second, third)
    against = explain(coupled, PROMPT, contrast=third.text)
    assert (against.answer, against.contrast) == (first, third)
    assert against.dense_d == pytest.approx(float(logits_v[first.id] - logits_v[third.id]), abs=1e-4)
    assert f"why {first} rather than {third}" in render_text(against)


def test_the_phases_are_said_and_the_seed_decides(coupled: CoupledModels, explanation: Explanation):
    phases: list[str] = []
    again = explain(coupled, PROMPT, progress=lambda phase: phases.append(str(phase)))
    assert again == explanation
    said = [phase.split(":")[0] for phase in phases]
    for phase in ("tokens", "means", "search", "edges", "groups", "attention"):
        assert phase in said
    other = explain(coupled, PROMPT, seed=1)
    assert other.config.seed == other.provenance.seed == 1 and other != explanation


def test_what_cannot_be_explained_is_one_line(coupled: CoupledModels, explanation: Explanation):
    first = explanation.answer.text
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ""}, "the prompt is empty; give the text whose next token is to be explained"),
        ({"prompt": "<end>"}, "the prompt is empty"),
        ({"prompt": " ".join(["w5"] * 17)}, "the prompt is 17 tokens long, but the context is 16; give only its last part"),
        ({"target": "w5 w6"}, "target 'w5 w6' is 2 tokens ('w5' 'w6'), but only a single token can be explained"),
        ({"target": "w5 w6"}, "; give a single token, such as 'w5'"),
        ({"contrast": ""}, "contrast '' is 0 tokens (none), but only a single token can be explained; give a single token"),
        ({"target": "zebra"}, "target 'zebra' is not in the dense model's vocabulary; give one of its tokens"),
        ({"target": "w7", "contrast": "#7"}, "target and contrast are both 'w7' (#7); name two different tokens"),
        ({"prompt": "w5 \udcff"}, r"the prompt has '\udcff', which is not a character of UTF-8 text; give it in UTF-8"),
        ({"target": "\ud800"}, r"target '\ud800' has '\ud800', which is not a character of UTF-8 text; give one token in UTF-8"),
        ({"counterfactual": "w5 \ud800"}, r"the prompt has '\ud800'"),
        ({"counterfactual": "w5"}, "the counterfactual has 1 tokens and the prompt 4; give one of equal length"),
        ({"counterfactual": PROMPT}, "the counterfactual is the prompt itself; change what decides the answer"),
        ({"contrast": first}, "target and contrast are the dense model's own answer; name two different tokens"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises((ExplainError, PromptError)) as error:
            explain(coupled, arguments.pop("prompt", PROMPT), **arguments)
        assert message in str(error.value), arguments
        assert "\n" not in str(error.value) and isinstance(error.value, UserError)


def test_a_coupling_that_cannot_explain_says_why(coupled: CoupledModels):
    with pytest.raises(ExplainError, match="holds no reference text to take corpus means over; pass reference_bt"):
        explain(dataclasses.replace(coupled, reference_bt=None), PROMPT)
    with pytest.raises(ExplainError, match="no reference text"):
        explain(coupled, PROMPT, reference_bt=torch.zeros(0, 16, dtype=torch.long))
    silent = dataclasses.replace(coupled, dense=load_dense(tiny_gpt2()))
    with pytest.raises(PromptError, match="'GPT2LMHeadModel' has no tokenizer, so no text can be read; load the model with"):
        explain(silent, PROMPT)


def test_a_saved_coupling_explains_itself(coupled: CoupledModels, dense: DenseModel, tmp_path: Path, explanation: Explanation):
    coupled.save_pretrained(tmp_path / "coupling")
    loaded = CoupledModels.from_pretrained(tmp_path / "coupling", dense=dense)
    again = explain(loaded, PROMPT)
    assert [node.id for node in again.nodes] == [node.id for node in explanation.nodes]
    assert again.provenance.coupling == str(tmp_path / "coupling")


def test_what_is_handed_over_first_is_what_is_said_in_the_end(coupled: CoupledModels, explanation: Explanation):
    stages: list[Answered | Drawn] = []
    whole = explain(coupled, PROMPT, stage=stages.append)
    assert whole == explanation
    answered, drawn = stages
    assert isinstance(answered, Answered) and isinstance(drawn, Drawn)
    for early in (answered, drawn):
        for field in dataclasses.fields(early):
            if field.name not in ("sizes", "groups"):
                assert getattr(early, field.name) == getattr(whole, field.name), field.name
    assert drawn.sizes == tuple(circuit.nodes for circuit in whole.nested)
    assert drawn.groups == tuple(dataclasses.replace(group, sparse_effect=None, dense_effect=None) for group in whole.groups)
    assert f"{render_answer(answered)}\n\n{render_text(whole, answer=False)}" == render_text(whole)


def test_a_counterfactual_adds_patching(coupled: CoupledModels, explanation: Explanation):
    other = explain(coupled, PROMPT, counterfactual="w30 w31 w4 w9")
    assert other.nodes == explanation.nodes
    values = {measure.key: measure.value for measure in explanation.report.measures}
    more = [measure for measure in other.report.measures if measure.value is not None and values.get(measure.key) is None]
    assert {measure.key for measure in more} <= {"patching"}
    assert "patching" in {measure.key for measure in other.report.measures} - set(values)


def test_work_that_is_ended_leaves_nothing_behind(dense: DenseModel, explanation: Explanation):
    class EndedError(Exception):
        pass

    def raise_at(phase: str):
        def heard(said: Phase) -> None:
            if said.name.startswith(phase):
                raise EndedError

        return heard

    def end(known: Answered | Drawn) -> None:
        if isinstance(known, Drawn):
            raise EndedError

    fresh = agreeing(dense)
    for phase in ("means", "search", "F 0.9", "edges", "attention"):
        with pytest.raises(EndedError):
            explain(fresh, PROMPT, progress=raise_at(phase))
    with pytest.raises(EndedError):
        explain(fresh, PROMPT, stage=end)
    assert explain(fresh, PROMPT) == explanation


def test_circuits_go_from_few_nodes_to_many(explanation: Explanation):
    sizes = [circuit.nodes for circuit in explanation.nested]
    assert sizes == sorted(sizes) and len(sizes) == len(explanation.config.levels) + 1
    for number, circuit in enumerate(explanation.nested[: explanation.opening + 2]):
        assert sum(node.level <= number for node in explanation.nodes) == circuit.nodes + circuit.errors
