"""What a fine-tune changed: exact decomposition, a planted change found, the transplant against a literal slow version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_cases import assert_refused, run
from support.finetune_cases import PROMPT, adapter_folder, base_folder, gone_on
from support.span_cases import span_folder  # noqa: F401

from bridge.circuits.error_nodes import Followed, follow_dense
from bridge.circuits.question import Question
from bridge.finetunes.diff import DiffConfig, DiffError, diff, gain_by_transplant, read_prompts
from bridge.finetunes.grafts import KINDS, Grafts
from bridge.finetunes.result import render_diff
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node
from bridge.models.dense import load_dense
from bridge.models.sparse import Location


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    base_folder(folder)
    adapter_folder(folder, 0.6)
    return folder


@pytest.fixture
def base(folder: Path) -> CoupledModels:
    return CoupledModels.from_pretrained(folder / "base")


@pytest.fixture
def tuned(folder: Path, base: CoupledModels) -> CoupledModels:
    """The base gone on to another dense model: every weight of its sparse model a little different, some matrices much."""
    dense = load_dense(folder / "dense", adapter=folder / "adapter")
    other = gone_on(base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.sparse.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * (parameter != 0))
    return CoupledModels(dense, other.sparse, other.bridges, other.recipe, other.reference_bt)


def grafts_of(base: CoupledModels, tuned: CoupledModels) -> tuple[Grafts, Followed, Followed]:
    tokens_t = torch.tensor(base.dense.prompts.read(PROMPT, base.context))
    last_b = torch.tensor([len(tokens_t) - 1])
    ours, theirs = (follow_dense(one, tokens_t[None], last_b) for one in (base, tuned))
    question = Question.of_prompt(tokens_t, int(theirs.dense_bv[0].argmax()))
    return Grafts.of(base, tuned, question, ours, theirs), ours, theirs


def test_with_no_graft_it_answers_as_the_base_and_with_all_as_the_fine_tune(base: CoupledModels, tuned: CoupledModels) -> None:
    grafts, ours, theirs = grafts_of(base, tuned)
    tokens_bt = grafts.question.prompt_bt
    none, every = grafts.run(torch.stack([torch.zeros_like(grafts.own_f), grafts.own_f])).logits_btv[:, -1]
    truth = [one.dense.model(tokens_bt).logits[0, -1] for one in (base, tuned)]
    torch.testing.assert_close(none, truth[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(every, truth[1], rtol=0, atol=1e-4)
    assert float((truth[0] - truth[1]).abs().max()) > 0.1
    trace = tuned.sparse.run(tokens_bt, correct=lambda at, x_bts: x_bts + theirs.errors[at])
    for mine, other in zip(grafts.run(grafts.own_f[None]).residuals, trace.residuals, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert not any(bool(own.any()) for at, own in grafts.own.items() if at.kind in ("attn_in", "mlp_in"))  # nothing of their own
    effect_f = grafts.attributions(32)
    change = float(grafts.question.difference(theirs.dense_bv) - grafts.question.difference(ours.dense_bv))
    assert float(effect_f.sum()) == pytest.approx(change, rel=0.15, abs=0.05)


def test_the_transplant_is_what_a_literal_one_does(base: CoupledModels, tuned: CoupledModels) -> None:
    grafts, ours, _ = grafts_of(base, tuned)
    added_rf = torch.stack([grafts.own_f * grafts.nodes_f, torch.zeros_like(grafts.own_f)])
    moved_r = gain_by_transplant(base, grafts, ours, added_rf)
    model: Any = base.dense.model
    tokens_bt = grafts.question.prompt_bt
    own = {at: parts[0] for at, parts in grafts.space.split(added_rf).items()}
    # the dense model's blocks as Hugging Face has them, what a sublayer's nodes write added behind it
    changed = base.sparse.embed(tokens_bt) + grafts.errors[Location(0, "error")]
    with torch.no_grad():
        h_btd = model.transformer.wte(tokens_bt) + model.transformer.wpe(torch.arange(tokens_bt.shape[1]))
        for site, kind in enumerate(base.dense.sublayers):
            block = model.transformer.h[site // 2]
            h_btd = h_btd + (block.attn(block.ln_1(h_btd))[0] if kind == "attn" else block.mlp(block.ln_2(h_btd)))
            alone = base.sparse.sublayer(site)(changed)
            changed = base.sparse.sublayer(site, lambda at, x: x + own[at])(changed)
            bridge = base.bridges[site + 1]
            h_btd = h_btd + bridge.decode(changed) - bridge.decode(alone)
            changed = changed + grafts.errors[Location(site + 1, "error")]
        logits_bv = model.lm_head(model.transformer.ln_f(h_btd))[:, -1]
    wanted = grafts.question.difference(logits_bv) - grafts.question.difference(ours.dense_bv)
    assert abs(float(wanted)) > 0.01
    assert moved_r.tolist() == [pytest.approx(float(wanted), abs=1e-3), 0.0]


@pytest.mark.parametrize("kind", ["mlp_act", "q", "attn_out"])
def test_a_planted_change_is_found_where_it_is(base: CoupledModels, kind: str) -> None:
    """The rows of one matrix that lead into a node, changed: that node changed, and no other, though all behind it do."""
    other, name = gone_on(base), {"mlp_act": "up", "q": "q", "attn_out": "o"}[kind]
    plain, _, _ = grafts_of(base, base)
    index = int(plain.before[Location(0, kind)][0, -1].abs().argmax())  # one that AbsTopK keeps
    with torch.no_grad():
        other.sparse.get_parameter(f"blocks.0.{name}.weight")[index] *= 3
    _, ours, _ = grafts_of(base, base)
    grafts = Grafts.of(base, other, plain.question, ours, ours)  # the same errors, so that the change is passed on
    changed = [grafts.space.node(place) for place in (grafts.own_f * grafts.nodes_f).nonzero().flatten().tolist()]
    assert Node(Location(0, kind), index, grafts.space.n_tokens - 1) in changed
    assert {node.location for node in changed} == {Location(0, kind)}
    behind = [at for at in grafts.after if at.layer == 1 and not torch.equal(grafts.after[at], grafts.before[at])]
    assert behind  # what follows from it differs, and is not called changed
    # others of its place only where it takes a place from them, or leaves one, among what AbsTopK keeps
    for node in changed:
        was, now = (float(values[node.location][0, node.position or 0, node.index]) for values in (grafts.before, grafts.after))
        assert node.index == index or (was == 0) != (now == 0)


def test_a_diff_names_the_planted_node_and_its_weights(base: CoupledModels, tuned: CoupledModels) -> None:
    found = diff(base, tuned, PROMPT, config=DiffConfig(draws=3, least=0.2))
    (one,) = found.prompts
    assert one.tuned_d - one.base_d == pytest.approx(one.change) and abs(one.change) > 0.2
    assert sum(one.through.values()) == pytest.approx(1, abs=0.2) and set(one.through) == set(KINDS)
    assert one.nodes and one.transplant is not None and len(one.transplant.matched) == len(one.transplant.displaced) == 3
    assert found.transplant.value == pytest.approx(one.transplant.share)
    for edge in one.edges[:20]:
        assert edge.before != edge.after and edge.effect != 0
        assert edge.status == ("came" if edge.before == 0 else "went" if edge.after == 0 else "changed")
    listed = {node.id for node in one.nodes}
    assert all(edge.target in listed for edge in one.edges)
    text, values = render_diff(found), found.to_json()
    assert "VERDICT" in text and found.verdict in text and one.nodes[0].id in text
    assert values["prompts"][0]["change"] == one.change and values["verdict"] == found.verdict


def test_of_several_prompts_the_share_is_the_least_squares_one(base: CoupledModels, tuned: CoupledModels) -> None:
    prompts = [PROMPT, "w3 w4 w8 w21", "w17 w2 w33 w6 w11 w9"]
    found = diff(base, tuned, prompts, config=DiffConfig(draws=2, least=0.2))
    some = [(each.change, each.transplant.share) for each in found.prompts if each.transplant is not None]
    assert len(some) > 1
    wanted = sum(change * (share * change) for change, share in some) / sum(change**2 for change, _ in some)
    assert found.transplant.value == pytest.approx(wanted)
    assert found.transplant.interval is not None and found.channels
    assert sum(each.share for each in found.channels) == pytest.approx(
        sum(node.share * abs(each.change) for each in found.changed for node in each.nodes)
        / sum(abs(each.change) for each in found.prompts)
    )
    assert "CHANNELS CHANGED" in render_diff(found)


def test_where_no_answer_changes_nothing_is_listed(base: CoupledModels) -> None:
    other = gone_on(base)
    with torch.no_grad():
        other.sparse.get_parameter("blocks.0.up.weight").mul_(2)  # the sparse model alone: no fine-tune
    found = diff(base, other, PROMPT)
    assert found.verdict == "NOTHING CHANGED" and not found.changed and not found.channels
    assert not found.prompts[0].nodes and found.transplant.value is None and "NOTHING CHANGED" in render_diff(found)


def test_couplings_that_do_not_correspond_are_refused(base: CoupledModels, tmp_path: Path) -> None:
    with pytest.raises(DiffError, match="was not adapted from another coupling, so its nodes do not correspond"):
        diff(base, base, PROMPT)
    with pytest.raises(DiffError, match="no prompt"):
        diff(base, gone_on(base), [])
    file = tmp_path / "prompts"
    file.write_text('"w3 w4"\n\n"w5"\n')
    assert read_prompts(file) == ["w3 w4", "w5"]
    for wrong in ("w3", "3", '["w3"]'):
        file.write_text(f'"w3"\n{wrong}\n')
        with pytest.raises(DiffError, match="line 2 of .* is not a JSON string"):
            read_prompts(file)


def test_the_command_compares_and_writes(folder: Path, base: CoupledModels, tuned: CoupledModels, tmp_path: Path) -> None:
    recipe = tuned.recipe.model_copy(update={"adapter": str(folder / "adapter"), "dense": str(folder / "dense")})
    CoupledModels(tuned.dense, tuned.sparse, tuned.bridges, recipe, tuned.reference_bt).save_pretrained(folder / "tuned")
    prompts = tmp_path / "prompts"
    prompts.write_text('"w3 w4 w8 w21"\n')
    result = run(
        "diff", folder / "base", folder / "tuned", "--prompt", PROMPT, "--prompts", prompts, "--json", tmp_path / "d.json"
    )
    assert result.exit_code == 0, result.stderr
    assert "VERDICT" in result.stdout and (tmp_path / "d.json").is_file()
    assert_refused(
        run("diff", folder / "base", folder / "base", "--prompt", PROMPT),
        "was not adapted from another coupling, so its nodes do not correspond",
    )
    assert_refused(run("diff", folder / "base", folder / "tuned"), "no prompt")


def test_a_span_goes_on_to_a_fine_tune_and_is_compared(span_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The adapter changes blocks before, in and behind the span; what is transplanted is the span's part."""
    adapter, out = adapter_folder(span_folder.parent, 0.6), tmp_path / "tuned"
    adapted = run("adapt", span_folder, "--adapter", adapter, "--tokens", 512, "--out", out)
    assert adapted.exit_code == 0, adapted.output
    base, tuned = CoupledModels.from_pretrained(span_folder), CoupledModels.from_pretrained(out)
    assert tuned.blocks == base.blocks and tuned.dense.fingerprint() != base.dense.fingerprint()
    grafts, ours, theirs = grafts_of(base, tuned)
    none, every = grafts.run(torch.stack([torch.zeros_like(grafts.own_f), grafts.own_f])).logits_btv[:, -1]
    torch.testing.assert_close(none, ours.dense_bv[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(every, theirs.dense_bv[0], rtol=0, atol=1e-4)
    compared = run("diff", span_folder, out, "--prompt", PROMPT, "--json", tmp_path / "diff.json")
    assert compared.exit_code == 0 and "VERDICT" in compared.stdout, compared.output
    (one,) = json.loads((tmp_path / "diff.json").read_text())["prompts"]
    if one["through"]:
        assert sum(one["through"].values()) == pytest.approx(1, abs=0.15)
