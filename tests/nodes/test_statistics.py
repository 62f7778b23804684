"""Nodes: what the pass collects is what a literal sort over all positions finds, and a page is the literal products."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.circuits_subject_cases import subject_over
from support.explanation_cases import agreeing
from support.models import CONTEXT, VOCABULARY, untrained
from support.studies_result_cases import planted_result
from torch import Tensor
from typer.testing import CliRunner

from bridge.cli.main import app
from bridge.display.progress import Phase
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.huggingface.prompts import Prompts
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node, recording_gate
from bridge.models.dense import DenseModel, load_dense
from bridge.models.sparse import Location
from bridge.models.store import CheckpointError
from bridge.nodes import statistics as nodes
from bridge.nodes.description import Excerpt, NodePage, TokenScore, describe_node, node_labels, render_page, write_vector
from bridge.nodes.endpoint import KEY, Descriptions, Endpoint, EndpointError
from bridge.nodes.statistics import KEPT, SAMPLED, Context, NodeError, NodeFacts, collect_nodes, parse_node, stored_facts
from bridge.studies.result import render_text

ROWS = 24


@pytest.fixture(scope="module")
def pair(dense: DenseModel) -> CoupledModels:
    coupling = untrained(dense)
    coupling.sparse.project(0.5)
    coupling.sparse.requires_grad_(False)
    return coupling


@pytest.fixture(scope="module")
def text_bt() -> Tensor:
    text_bt = torch.randint(VOCABULARY, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(4))
    text_bt[:, :3] = text_bt[0, :3]  # equal beginnings, and so equal activations: ties
    text_bt[7] = text_bt[3]
    return text_bt


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_STRETCH_TOKENS", 5 * CONTEXT)


@pytest.fixture
def facts(pair: CoupledModels, text_bt: Tensor, short_stretches: None) -> NodeFacts:
    return collect_nodes(pair, text_bt)


def literal(coupling: CoupledModels, text_bt: Tensor) -> dict[Location, Tensor]:
    """x_pn of every node at every position, computed stretch by stretch as in the pass, so that bits agree."""
    found: dict[Location, list[Tensor]] = {}
    for rows_bt in text_bt.split(5):
        values: dict[Location, Tensor] = {}
        coupling.sparse.run(rows_bt, gate=recording_gate(values))
        for at, x_btn in values.items():
            found.setdefault(at, []).append(x_btn.flatten(0, 1))
    return {at: torch.cat(parts) for at, parts in found.items()}


def same(one: NodeFacts, other: NodeFacts) -> bool:
    return one.rows_done == other.rows_done and all(
        torch.equal(tensor, other.parts[at][part]) for at, parts in one.parts.items() for part, tensor in parts.items()
    )


def test_moments_are_the_direct_ones(facts: NodeFacts, pair: CoupledModels, text_bt: Tensor) -> None:
    for at, x_pn in literal(pair, text_bt).items():
        torch.testing.assert_close(facts.mean(at), x_pn.double().mean(0))
        torch.testing.assert_close(facts.second_moment(at), x_pn.double().square().mean(0))
        torch.testing.assert_close(facts.active(at), (x_pn != 0).float().mean(0))


def test_extremes_are_those_of_a_full_sort(facts: NodeFacts, pair: CoupledModels, text_bt: Tensor) -> None:
    tied = 0
    for at, x_pn in literal(pair, text_bt).items():
        for index in range(x_pn.shape[1]):
            value_p = x_pn[:, index].tolist()
            sides: tuple[tuple[Literal["high", "low"], int], ...] = (("high", 1), ("low", -1))
            for side, sign in sides:
                order = sorted((p for p, value in enumerate(value_p) if sign * value > 0), key=lambda p: (-sign * value_p[p], p))
                expected = tuple(Context(value_p[p], *divmod(p, CONTEXT)) for p in order[:KEPT])
                assert facts.extremes(Node(at, index), side) == expected
                tied += len({context.value for context in expected}) < len(expected)
    assert tied > 10  # of equal values the earlier come first, and there were some


def test_quantiles_are_of_the_first_active_positions_in_the_shuffle(
    facts: NodeFacts, pair: CoupledModels, text_bt: Tensor
) -> None:
    order = torch.randperm(text_bt.numel(), generator=torch.Generator().manual_seed(0)).tolist()
    for at, x_pn in literal(pair, text_bt).items():
        for index in range(x_pn.shape[1]):
            value_p = x_pn[:, index].tolist()
            sample = sorted(value_p[p] for p in [p for p in order if value_p[p]][:SAMPLED])
            contexts = facts.quantiles(Node(at, index))
            for context in contexts:
                assert context.quantile is not None
                assert context.value == sample[round(context.quantile * (len(sample) - 1))]
                assert context.value == value_p[context.row * CONTEXT + context.position]
            assert bool(contexts) == bool(sample)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_killed_pass_goes_on_to_the_same_bits(
    pair: CoupledModels, text_bt: Tensor, facts: NodeFacts, tmp_path: Path, stop: int
) -> None:
    calls: list[str] = []

    def kill(phase: Phase) -> None:
        calls.append(str(phase))
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_nodes(pair, text_bt, folder=tmp_path, save_seconds=0, progress=kill)
    assert NodeFacts.load(tmp_path).rows_done == 5 * stop
    assert stored_facts(pair, tmp_path) is None  # half is not shown as the whole
    seen: list[str] = []
    again = collect_nodes(pair, text_bt, folder=tmp_path, progress=lambda phase: seen.append(str(phase)))
    assert len(seen) == 5 - stop
    assert same(again, facts) and same(NodeFacts.load(tmp_path), facts)


def test_facts_are_read_back_only_for_the_same_weights_text_and_seed(
    pair: CoupledModels, dense: DenseModel, text_bt: Tensor, tmp_path: Path
) -> None:
    def rows(coupling: CoupledModels, text_bt: Tensor, seed: int = 0) -> int:
        seen: list[str] = []
        collect_nodes(coupling, text_bt, folder=tmp_path, seed=seed, progress=lambda phase: seen.append(str(phase)))
        return len(seen)

    assert rows(pair, text_bt) and not rows(pair, text_bt)
    assert stored_facts(pair, tmp_path) is not None
    assert rows(pair, text_bt[:9]) and rows(pair, text_bt[:9], seed=1) and not rows(pair, text_bt[:9], seed=1)
    other = untrained(dense)
    assert stored_facts(other, tmp_path) is None and rows(other, text_bt[:9], seed=1)
    (tmp_path / "nodes.json").write_text("{")
    assert stored_facts(pair, tmp_path) is None and rows(pair, text_bt)


def test_what_cannot_be_collected_or_read_is_one_line(pair: CoupledModels, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="no reference text"):
        collect_nodes(pair)
    with pytest.raises(NodeError, match="17 tokens are longer than the context of 16"):
        collect_nodes(pair, torch.zeros(2, 17, dtype=torch.long))
    with pytest.raises(CheckpointError, match=r"no nodes\.json"):
        NodeFacts.load(tmp_path)


def test_a_node_is_read_from_its_name(pair: CoupledModels) -> None:
    sizes = pair.sparse.locations()
    for location in sizes:
        assert parse_node(f"{location}[3]", sizes) == parse_node(Node(location, 3).name, sizes) == Node(location, 3)
    for text, message in (
        ("mlp_act[3]", "names no node; write"), ("9.q[0]", "no location 9.q; give a layer from 0 to 1"),
        ("0.z[0]", "a kind of attn_in, q"), ("0.q[32]", "no channel 32; give one from 0 to 31"),
    ):  # fmt: skip
        with pytest.raises(NodeError, match=message.replace("[", r"\[")):
            parse_node(text, sizes)


def ends(score_v: Tensor) -> tuple[list[int], list[int]]:
    """Ids of the six largest scores above 0 and the six smallest below."""
    listed = sorted(enumerate(score_v.tolist()), key=lambda pair: -pair[1])
    return [v for v, s in listed[:6] if s > 0], [v for v, s in reversed(listed[-6:]) if s < 0]


def ids(tokens: tuple[TokenScore, ...] | None) -> list[int]:
    return [token.id for token in tokens or ()]


@pytest.mark.parametrize("kind", ["attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out"])
def test_tokens_and_direction_are_the_literal_products(pair: CoupledModels, facts: NodeFacts, kind: str) -> None:
    sparse, block, index = pair.sparse, dict(pair.sparse.blocks.named_children())["1"], 5
    page = describe_node(pair, facts, Node(Location(1, kind), index))
    unit_s = torch.eye(sparse.width)[index]
    if kind in ("q", "k"):
        assert (
            page.dense is None
            and page.tokens == "none"
            and not page.promotes
            and write_vector(pair, Node(Location(1, kind), 0)) is None
        )
        return
    columns = {"mlp_act": "down.weight", "v": "o.weight"}
    write_s = block.get_parameter(columns[kind])[:, index] if kind in columns else unit_s
    site = {"attn_in": 2, "v": 3, "attn_out": 3, "mlp_in": 3, "mlp_act": 4, "mlp_out": 4}[kind]
    score_v = sparse.embedding @ unit_s if kind.endswith("_in") else sparse.unembedding.weight @ write_s
    assert (ids(page.promotes), ids(page.demotes)) == ends(score_v)
    assert page.tokens == ("embedded" if kind.endswith("_in") else "promoted")
    bridge = pair.bridges[site]
    direction_d = bridge.decode(write_s) - bridge.decode(torch.zeros_like(write_s))
    assert page.dense is not None and page.dense.site == site
    assert page.dense.read_by == (*pair.dense.sublayers, "unembed")[site]
    torch.testing.assert_close(torch.tensor(page.dense.direction), direction_d, rtol=1e-4, atol=1e-5)
    change_d = bridge.decode_change(write_s)
    torch.testing.assert_close(torch.tensor(page.dense.direction), change_d)
    model: Any = pair.dense.model
    lens_v = model.get_output_embeddings().weight.detach() @ change_d
    assert (ids(page.dense.promotes), ids(page.dense.demotes)) == ends(lens_v)


def test_without_an_output_embedding_there_are_no_dense_tokens(
    pair: CoupledModels, facts: NodeFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair.dense.model, "get_output_embeddings", lambda: None)
    page = describe_node(pair, facts, Node(Location(0, "mlp_out"), 1))
    assert page.dense is not None and page.dense.promotes is None
    assert "no tokens, because the dense model does not give its output embedding" in str(page)


def test_links_are_the_nonzero_weights_the_strongest_first(pair: CoupledModels, facts: NodeFacts) -> None:
    block = dict(pair.sparse.blocks.named_children())["0"]
    page = describe_node(pair, facts, Node(Location(0, "mlp_act"), 7))
    for links, count, weight_n, kind in (
        (page.inputs, page.n_inputs, block.get_parameter("up.weight")[7], "mlp_in"),
        (page.outputs, page.n_outputs, block.get_parameter("down.weight")[:, 7], "mlp_out"),
    ):
        order = [i for i in weight_n.abs().argsort(descending=True).tolist() if weight_n[i]]
        assert count == len(order)
        assert [(link.node, link.weight) for link in links] == [(f"L0.{kind}[{i}]", float(weight_n[i])) for i in order[:8]]
    reads = describe_node(pair, facts, Node(Location(1, "attn_in"), 7))
    assert [link.node for link in reads.inputs] == ["embedding[7]", "L0.attn_out[7]", "L0.mlp_out[7]"]
    assert all(link.weight is None and link.kind == "residual" for link in reads.inputs)
    writes = describe_node(pair, facts, Node(Location(0, "attn_out"), 7))
    assert [link.node for link in writes.outputs] == ["L0.mlp_in[7]", "L1.attn_in[7]", "L1.mlp_in[7]", "unembedding[7]"]
    assert [link.node for link in describe_node(pair, facts, Node(Location(0, "q"), 7)).outputs] == ["L0.k[7]"]


def test_the_summary_names_what_contexts_share(dense: DenseModel) -> None:
    coupling = untrained(dense)
    sparse = coupling.sparse.requires_grad_(False)
    for parameter in sparse.parameters():
        parameter.zero_()
    sparse.embedding[9, 0], sparse.embedding[11, 1], sparse.embedding[12, 1] = 2.0, -2.0, 1.0
    sparse.unembedding.weight[4, 0] = 3.0
    text_bt = torch.randint(20, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(0))
    text_bt[:, 5], text_bt[:, 6], text_bt[:, 9] = 9, 13, 11
    facts = collect_nodes(coupling, text_bt)
    page = describe_node(coupling, facts, Node(Location(0, "attn_in"), 0))
    assert page.label == "at 'w9' before 'w13' at position 5; embedded by 'w9'"
    assert page.summary.startswith("at 'w9' (8/8), before 'w13' (8/8), at position 5 (8/8); embedded by 'w9'; active at 6.2%")
    other = describe_node(coupling, facts, Node(Location(0, "attn_in"), 1))
    assert other.label == "negative at 'w11' at position 9; embedded by 'w11'"
    assert describe_node(coupling, facts, Node(Location(0, "mlp_out"), 3)).label == "never active"
    assert describe_node(coupling, facts, Node(Location(0, "mlp_out"), 0)).promotes[0].text == "w4"


HOSTILE = "\x1b[2J\u202e'\n"


def page_of(text: str) -> NodePage:
    token = (TokenScore(1, text, 0.5),)
    excerpt = (Excerpt(1.0, None, 0, 0, text * 30, text, text * 30),)
    return NodePage("L0.q[0]", 0, 9, 0, 1, 0.5, excerpt, (), (), "promoted", token, token, None, (), (), 0, 0, "a", "b")


def test_hostile_text_is_printed_as_python_would_write_it() -> None:
    shown = render_page(page_of(HOSTILE), 100, HOSTILE)
    assert repr(HOSTILE) in shown and f">>{HOSTILE!r}<<" in shown and f"described {HOSTILE!r}" in shown
    assert all(letter.isprintable() for letter in shown.replace("\n", ""))
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_a_page_is_plain_json(pair: CoupledModels, facts: NodeFacts) -> None:
    page = describe_node(pair, facts, Node(Location(0, "v"), 9))
    assert page.head == 9 // pair.sparse.channels and page.n_tokens == ROWS * CONTEXT
    assert json.loads(json.dumps(page.to_json()))["high"][0]["token"] == page.high[0].token


def test_without_a_tokenizer_tokens_are_ids() -> None:
    assert Prompts(None).text(7) == "#7"


# -- the endpoint -----------------------------------------------------------------------------------------------------------


class Answering(BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]] = []
    asked: list[tuple[str, str | None, dict]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked.append((self.path, self.headers["Authorization"], json.loads(body)))
        status, answer = type(self).answers.pop(0)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://localhost:1/")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


def said(text: object) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Answering, "answers", [])
    monkeypatch.setattr(Answering, "asked", [])
    server = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "small", seconds=5)
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_endpoint_is_asked_once_and_its_line_kept(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    Answering.answers += [said("Fires\n on  names."), said("x" * 999)]
    page = page_of("a")
    assert Descriptions(tmp_path, "f").ask(endpoint, page) == "Fires on names."
    kept = Descriptions(tmp_path, "f")
    assert kept.text(page.name) == kept.ask(endpoint, page) == "Fires on names."
    ((path, key, body),) = Answering.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "small")
    assert render_page(page, 160) in body["messages"][0]["content"] and "secret" not in json.dumps(body)
    assert Descriptions(tmp_path, "other weights").text(page.name) is None
    assert len(kept.ask(Endpoint(endpoint.url, "large"), page)) == 300
    (tmp_path / "node-descriptions.json").write_text("{")
    assert Descriptions(tmp_path, "f").text(page.name) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, b""), "HTTP status 500"), ((302, b""), "HTTP status 302"), ((200, b"<html>"), "is not that of a chat endpoint"),
        ((200, b"[]"), "not that of a chat"), ((200, b'{"choices": []}'), "not that of a chat"), (said(None), "empty"),
        (said(" "), "empty"),
    ],
)  # fmt: skip
def test_an_endpoint_that_fails_is_one_line(endpoint: Endpoint, answer: tuple[int, bytes], message: str) -> None:
    Answering.answers.append(answer)
    with pytest.raises(EndpointError, match=message) as refused:
        endpoint.describe(page_of("a"))
    assert "\n" not in str(refused.value) and "'small' at '127.0.0.1'" in str(refused.value)


def test_an_endpoint_that_is_not_there_is_one_line() -> None:
    with pytest.raises(EndpointError, match=r"Connection refused; check that the endpoint runs"):
        Endpoint("http://127.0.0.1:1", "small").describe(page_of("a"))
    for url in ("file:///etc/passwd", "localhost:80", "http://", "http://a b", "http://[", "http://a\n"):
        with pytest.raises(EndpointError, match="is not the address of an endpoint"):
            Endpoint(url, "small")
    with pytest.raises(EndpointError, match="give model="):
        Endpoint("http://localhost", "")


# -- the command --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(dense_folder: Path, text_bt: Tensor, tmp_path: Path) -> Path:
    made = untrained(load_dense(dense_folder))
    CoupledModels(made.dense, made.sparse, made.bridges, made.recipe, text_bt).save_pretrained(tmp_path / "coupling")
    return tmp_path / "coupling"


def test_the_command_collects_once_and_prints_pages(saved: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["nodes", "--bridge", str(saved), "--device", "cpu", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    summary = run("--rows", 20)
    assert summary.startswith("320 tokens of text") and "L1.mlp_act" in summary and f"stored in {saved}" in summary
    written = (saved / "nodes.json").stat().st_mtime_ns
    page = run("--node", "1.mlp_act[37]", "--node", "0.q[2]", "--json", tmp_path / "pages.json")
    assert page.startswith("L1.mlp_act[37]\nwhat      ") and "\nL0.q[2]  (head 0)\n" in page and "\ndescribed" not in page
    assert [each["name"] for each in json.loads((tmp_path / "pages.json").read_text())] == ["L1.mlp_act[37]", "L0.q[2]"]
    assert (saved / "nodes.json").stat().st_mtime_ns == written
    Answering.answers.append(said("A line."))
    asked = run("--node", "1.mlp_act[37]", "--describe-with", endpoint.url, "--model", "small")
    assert "\ndescribed 'A line.'\n" in asked and asked == run("--node", "1.mlp_act[37]")
    coupling = CoupledModels.from_pretrained(saved)
    assert coupling.reference_bt is not None
    planted_result(subject_over(coupling.sparse, coupling.reference_bt), "planted").save(tmp_path / "planted")
    assert run("--circuit", tmp_path / "planted").count("\nwhat      ") == 6
    labels = node_labels(coupling, [Node(Location(1, "attn_in"), 7, 4), Node(Location(1, "attn_in"), 7, 5)])
    name = "L1.attn_in[7]"
    assert list(labels) == [name, f"+{name}", f"-{name}"]
    assert labels[name] == labels[f"-{name}" if labels[name].startswith("negative") else f"+{name}"]
    assert labels[f"-{name}"].startswith("negative")


def test_circuits_and_explanations_say_what_their_nodes_do(dense: DenseModel, text_bt: Tensor, tmp_path: Path) -> None:
    coupling = agreeing(dense)
    bare = explain(coupling, "w30 w31 w4 w8")
    assert bare.nodes and all(node.label is None for node in bare.nodes)
    collect_nodes(coupling, text_bt, folder=tmp_path)
    told = explain(replace(coupling, path=str(tmp_path)), "w30 w31 w4 w8")
    channels = [node for node in told.nodes if node.kind != "error"]
    strongest = max(channels, key=lambda node: abs(node.effect or 0))
    assert all(node.label for node in channels) and f"\n            {strongest.label}"[:90] in str(told)
    assert Explanation.from_json(told.to_json()) == told
    result = planted_result(subject_over(coupling.sparse, text_bt), "planted")
    labels = node_labels(replace(coupling, path=str(tmp_path)), result.circuit.nodes)
    name = result.circuit.nodes[0].name
    text = render_text(result, labels=labels)
    assert "LABELS of nodes" in text and f"  {name:<15} {labels[name]}"[:100] in text
    assert "LABELS of nodes" not in render_text(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node", "mlp[3]"], "names no node"),
        (["--model", "small"], "--describe-with and --model need each other"),
        (["--describe-with", "http://localhost", "--model", "small"], "the nodes to describe are missing"),
        (["--node", "0.q[0]", "--describe-with", "ftp://a", "--model", "small"], "is not the address"),
        (["--circuit", "nowhere"], "does not exist"),
    ],
)
def test_the_command_refuses(saved: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["nodes", "--bridge", str(saved), "--device", "cpu", *options])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and message in result.stderr and not result.stdout
