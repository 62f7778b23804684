"""Exports: what the viewers' schemas ask, what they do not say but need, and nothing of the explanation lost or changed."""

from __future__ import annotations

import json
import math
import re
import sys
import urllib.parse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from jsonschema import Draft202012Validator
from support.cli_cases import assert_refused, run
from support.explanation_cases import PROMPT, agreeing

from bridge.errors import UserError
from bridge.explanations import viewer_graph
from bridge.explanations.build import explain
from bridge.explanations.explanation import ExplainError, Explanation
from bridge.explanations.export import ExportError, export, node_pages, to_networkx
from bridge.explanations.parts import ExplainedEdge, ExplainedGroup, ExplainedNode, Token
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel, load_dense
from bridge.models.schema import ERROR
from bridge.nodes.description import NodePage
from bridge.nodes.statistics import collect_nodes

HERE = Path(__file__).parents[1]
GRAPH, FEATURE = (
    Draft202012Validator(json.loads((HERE / f"viewer-{name}.schema.json").read_text())) for name in ("graph", "feature")
)
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "]]>", "(p=1) (p=", "</", "&lt;&amp;", "\x00\x1b[31m\x7f",
    "\u202e\u2066", "\ud800", "\U0001f600\u0301", "\r\n\t\v\f", "", "%00%zz", "__proto__", "${1+1}", "'; --", "../../etc",
]  # fmt: skip


@pytest.fixture(scope="module")
def coupled(dense: DenseModel) -> CoupledModels:
    return agreeing(dense)


@pytest.fixture(scope="module")
def explanation(coupled: CoupledModels) -> Explanation:
    """Why one token rather than another, with an error beside the circuit's own nodes."""
    found = explain(coupled, PROMPT)
    contrast = found.dense[1].token
    found = with_error(explain(coupled, PROMPT, contrast=contrast.text))
    signs = {node.activation > 0 for node in channels(found)}
    assert signs == {True, False} and {node.layer for node in channels(found)} == {0, 1}
    return found


def with_error(explanation: Explanation) -> Explanation:
    """The same explanation with an error of the opening circuit, at its last token, and an edge of it."""
    last = len(explanation.tokens) - 1
    if any(node.kind == ERROR for node in explanation.opening_nodes):
        return explanation
    found = ExplainedNode(f"error[2]@{last}", "error[2]", 2, ERROR, 0, last, 1.5, 0.5, 0.25, explanation.opening, None)
    edge = ExplainedEdge(found.id, f"L2.answer[{explanation.answer.id}]@{last}", "error", 0.25, 0.25)
    return replace(explanation, nodes=(*explanation.nodes, found), edges=(*explanation.edges, edge))


def channels(explanation: Explanation) -> list[ExplainedNode]:
    """The nodes of the opening circuit that are no errors."""
    return [node for node in explanation.opening_nodes if node.kind != ERROR]


def local(explanation: Explanation, folder: Path, **options: Any) -> dict[str, Any]:
    return json.loads(export(explanation, folder, **options).file.read_text())


def hosted(explanation: Explanation, file: Path, **options: Any) -> dict[str, Any]:
    return json.loads(export(explanation, file, "neuronpedia", scan="gpt2-small", **options).file.read_text())


@pytest.fixture(scope="module", params=[2, 1], ids=["circuit-tracer", "neuronpedia"])
def graph(request: pytest.FixtureRequest, explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The graph of each profile, with the number of rows to a block beside it."""
    folder = tmp_path_factory.mktemp("out")
    found = local(explanation, folder) if request.param == 2 else hosted(explanation, folder / "graph.json")
    return {**found, "rows": request.param}


def checked(graph: dict[str, Any]) -> dict[str, Any]:
    GRAPH.validate({key: value for key, value in graph.items() if key != "rows"})
    return graph


def of_type(graph: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node for node in graph["nodes"] if node["feature_type"] == kind]


def unpaired(number: int) -> tuple[int, int]:
    """Row and index of a feature's number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


# -- the graph of the viewers -------------------------------------------------------------------------------------------------


def test_a_graph_is_what_the_schema_says(graph: dict[str, Any], explanation: Explanation) -> None:
    checked(graph)
    assert graph["metadata"]["prompt"] == explanation.prompt
    assert graph["metadata"]["prompt_tokens"] == [token.text for token in explanation.tokens]
    assert explanation.report.verdict.upper() in graph["metadata"]["info"]["description"]


def test_every_node_is_there_once(graph: dict[str, Any], explanation: Explanation) -> None:
    nodes = graph["nodes"]
    for key in (lambda n: n["node_id"], lambda n: n["jsNodeId"], lambda n: (n["layer"], n["feature"], n["ctx_idx"])):
        assert len({key(node) for node in nodes}) == len(nodes)
    features = of_type(graph, "cross layer transcoder")
    assert len(features) == len(channels(explanation))
    assert [node["ctx_idx"] for node in of_type(graph, "embedding")] == list(range(len(explanation.tokens)))
    for shown, node in zip(features, channels(explanation), strict=True):
        row, index = unpaired(shown["feature"])
        assert shown["layer"] == str(row) and shown["node_id"] == f"{row}_{index}_{node.position}"
        assert row == (2 * node.layer + node.kind.startswith("mlp") if graph["rows"] == 2 else node.layer)
        assert shown["activation"] == abs(node.activation)
        assert shown["clerp"].startswith(f"{node.name} {node.activation:+.2f}")


def test_a_feature_is_a_kind_a_channel_and_a_sign(graph: dict[str, Any], explanation: Explanation) -> None:
    meant = defaultdict(set)
    for shown, node in zip(of_type(graph, "cross layer transcoder"), channels(explanation), strict=True):
        meant[shown["feature"]].add((node.layer, node.kind, node.index, node.activation < 0))
    assert all(len(each) == 1 for each in meant.values())
    assert len(meant) == len({(n.name, n.activation < 0) for n in channels(explanation)})


def test_links_are_the_effects_of_edges(graph: dict[str, Any], explanation: Explanation) -> None:
    shown = zip(of_type(graph, "cross layer transcoder"), channels(explanation), strict=True)
    names = {node.id: each["node_id"] for each, node in shown}
    errors = [node for node in explanation.opening_nodes if node.kind == ERROR]
    names |= {node.id: each["node_id"] for each, node in zip(of_type(graph, "mlp reconstruction error"), errors, strict=True)}
    ends = {node["node_id"] for node in graph["nodes"]}
    into: dict[str, float] = defaultdict(float)
    for link in graph["links"]:
        assert link["source"] in ends and link["target"] in ends
        into[link["target"]] += link["weight"]
    assert len({(link["source"], link["target"]) for link in graph["links"]}) == len(graph["links"])
    target, contrast = (node["node_id"] for node in of_type(graph, "logit"))
    owed: dict[str, float] = defaultdict(float)
    for edge in explanation.edges:
        owed[names.get(edge.target, "answer")] += edge.effect
    assert into[target] - into[contrast] == pytest.approx(owed.pop("answer"), abs=1e-6)
    assert into[target] == pytest.approx(-into[contrast])
    for name, effect in owed.items():
        assert into[name] == pytest.approx(effect, abs=1e-6)
    one = next(edge for edge in explanation.edges if edge.source in names and edge.target in names and edge.effect < 0)
    weights = {(link["source"], link["target"]): link["weight"] for link in graph["links"]}
    assert weights[names[one.source], names[one.target]] == pytest.approx(one.effect)


def test_logits_have_a_probability_that_the_viewers_can_read(graph: dict[str, Any], explanation: Explanation) -> None:
    shown = of_type(graph, "logit")
    assert explanation.contrast is not None
    assert [node["feature"] for node in shown] == [explanation.answer.id, explanation.contrast.id]
    assert [node["is_target_logit"] for node in shown] == [True, False]
    highest = max(int(node["layer"]) for node in of_type(graph, "cross layer transcoder"))
    for node, answer in zip(shown, explanation.dense, strict=False):
        assert node["token_prob"] == answer.probability
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(answer.probability, abs=5e-4)
        assert int(node["layer"]) > highest


def test_a_probability_that_is_not_listed_follows_from_the_difference(explanation: Explanation, tmp_path: Path) -> None:
    known = explanation.dense[0].probability
    fewer = replace(explanation, dense=explanation.dense[:1])
    shown = of_type(local(fewer, tmp_path), "logit")[1]
    assert shown["token_prob"] == pytest.approx(explanation.dense[1].probability, rel=1e-4)
    assert shown["token_prob"] < known


def test_against_every_other_token_there_is_one_logit(coupled: CoupledModels, tmp_path: Path) -> None:
    alone = explain(coupled, PROMPT)
    graph = checked(local(alone, tmp_path))
    (shown,) = of_type(graph, "logit")
    assert shown["feature"] == alone.answer.id and alone.contrast is None
    into = sum(link["weight"] for link in graph["links"] if link["target"] == shown["node_id"])
    drawn = {node.id for node in alone.opening_nodes}
    assert into == pytest.approx(sum(edge.effect for edge in alone.edges if edge.target not in drawn), abs=1e-5)
    (again,) = of_type(local(replace(alone, dense=alone.dense[1:]), tmp_path), "logit")
    assert again["token_prob"] == pytest.approx(shown["token_prob"], rel=1e-4)  # which follows from d


def test_errors_are_error_nodes(graph: dict[str, Any], explanation: Explanation) -> None:
    errors = [node for node in explanation.opening_nodes if node.kind == ERROR]
    shown = of_type(graph, "mlp reconstruction error")
    assert errors and [(node["ctx_idx"], node["activation"]) for node in shown] == [(e.position, e.activation) for e in errors]
    assert {node["feature"] for node in shown}.isdisjoint(node["feature"] for node in of_type(graph, "cross layer transcoder"))
    answer = int(of_type(graph, "logit")[0]["layer"])
    assert all(int(node["layer"]) == min(graph["rows"] * e.layer // 2, answer - 1) for node, e in zip(shown, errors, strict=True))


def test_groups_are_supernodes(explanation: Explanation, tmp_path: Path) -> None:
    strongest = sorted(channels(explanation), key=lambda node: -abs(node.effect or 0))
    members = tuple(node.id for node in strongest[:3])
    group = ExplainedGroup(0, "L0: reads 50%", members, (0,), (0,), "MLP", 1.0, None)
    grouped = replace(explanation, groups=(group, replace(group, id=1, nodes=members[:1])))
    (found,) = checked(local(grouped, tmp_path))["qParams"]["supernodes"]
    assert found[0] == "L0: reads 50\uff05" and len(found) == 4


def test_influence_is_a_cumulative_share(graph: dict[str, Any], explanation: Explanation) -> None:
    effects = [abs(node.effect or 0) for node in channels(explanation)]
    shares = [node["influence"] for node in of_type(graph, "cross layer transcoder")]
    order = sorted(range(len(effects)), key=lambda place: -effects[place])
    assert [shares[place] for place in order] == sorted(shares)
    given: dict[str, float] = defaultdict(float)
    for link in graph["links"]:
        given[link["source"]] += abs(link["weight"])
    tokens = [given[node["node_id"]] for node in of_type(graph, "embedding")]
    errors = [abs(node.effect or 0) for node in explanation.opening_nodes if node.kind == ERROR]
    total, most = sum(effects) + sum(errors) + sum(tokens), max(*effects, *errors, *tokens)
    assert min(node["influence"] for node in graph["nodes"] if node["feature_type"] != "logit") == pytest.approx(most / total)
    assert max(shares) == pytest.approx(1)


def test_the_page_opens_at_nodes_that_are_there(graph: dict[str, Any]) -> None:
    ends, state = {node["node_id"] for node in graph["nodes"]}, graph["qParams"]
    assert state["clickedId"] == of_type(graph, "logit")[0]["node_id"]
    assert set(state["pinnedIds"]) <= ends and len(state["pinnedIds"]) > 2
    for label, *members in state["supernodes"]:
        assert set(members) <= set(state["pinnedIds"]) and len(members) > 1 and label


def test_what_the_profiles_differ_in(explanation: Explanation, tmp_path: Path) -> None:
    first, second = local(explanation, tmp_path), hosted(explanation, tmp_path / "np.json")
    assert first["metadata"]["scan"] == "./data/features" and second["metadata"]["scan"] == "gpt2-small"
    assert first["metadata"]["schema_version"] == second["metadata"]["schema_version"] == 1
    assert not (tmp_path / "np-features").exists()
    url = "https://example.org/features/"
    third = checked(hosted(explanation, tmp_path / "self" / "np.json", features_url=url))
    assert third["metadata"]["feature_details"] == {"feature_json_base_url": url.rstrip("/")}
    numbers = {node["feature"] for node in of_type(third, "cross layer transcoder")}
    assert {int(file.stem) for file in (tmp_path / "self" / "features").iterdir()} == numbers


# -- the folder of the local front end ----------------------------------------------------------------------------------------


def test_a_graph_of_the_same_name_is_replaced_and_others_stay(explanation: Explanation, tmp_path: Path) -> None:
    for slug in ("one", "two", "one"):
        local(explanation, tmp_path, slug=slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [each["slug"] for each in listed] == ["two", "one"]
    assert listed[1] == json.loads((tmp_path / "one.json").read_text())["metadata"]
    assert not [file for file in tmp_path.rglob(".*")]


def test_the_address_names_the_graph_and_groups_that_are_there(explanation: Explanation, tmp_path: Path) -> None:
    done = export(explanation, tmp_path, slug="mine")
    address = next(step for step in done.next if step.startswith("http"))
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)
    graph = json.loads(done.file.read_text())
    assert query["slug"] == ["mine"] and 0 < float(query["pruningThreshold"][0]) <= 1
    assert json.loads(query["supernodes"][0]) == graph["qParams"]["supernodes"]
    assert "%" not in query["supernodes"][0]  # which the page decodes twice
    assert (done.nodes, done.links) == (len(graph["nodes"]), len(graph["links"]))


def test_two_couplings_do_not_share_a_folder(explanation: Explanation, tmp_path: Path) -> None:
    local(explanation, tmp_path)
    other = replace(explanation, provenance=replace(explanation.provenance, dense_fingerprint="0" * 64))
    with pytest.raises(ExportError, match="holds graphs of another coupling"):
        export(other, tmp_path)
    (tmp_path / "graph-metadata.json").write_text('{"graphs": [{"slug": "theirs", "scan": "gemma-2-2b"}]}')
    local(other, tmp_path)
    assert len(json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]) == 2


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"graphs": [1]}'])
def test_a_list_of_graphs_that_is_none_is_left_alone(explanation: Explanation, tmp_path: Path, content: str) -> None:
    (tmp_path / "graph-metadata.json").write_text(content)
    with pytest.raises(ExportError, match="is no list of graphs as circuit-tracer writes it"):
        export(explanation, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["graph-metadata.json"]
    assert (tmp_path / "graph-metadata.json").read_text() == content


def test_a_name_is_made_of_the_question_alone(explanation: Explanation, tmp_path: Path) -> None:
    one, two = (local(explanation, tmp_path / name)["metadata"]["slug"] for name in "ab")
    assert explanation.contrast is not None
    others = (
        replace(explanation, answer=explanation.contrast, contrast=explanation.answer),
        replace(explanation, contrast=None),
    )
    slugs = {local(other, tmp_path / "c")["metadata"]["slug"] for other in others}
    assert one == two and len({one, *slugs}) == 3


# -- features -----------------------------------------------------------------------------------------------------------------


def features(folder: Path) -> dict[int, dict[str, Any]]:
    found = {int(file.stem): json.loads(file.read_text()) for file in (folder / "features").iterdir()}
    for number, feature in found.items():
        FEATURE.validate(feature)
        assert feature["index"] == number
    return found


def test_without_facts_a_feature_shows_the_prompt(explanation: Explanation, tmp_path: Path) -> None:
    graph = local(explanation, tmp_path)
    found = features(tmp_path)
    assert set(found) == {node["feature"] for node in of_type(graph, "cross layer transcoder")}
    for shown in of_type(graph, "cross layer transcoder"):
        (quantile,) = found[shown["feature"]]["examples_quantiles"]
        (example,) = quantile["examples"]
        assert example["tokens"] == [token.text for token in explanation.tokens]
        assert example["tokens_acts_list"][shown["ctx_idx"]] == shown["activation"] <= found[shown["feature"]]["act_max"]


@pytest.fixture(scope="module")
def pages(coupled: CoupledModels, explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NodePage]:
    folder = tmp_path_factory.mktemp("coupling")
    collect_nodes(coupled, folder=folder)
    found = node_pages(replace(coupled, path=str(folder)), explanation)
    assert found is not None and set(found) == {node.name for node in channels(explanation)}
    return found


def test_with_facts_a_feature_shows_its_side_of_the_channel(
    explanation: Explanation, pages: dict[str, NodePage], tmp_path: Path
) -> None:
    graph = local(explanation, tmp_path, pages=pages)
    found = features(tmp_path)
    for shown, node in zip(of_type(graph, "cross layer transcoder"), channels(explanation), strict=True):
        feature, page = found[shown["feature"]], pages[node.name]
        side = page.low if node.activation < 0 else page.high
        strongest = [e for q in feature["examples_quantiles"] if q["quantile_name"] == "strongest" for e in q["examples"]]
        assert [example["tokens_acts_list"][1] for example in strongest] == [abs(context.value) for context in side]
        assert [example["tokens"] for example in strongest] == [[c.before, c.token, c.after] for c in side]
        assert feature["activation_frequency"] == page.active
        if page.tokens == "promoted" and page.promotes and page.demotes:
            assert feature["top_logits"][0] == (page.demotes if node.activation < 0 else page.promotes)[0].text


def test_facts_of_another_model_are_refused(coupled: CoupledModels, explanation: Explanation) -> None:
    other = replace(explanation, provenance=replace(explanation.provenance, dense_fingerprint="0" * 64))
    with pytest.raises(ExplainError, match="the explanation was made with another dense model than"):
        node_pages(coupled, other)
    refitted = replace(explanation, provenance=replace(explanation.provenance, coupling_fingerprint="0" * 64))
    with pytest.raises(ExplainError, match="was made with other weights "):
        node_pages(coupled, refitted)
    assert node_pages(replace(coupled, path=None), explanation) is None


# -- networkx and GraphML -----------------------------------------------------------------------------------------------------


def same(one: nx.DiGraph, other: nx.DiGraph) -> bool:
    return one.graph == other.graph | {"node_default": {}, "edge_default": {}} and (
        dict(one.nodes(data=True)),
        list(one.edges(data=True)),
    ) == (dict(other.nodes(data=True)), list(other.edges(data=True)))


def test_graphml_read_back_is_the_explanation(explanation: Explanation, tmp_path: Path) -> None:
    export(explanation, tmp_path / "graph.graphml", "graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml")
    assert same(read, to_networkx(explanation))
    assert [(e.source, e.target, e.kind, e.weight, e.effect) for e in explanation.edges] == [
        (source, target, values["kind"], values["weight"], values["effect"])
        for source, target, values in sorted(read.edges(data=True), key=lambda edge: order(explanation)[edge[:2]])
    ]
    for node in explanation.opening_nodes:
        values = read.nodes[node.id]
        assert values["activation"] == node.activation and values.get("effect") == node.effect
        assert (values["layer"], values["kind"], values["index"], values["position"]) == (
            node.layer, node.kind, node.index, node.position,
        )  # fmt: skip
        assert "label" not in values


def order(explanation: Explanation) -> dict[tuple[str, str], int]:
    return {(edge.source, edge.target): place for place, edge in enumerate(explanation.edges)}


# -- hostile and odd ----------------------------------------------------------------------------------------------------------


def fewer(explanation: Explanation, count: int = 40) -> Explanation:
    """The same explanation with some of its nodes alone, what lies between them, and every error."""
    nodes = tuple(node for place, node in enumerate(explanation.nodes) if place < count or node.kind == ERROR)
    gone = {node.id for node in explanation.nodes} - {node.id for node in nodes}
    groups = (replace(group, nodes=tuple(node for node in group.nodes if node not in gone)) for group in explanation.groups)
    edges = (edge for edge in explanation.edges if gone.isdisjoint((edge.source, edge.target)))
    return replace(explanation, nodes=nodes, groups=tuple(groups), edges=tuple(edges))


def disguised(explanation: Explanation, texts: list[str]) -> Explanation:
    """The same explanation with other texts: of the prompt, of tokens, answer, contrast, groups and labels."""
    count = len(explanation.tokens)
    tokens = tuple(replace(token, text=texts[place % len(texts)]) for place, token in enumerate(explanation.tokens))
    nodes = tuple(replace(node, label=texts[place % len(texts)]) for place, node in enumerate(explanation.nodes))
    assert explanation.contrast is not None
    answer, contrast = Token(explanation.answer.id, texts[0]), Token(explanation.contrast.id, texts[-1])
    groups = tuple(replace(group, label=texts[place % len(texts)]) for place, group in enumerate(explanation.groups))
    same = {"tokens": tokens[:count], "nodes": nodes, "groups": groups}
    return replace(explanation, prompt="".join(texts), answer=answer, contrast=contrast, **same)


@pytest.mark.parametrize("place", range(len(HOSTILE)))
def test_hostile_text_survives_as_text(explanation: Explanation, tmp_path: Path, place: int) -> None:
    texts = HOSTILE[place:] + HOSTILE[:place]
    odd = disguised(fewer(explanation), texts)
    graph = checked(local(odd, tmp_path / "folder"))
    assert graph["metadata"]["prompt"] == odd.prompt
    for words in (*graph["metadata"]["prompt_tokens"], *(node["clerp"] for node in graph["nodes"])):
        assert not re.search(r"<[a-zA-Z/!?]", words)  # would be a tag where the viewers put it
    for node in of_type(graph, "logit"):
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=5e-4)
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", graph["metadata"]["slug"])
    features(tmp_path / "folder")
    export(odd, tmp_path / "graph.graphml", "graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml")
    assert same(read, to_networkx(odd))
    assert json.loads(read.graph["prompt"]) == odd.prompt
    assert [json.loads(read.nodes[node.id]["label"]) for node in odd.opening_nodes] == [node.label for node in odd.opening_nodes]


def test_a_circuit_without_nodes_is_a_graph_of_tokens_and_logits(explanation: Explanation, tmp_path: Path) -> None:
    empty = replace(explanation, nodes=(), edges=())
    graph = checked(local(empty, tmp_path))
    assert {node["feature_type"] for node in graph["nodes"]} == {"embedding", "logit"} and graph["links"] == []
    assert export(empty, tmp_path / "graph.graphml", "graphml").nodes == 0


def test_what_cannot_be_exported_is_one_line(explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    one = replace(explanation, tokens=explanation.tokens[:1])
    low = replace(explanation, nodes=tuple(node for node in channels(explanation) if not node.layer), edges=())
    lost = replace(explanation, edges=(replace(explanation.edges[0], target="L0.mlp_act[3]@99"),))
    strange = replace(explanation, nodes=(replace(explanation.nodes[0], kind="router", level=0),), edges=())
    neuronpedia: dict[str, Any] = {"to": "neuronpedia", "scan": "gpt2-small"}
    cases: list[tuple[Explanation, dict[str, Any], str]] = [
        (explanation, {"to": "gexf"}, "there is no format 'gexf'; to= is one of circuit-tracer, neuronpedia, graphml"),
        *((explanation, {"slug": slug}, f"slug={slug!r} is not valid") for slug in ("..", "a/b", ".a", "a b", "x" * 101)),
        (explanation, {"slug": "graph-metadata"}, "slug='graph-metadata' is the name of the list of graphs"),
        (explanation, {"to": "neuronpedia"}, "Neuronpedia lists graphs under its own model ids"),
        (explanation, {**neuronpedia, "scan": "a/b"}, "scan='a/b' is not valid"),
        (explanation, {"scan": "gpt2-small"}, "scan= and features_url= are for Neuronpedia only"),
        (explanation, {**neuronpedia, "features_url": "http://x"}, "'http://x' is no address that Neuronpedia fetches"),
        (low, neuronpedia, "no node is above block 0, and Neuronpedia does not open such a graph"),
        (one, {}, "the prompt is a single token, and the viewers draw no node of such a prompt"),
        (lost, {"to": "graphml"}, "has a node 'L0.mlp_act[3]@99' that is at no token of its prompt; explain again"),
        (strange, {}, "of the unknown kind 'router'; explain again"),
        (explanation, {"path": tmp_path / "file" / "out"}, "could not write"),
    ]  # fmt: skip
    for which, options, message in cases:
        place = options.pop("path", tmp_path / "out")
        with pytest.raises(ExportError) as error:
            export(which, place, **options)
        assert message in str(error.value), options
        assert "\n" not in str(error.value) and isinstance(error.value, UserError)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(sys.modules["bridge.explanations.export"], "LARGEST", 2000)
    with pytest.raises(ExportError, match="bytes, and Neuronpedia takes 1,024 to 2,000"):
        export(explanation, tmp_path / "out", **neuronpedia)


def test_examples_are_on_one_line() -> None:
    assert viewer_graph._one_line("def f():\n\tpass\r") == "def f():\u23ce\u2192pass\u21b5"


def test_a_tag_is_only_where_a_browser_would_see_one() -> None:
    assert viewer_graph._escape_tags("a < b <= c <3 <<") == "a < b <= c <3 <<"
    assert viewer_graph._escape_tags("<b </b <!-- <?") == "\uff1cb \uff1c/b \uff1c!-- \uff1c?"


# -- the command --------------------------------------------------------------------------------------------------------------


def test_the_command(explanation: Explanation, tmp_path: Path) -> None:
    file = tmp_path / "explanation.json"
    file.write_text(json.dumps(explanation.to_json()))
    result = run("export", file, "--to", "circuit-tracer", "--out", tmp_path / "out", "--slug", "mine")
    assert result.exit_code == 0, result.output
    assert f"wrote {tmp_path / 'out' / 'mine.json'}: " in result.stdout
    assert "features show only this prompt; run `bridge nodes`" in result.stdout
    assert f"circuit-tracer start-server --graph_file_dir {tmp_path / 'out'}" in result.stdout
    assert checked(json.loads((tmp_path / "out" / "mine.json").read_text())) == local(
        explanation, tmp_path / "again", slug="mine"
    )
    result = run("export", file, "--to", "graphml", "--out", tmp_path / "graph.graphml")
    assert result.exit_code == 0 and same(nx.read_graphml(tmp_path / "graph.graphml"), to_networkx(explanation))
    result = run("export", file, "--to", "neuronpedia", "--out", tmp_path / "np.json", "--scan", "gpt2-small")
    assert "https://www.neuronpedia.org/gpt2-small/graph?slug=" in result.stdout


def test_the_command_takes_features_from_the_coupling(
    coupled: CoupledModels, explanation: Explanation, dense_folder: Path, tmp_path: Path
) -> None:
    saved = replace(coupled, dense=load_dense(dense_folder))
    saved.save_pretrained(tmp_path / "coupling")
    collect_nodes(saved, folder=tmp_path / "coupling")
    file = tmp_path / "explanation.json"
    provenance = replace(explanation.provenance, coupling=str(tmp_path / "coupling"))
    file.write_text(json.dumps(replace(explanation, provenance=provenance).to_json()))
    for options in ([], ["--bridge", tmp_path / "coupling"]):
        result = run("export", file, "--to", "circuit-tracer", "--out", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        assert "bridge nodes" not in result.stdout
        assert any(feature["top_logits"] for feature in features(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("{", "holds no explanation"),
        ("[1]", "holds no explanation (it is not a JSON object); name a file that `bridge explain` wrote"),
        ("{}", "this is no explanation that this version reads (format None, not 3); explain again"),
    ],
)
def test_the_command_refuses(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "explanation.json"
    if content is not None:
        file.write_text(content)
    assert_refused(run("export", file, "--to", "graphml", "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
