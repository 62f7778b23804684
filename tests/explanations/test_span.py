"""An explanation by a span: it answers for the whole model, whose own logits it is held to, and every command takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.cli_cases import assert_refused, run
from support.models import CONTEXT, VOCABULARY, tiny_gpt2, tiny_tokenizer
from transformers import AutoModelForCausalLM

import bridge
from bridge.circuits.error_nodes import follow_dense, reference_means
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.masked_pass import supports_model
from bridge.circuits.question import Question
from bridge.graph.attribution import draw_edges
from bridge.graph.flow import flow_through
from bridge.kernels.products import SparseMatrix
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import load_dense
from bridge.models.residual import Enter
from bridge.models.schema import ERROR
from bridge.models.span import DenseSpan, dense_of
from bridge.models.sparse import Location
from bridge.recipe import resolve
from bridge.training.prepare import complete_recipe

PROMPT = "w5 w9 w12 w7 w5 w9"


@pytest.fixture(scope="module")
def span() -> CoupledModels:
    """A random coupling of the middle block of three."""
    dense = dense_of(load_dense(tiny_gpt2(layers=3), tokenizer=tiny_tokenizer()), "1:2")
    values = {"dense": "tiny", "sparse": {"blocks": "1:2", "width": 32, "keep": 0.5}, "sparsity": {"l0": 0.5}}
    made = new_coupling(dense, complete_recipe(dense, resolve(values)))
    made.sparse.project(0.5)
    reference_bt = torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(0))
    return CoupledModels(dense, made.sparse.requires_grad_(False), made.bridges.requires_grad_(False), made.recipe, reference_bt)


def masked_model(span: CoupledModels) -> MaskedModel:
    """The span's sparse model on the prompt, errors included."""
    assert span.reference_bt is not None
    tokens_t = torch.tensor(span.dense.prompts.read(PROMPT, CONTEXT))
    followed = follow_dense(span, tokens_t[None], torch.tensor([len(tokens_t) - 1]))
    question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()), None)
    return MaskedModel(span.sparse, question, reference_means(span, span.reference_bt), followed.errors)


def test_with_every_error_it_has_the_models_own_d(span: CoupledModels) -> None:
    model, masked = tiny_gpt2(layers=3), masked_model(span)
    with torch.no_grad():
        logits_v = model(masked.question.prompt_bt).logits[0, -1]
    answer = int(logits_v.argmax())
    wanted = logits_v[answer] - torch.cat([logits_v[:answer], logits_v[answer + 1 :]]).logsumexp(0)
    everything_f = torch.ones(1, masked.space.size, dtype=torch.bool)
    torch.testing.assert_close(masked.difference(everything_f)[0], wanted, rtol=0, atol=1e-4)
    none_kept = masked.difference(~everything_f)[0]
    assert abs(float(none_kept - wanted)) > 0.05


def test_no_compiled_pass_serves_it(span: CoupledModels) -> None:
    span.sparse.compact["blocks.0.q.weight"] = SparseMatrix.of(span.sparse.get_parameter("blocks.0.q.weight"))
    try:
        assert span.sparse.achieved_l0() <= 0.6 and not supports_model(span.sparse)
        span.sparse.shape = span.sparse.shape.model_copy(update={"blocks": None})
        assert supports_model(span.sparse)  # nothing else is in the way
    finally:
        span.sparse.compact.clear()
        span.sparse.shape = span.recipe.sparse


def test_edges_to_the_answer_are_gradients_through_the_rest_of_the_model(span: CoupledModels) -> None:
    assert isinstance(span.dense, DenseSpan)
    masked, whole = masked_model(span), span.dense.whole
    kept_f = torch.rand(masked.space.size, generator=torch.Generator().manual_seed(3)) < 0.5
    flow = flow_through(masked, kept_f)
    gate, correct = masked.gates(kept_f[None])
    tokens_1t, last = masked.question.prompt_bt, span.n_sites - 1
    with torch.no_grad():
        x_1ts = span.sparse.run(tokens_1t, gate=gate, correct=correct).residuals[-1]
        direction_ts = torch.randn(x_1ts.shape[1:], generator=torch.Generator().manual_seed(4))

        def d(step: float) -> float:
            h_1td = span.bridges[last].decode(x_1ts + step * direction_ts)
            logits_1v = whole.run(tokens_1t, Enter.at(4, h_1td)).logits_btv[:, -1]
            logits_1v = correct(Location(span.n_sites, ERROR), logits_1v[:, None])[:, 0]
            return float(masked.question.difference(logits_1v)[0])

        slope = (d(1e-2) - d(-1e-2)) / 2e-2
    assert float((flow.answer_ts * direction_ts).sum()) == pytest.approx(slope, rel=0.03, abs=2e-3)
    to_answer = [edge for edge in draw_edges(flow, None).strongest if edge.kind == "unembedding"]
    assert {edge.source.position for edge in to_answer} == set(range(len(masked.question.tokens_t)))
    embedded = [edge for edge in to_answer if edge.source.location.kind == "embedding"]
    assert embedded  # the encoder's channels at the first site, which lead past the span


def test_an_explanation_says_what_it_is_of(span: CoupledModels) -> None:
    explanation = bridge.explain(span, PROMPT)
    assert explanation.provenance.blocks == "1:2"
    assert "of blocks 1:2 (the dense model runs before and after them)" in " ".join(str(explanation).split())
    with torch.no_grad():
        logits_v = tiny_gpt2(layers=3)(torch.tensor([span.dense.prompts.read(PROMPT, CONTEXT)])).logits[0, -1]
    assert explanation.answer.id == int(logits_v.argmax())
    assert explanation.dense[0].probability == pytest.approx(float(logits_v.softmax(-1).max()), abs=1e-5)


def test_every_command_takes_a_span(tmp_path: Path, text_file: Path) -> None:
    tiny_gpt2(layers=3).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    out = tmp_path / "span"
    fitted = run(
        "fit", tmp_path / "dense", "--blocks", "-2:-1", "--data", text_file, "--tokens", 512, "--out", out, "--l0", 0.5,
        "--set", "data.rows=8", "--set", "data.context=16", "--set", "refit.rows=8",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.output
    assert "blocks 1:2, 2 sublayers" in fitted.stdout and "2 of 2 sublayers" in fitted.stdout
    recipe = json.loads((out / "coupling.json").read_text())["recipe"]
    assert recipe["sparse"]["blocks"] == "-2:-1" and recipe["sparse"]["bigram"] == "none"

    evaluated = run("eval", out, "--rows", 8)
    assert evaluated.exit_code == 0 and "rest" in evaluated.stdout and "embeddings" not in evaluated.stdout
    explained = run("explain", "--bridge", out, "--prompt", PROMPT, "--json", tmp_path / "e.json", "--html", tmp_path / "e.html")
    assert explained.exit_code == 0, explained.output
    viewed = run("view", tmp_path / "e.json", "--html", tmp_path / "v.html", "--bridge", out)
    assert viewed.exit_code == 0 and (tmp_path / "v.html").is_file(), viewed.output
    for to, where in (("circuit-tracer", tmp_path / "graphs"), ("graphml", tmp_path / "graph.xml")):
        exported = run("export", tmp_path / "e.json", "--to", to, "--out", where)
        assert exported.exit_code == 0 and where.exists(), exported.output
    steered = run("steer", "--bridge", out, "--prompt", PROMPT, "--node", "0.mlp_act[3]=2", "--tokens", 2, "--draws", 2)
    assert steered.exit_code == 0, steered.output
    assert run("nodes", "--bridge", out, "--rows", 8).exit_code == 0
    page = run("nodes", "--bridge", out, "--node", "0.attn_in[3]")
    assert page.exit_code == 0, page.output
    assert_refused(run("explain", "--bridge", out, "--prompt", PROMPT, "--chat"), "has no chat template; leave out --chat")
    again = run(
        "fit",
        tmp_path / "dense",
        "--set",
        f"sparse.start={out}",
        "--data",
        text_file,
        "--tokens",
        256,
        "--l0",
        0.4,
        "--blocks",
        "1:2",
        "--out",
        tmp_path / "again",
        "--set",
        "data.rows=8",
        "--set",
        "data.context=16",
    )
    assert again.exit_code == 0 and f"the coupling in {out}, at L0" in again.stdout, again.output
    other = run(
        "fit",
        tmp_path / "dense",
        "--set",
        f"sparse.start={out}",
        "--blocks",
        "0:1",
        "--data",
        text_file,
        "--out",
        tmp_path / "other",
        "--set",
        "data.context=16",
    )
    assert_refused(other, "is a coupling of another shape (blocks)")
    loaded = bridge.load(out)
    assert loaded.blocks == "1:2"
    tokens_bt = torch.tensor([loaded.dense.prompts.read(PROMPT, CONTEXT)])
    with torch.no_grad():
        wanted_btv = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens_bt).logits
    torch.testing.assert_close(loaded.dense.run(tokens_bt).logits_btv, wanted_btv, rtol=0, atol=1e-5)


def test_what_is_no_span_is_refused_before_anything_is_written(tmp_path: Path, dense_folder: Path) -> None:
    out = tmp_path / "out"
    for blocks, message in (
        ("1:9", "is not a span of the dense model's 2 blocks"),
        ("x", "must be a slice of the dense model's"),
    ):
        assert_refused(run("fit", dense_folder, "--blocks", blocks, "--out", out), message)
    assert not out.exists()
