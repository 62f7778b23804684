"""The page in a real browser, as a person uses it; skipped where there is no Chromium."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.explained import hostile, made_up
from support.page_browser_cases import CHROMIUM, WIDE, Watched, playwright, serving
from support.server_cases import PROMPT, until

from bridge.explanations.build import explain
from bridge.explanations.page import render_html
from bridge.models.bridges import CoupledModels
from bridge.server.library import Library

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")

SERVED = "http://bridge.test/api/explanations/abc/page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport=WIDE, color_scheme="light", reduced_motion="reduce", accept_downloads=True)
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def show(context: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Watched]]:
    """Show page data from a file; whatever the page then does wrong fails the test."""
    shown: list[Watched] = []

    def show(data: dict[str, Any]) -> Watched:
        file = tmp_path / f"page{len(shown)}.html"
        file.write_text(render_html(data), encoding="utf-8")
        shown.append(Watched(context.new_page()))
        shown[-1].open(file.as_uri())
        return shown[-1]

    yield show
    for each in shown:
        assert each.wrong == []
        assert set(each.requests) <= {"file", "blob", "data"}


def strongest(data: dict[str, Any], rank: int = 0) -> dict[str, Any]:
    """The `rank`th node by effect of those that are in a group."""
    nodes = [node for node in data["explanation"]["nodes"] if node["group"] is not None and node["kind"] != "error"]
    return sorted(nodes, key=lambda node: -abs(node["effect"]))[rank]


def node_at(page: Any, data: dict[str, Any], rank: int = 0) -> tuple[Any, dict[str, Any]]:
    """A node, its group open, and what the data says of it."""
    node = strongest(data, rank)
    drawn = page.locator(f'[id="node-{node["id"]}"]')
    if not drawn.count():
        page.locator(f'[id="part-group:{node["group"]}"]').dispatch_event("click")
    return drawn, node


def parts_of(data: dict[str, Any], level: int) -> dict[str, list[dict[str, Any]]]:
    """The nodes of every card that a nested circuit has: of a group, an error, or what the circuit adds at a place."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in data["explanation"]["nodes"]:
        if node["level"] <= level:
            half = "attention" if node["kind"] in ("attn_in", "q", "k", "v", "attn_out") else "mlp"
            added = f"more {node['layer']} {half} {node['position']}"
            error = f"error:{node['layer']}@{node['position']}"
            key = error if node["kind"] == "error" else added if node["group"] is None else f"group:{node['group']}"
            found.setdefault(key, []).append(node)
    return found


BOXES = """() => [...document.querySelectorAll('.plot .card > g:not(.leaf) > .frame, .plot .card > .frame')].map((frame) => {
  const {x, y, width, height} = frame.getBBox();
  return [x, y, x + width, y + height];
})"""


def overlapping(boxes: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """Pairs of boxes that lie over each other."""
    return [
        (one, other)
        for place, one in enumerate(boxes)
        for other in boxes[:place]
        if min(one[2], other[2]) - max(one[0], other[0]) > 0.5 and min(one[3], other[3]) - max(one[1], other[1]) > 0.5
    ]


def test_a_group_opens_into_its_nodes_and_a_node_says_what_it_is(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    page = show(data).page
    explanation = data["explanation"]
    assert page.locator("#verdict .verdict-word").inner_text() == "Representational"
    assert page.locator("h1").inner_text() == "Why does : follow at all?"
    assert "against all other tokens: a span of 9.40 nats to explain, from " in page.locator(".question").inner_text()
    node = strongest(data)
    group = explanation["groups"][node["group"]]
    card = page.locator(f'[id="part-group:{group["id"]}"]')
    many = len(group["nodes"])
    size = f"{many} node{'s' if many > 1 else ''}"
    assert size in card.text_content()
    assert f"{abs(group['effect']):.2f}" in card.text_content()
    assert page.locator(".plot .leaf").count() == 0
    card.click()
    sheet = page.locator("#sheet")
    assert page.locator(".plot .leaf").count() == many
    assert group["name"] in sheet.inner_text() and f"{size}, layer" in sheet.inner_text()
    assert overlapping(page.evaluate(BOXES)) == []
    leaf = page.locator(f'[id="node-{node["id"]}"]')
    leaf.click()
    told = sheet.inner_text()
    assert node["name"] in told and f"{abs(node['effect']):.3g}"[:3] in told and f"({node['position']})" in told
    assert f"at 'while' ({node['name']})" in told and "value in the circuit" in told  # what it is on text, and here
    assert leaf.get_attribute("aria-pressed") == "true"
    ins = [edge for edge in explanation["edges"] if edge["target"] == node["id"]]
    assert sheet.locator("section.listed").first.locator("li").count() == min(len(ins), 13)
    sheet.get_by_role("button", name=f"Group: {group['name']}").click()
    assert page.locator(".plot .leaf").count() == many  # to look at it closes nothing
    page.locator(f'[id="part-group:{group["id"]}"]').click(position={"x": 20, "y": 8})
    assert page.locator(".plot .leaf").count() == 0


def test_the_slider_walks_the_nested_circuits(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    page = show(data).page
    explanation = data["explanation"]
    slider, bar = page.locator("#level"), page.locator("#bar")
    assert slider.input_value() == "1"
    for level, nested in enumerate(explanation["nested"]):
        slider.fill(str(level))
        parts = parts_of(data, level)
        assert page.locator(".plot .card").count() == len(parts)
        told = bar.inner_text()
        assert f"{nested['nodes']:,} nodes" in told and f"{nested['faithfulness']:.2f}" in told
        listed = sum(map(len, parts.values()))
        left = nested["nodes"] - listed
        assert (f"{left:,} more are counted and measured, but not drawn" in told) == (left > 0)
        assert ("The verdict, effects and edges are those of the circuit at F 0.9" in told) == (level != 1)
    slider.fill("0")
    smaller = next(key for key, nodes in parts_of(data, 0).items() if len(nodes) < len(parts_of(data, 1)[key]))
    size, whole = len(parts_of(data, 0)[smaller]), len(parts_of(data, 1)[smaller])
    assert f"{size} of {whole} nodes" in page.locator(f'[id="part-{smaller}"]').get_attribute("aria-label")
    slider.fill("1")
    page.get_by_role("button", name="Open all groups").click()
    inside = [node for node in explanation["nodes"] if node["level"] <= 1 and node["kind"] != "error"]
    assert page.locator(".plot .leaf").count() == len(inside)
    page.get_by_role("button", name="Close all groups").click()
    assert page.locator(".plot .leaf").count() == 0


def test_an_error_is_drawn_as_what_it_is(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(40, errors=2)
    error = next(node for node in data["explanation"]["nodes"] if node["kind"] == "error")
    page = show(data).page
    card = page.locator(f'[id="part-error:{error["layer"]}@{error["position"]}"]')
    assert f"error at site {error['layer']}" in card.text_content() and "unexplained" in card.text_content()
    assert card.locator(".hatched").count() == 1
    card.click()
    assert "unexplained by the sparse model" in page.locator("#sheet").inner_text()
    assert page.locator(".plot .leaf").count() == 0  # there is nothing in it to open
    assert "error: unexplained by the sparse model" in page.locator("#legend").inner_text()


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_through_pages_of_all_sizes(show: Callable[[dict[str, Any]], Watched], seed: int) -> None:
    draw = random.Random(seed)
    nodes, tokens, layers = draw.randint(1, 100), draw.randint(1, 60), draw.randint(1, 8)
    data = made_up(
        nodes, tokens, layers=layers, errors=draw.randint(0, 3), contrast=seed % 3 == 0, above=draw.random() * 3, seed=seed
    )
    page = show(data).page
    page.set_viewport_size({"width": (1000, 1440)[seed % 2], "height": 800 + 100 * (seed % 2)})
    plot = page.locator("#plot").bounding_box()
    assert plot["width"] > 500 and plot["height"] > 300
    for level in (1, 0, 2):
        page.locator("#level").fill(str(level))
        # at once, since the page is laid out anew when the window's size has changed
        size = "['width', 'height'].map((side) => Number(document.querySelector('.plot').getAttribute(side)))"
        boxes, (width, height) = page.evaluate(f"() => [({BOXES})(), {size}]")
        assert len(boxes) == len(parts_of(data, level)) and overlapping(boxes) == []
        assert all(x >= 0 and y >= 0 and right <= width and below <= height for x, y, right, below in boxes)
    page.locator("#level").fill("1")
    page.locator("#open-all").click()
    boxes = page.evaluate(BOXES)
    assert overlapping(boxes) == [] and page.locator(".plot .leaf").count() > 0
    for tab in ("Groups and nodes", "Attention", "Evidence"):
        page.get_by_role("tab", name=tab).click()
    cut_off = """() => [...document.querySelectorAll('.plot .card > g, .plot .leaf')].filter((each) => {
      const [frame, ...texts] = [each.querySelector('.frame'), ...each.querySelectorAll('text')];
      const box = frame.getBBox();
      return texts.some((text) => {
        const {x, width} = text.getBBox();
        return x < box.x - 1 || x + width > box.x + box.width + 1;
      });
    }).map((each) => each.textContent)"""
    assert page.evaluate(cut_off) == []


def test_a_page_of_500_nodes_is_there_within_a_second(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(500, 40, layers=8)
    page = show(data).page
    assert float(page.evaluate("document.documentElement.dataset.ready")) < 3000  # a third of it on an idle core
    assert page.locator(".plot .card").count() == len(parts_of(data, 1))
    page.locator("#open-all").click()
    assert page.locator(".plot .leaf").count() > 450


def test_a_label_is_kept(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    watched = show(data)
    page = watched.page
    drawn, node = node_at(page, data)
    drawn.dispatch_event("click")
    label = page.locator(".label-input")
    assert label.input_value() == "" and label.get_attribute("placeholder") == node["label"]
    label.fill("the one that <b>counts</b>")
    label.press("Enter")
    assert "kept in this browser" in page.locator("#sheet").inner_text()
    page.reload()
    watched.ready()
    node_at(page, data)[0].dispatch_event("click")
    assert page.locator(".label-input").input_value() == "the one that <b>counts</b>"
    page.locator("#find").fill("<b>counts")
    assert node["name"] in page.locator("#found").inner_text()

    other = made_up(60)
    other["explanation"]["provenance"]["coupling_fingerprint"] = "another"
    again = show(other).page
    node_at(again, other)[0].dispatch_event("click")
    assert again.locator(".label-input").input_value() == ""  # the labels are another coupling's


def give_label(page: Any, data: dict[str, Any], rank: int, text: str) -> None:
    node_at(page, data, rank)[0].dispatch_event("click")
    page.locator(".label-input").fill(text)
    page.locator(".label-input").press("Enter")


def label_of(page: Any, data: dict[str, Any], rank: int) -> str:
    node_at(page, data, rank)[0].dispatch_event("click")
    return page.locator(".label-input").input_value()


def test_two_open_pages_keep_each_others_labels(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(10)
    data["explanation"]["provenance"]["coupling_fingerprint"] = "two pages"
    one = show(data)
    give_label(one.page, data, 0, "of before")
    two = show(data)
    assert label_of(two.page, data, 0) == "of before"
    give_label(one.page, data, 1, "of the first page")
    give_label(two.page, data, 2, "of the second page")
    give_label(one.page, data, 0, "")  # which the second page read when it was opened
    give_label(two.page, data, 3, "of the second page too")
    for each in (one, two):
        each.page.reload()
        each.ready()
        labels = [label_of(each.page, data, rank) for rank in range(4)]
        assert labels == ["", "of the first page", "of the second page", "of the second page too"]


def test_hostile_texts_are_text(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = hostile(made_up(620, 120))
    page = show(data).page
    elements = "script, img, iframe, base, style, object, embed, link, meta"
    assert page.locator(elements).count() == 3 + 1 + 4  # the page's own: scripts, a style, metas
    assert page.locator("h1 .token").first.inner_text() == "<script>alert(1)</script>"
    assert "</script><script>alert(1)</script>" in page.locator(".prompt").inner_text().replace("\n", "")
    assert "\\u202egnp.exe" in page.locator(".prompt").inner_text()
    assert page.evaluate("document.dir + getComputedStyle(document.body).direction") == "ltr"
    page.locator("#open-all").click()
    for place in range(0, page.locator(".plot .leaf").count(), 80):
        page.locator(".plot [data-key]").nth(place).dispatch_event("pointerenter")
        page.locator(".plot .leaf").nth(place).dispatch_event("click")
    assert page.locator(elements).count() == 3 + 1 + 4
    for tab in ("Attention", "Evidence"):
        page.get_by_role("tab", name=tab).click()
    page.locator("#find").fill("<script>")
    assert page.locator("#found [role=option]").count() > 1
    node_at(page, data, 5)[0].dispatch_event("click")
    for text in ("<img src=x onerror=alert(1)>", "__proto__", "\u202e\u2066"):
        page.locator(".label-input").fill(text)
        page.locator(".label-input").press("Enter")
    assert page.locator(elements).count() == 3 + 1 + 4


def test_a_label_may_have_any_name(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(8, errors=0)
    names = ("__proto__", "constructor", "toString")
    for rank, name in enumerate(names):
        strongest(data, rank)["name"] = name
    page = show(data).page
    for rank, name in enumerate(names):
        assert label_of(page, data, rank) == ""
        give_label(page, data, rank, f"mine {name}")
    page.reload()
    assert [label_of(page, data, rank) for rank in range(3)] == [f"mine {name}" for name in names]


def test_everything_is_reached_by_keys(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    page = show(data).page
    page.keyboard.press("ArrowUp")
    first = page.evaluate("document.activeElement.id")
    assert first.startswith(("part-group:", "part-error:"))
    seen = set()
    for key in ("ArrowDown", "ArrowLeft", "ArrowUp", "ArrowRight") * 3:
        page.keyboard.press(key)
        seen.add(page.evaluate("document.activeElement.id"))
    assert len(seen) > 2 and all(name.startswith("part-") for name in seen)
    assert page.locator("#live").inner_text()
    page.keyboard.press("o")
    assert page.locator(".plot .leaf").count() > 20
    page.keyboard.press("o")
    node = strongest(data)
    page.keyboard.press("/")
    page.keyboard.type(node["id"])
    page.keyboard.press("Enter")
    assert node["name"] in page.locator(".who").inner_text()
    assert page.evaluate("document.activeElement.id") == f"node-{node['id']}"  # what is found has the focus, its group open
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "sheet"
    page.keyboard.press("l")
    assert page.evaluate("document.activeElement.className") == "label-input"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator(".chosen").count() == 0
    leaves = page.locator(".plot .leaf").count()
    group = page.locator(f'[id="part-group:{node["group"]}"]')
    group.dispatch_event("click")
    assert page.locator(".plot .leaf").count() == 0
    group.focus()
    page.keyboard.press("Enter")
    assert page.locator(".plot .leaf").count() == leaves
    page.keyboard.press("[")
    assert page.locator("#level").input_value() == "0"
    page.keyboard.press("1")
    assert "Nested circuits" in page.locator("#sheet").inner_text()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert "find a node" in page.locator("#help").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_what_there_is_not_is_said(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(20, attention=False)
    data["nodes"] = {}
    page = show(data).page
    page.get_by_role("tab", name="Groups and nodes").click()
    assert page.locator("#sheet button.row").count() == len(parts_of(data, 1))  # all of the circuit, until one is chosen
    node_at(page, data)[0].dispatch_event("click")
    assert "run bridge nodes" in page.locator("#sheet").inner_text()
    page.get_by_role("tab", name="Attention").click()
    assert "there is no attention to show" in page.locator("#sheet").inner_text()
    nothing = show(made_up(explained=False)).page
    assert nothing.locator("#verdict .verdict-word").inner_text() == "No explanation"
    assert "There is no circuit to draw" in nothing.locator(".plot").text_content()
    nothing.get_by_role("tab", name="Groups and nodes").click()
    assert "The circuit has no nodes" in nothing.locator("#sheet").inner_text()


def test_evidence_is_judged_by_its_numbers(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(backup=True)
    measures = data["explanation"]["report"]["measures"]
    measures[1]["criterion"] = {"op": ">=", "bound": 0.2, "beyond_control": True, "control_bound": 0.1}
    measures[5] |= {"value": 0.31, "passed": False}
    page = show(data).page
    drawn = page.locator(".measure")
    assert drawn.count() == len(measures)
    for place, measure in enumerate(measures):
        told = drawn.nth(place).inner_text()
        word = {True: "passed", False: "failed", None: "not judged" if measure["criterion"] else ""}[measure["passed"]]
        assert measure["name"] in told and word in told
    axis = drawn.nth(1)
    assert "asked ≥ 0.2, above the control, control ≤ 0.1" in axis.inner_text()
    aim, dot = (axis.locator(name).bounding_box() for name in (".aim", "circle.value"))
    assert aim["x"] <= dot["x"] + dot["width"] / 2 <= aim["x"] + aim["width"]  # a region where it passes, the dot within
    assert "0.3" in axis.locator(".axis .tick-text").all_text_contents()  # it begins at the control's bar
    aim, dot = (drawn.nth(5).locator(name).bounding_box() for name in (".aim", "circle.value"))
    assert dot["x"] > aim["x"] + aim["width"]  # failed: at most .2 is asked
    assert "no bound" in drawn.nth(4).inner_text() and "not measured" in drawn.nth(8).inner_text()
    assert drawn.nth(6).locator(".interval").count() == 1 and drawn.nth(6).locator(".points tr").count() == 1 + 8
    assert drawn.nth(7).locator(".profile circle").count() == len(measures[7]["points"])
    nested = page.locator(".nested")
    assert nested.locator("thead th").all_inner_texts() == ["F 0.8", "F 0.9", "F 0.95", "F 0.99", "full KL"]
    assert "31 other nodes back it up" in page.locator("#sheet").inner_text()
    rules = page.locator("#rules").inner_text()
    assert "✓ faithfulness of the circuit alone" in rules and "✗ share of the span left without it" in rules
    assert "replacement 0.71, completeness 0.88" in page.locator("#legend").inner_text()


def test_what_an_edge_says_and_how_many_there_are(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    links = data["explanation"]["group_edges"]
    page = show(data).page
    drawn = page.locator(".edges:not(.focus) path")
    least = [link for link in links if abs(link["effect"]) >= 0.01 * abs(links[0]["effect"])][:90]
    assert drawn.count() == len(least)
    assert f"the {len(least)} strongest of {len(links)} edges" in page.locator("#legend").inner_text()
    assert all(" nats by " in title for title in drawn.locator("title").all_text_contents())
    link = next(link for link in links if link["target"] == "answer" and link["source"].startswith("group:"))
    page.locator(f'[id="part-{link["source"]}"]').dispatch_event("click")
    row = page.locator("#sheet .listed", has_text="first order").locator("li", has_text="the answer")
    assert f"{abs(link['effect']):.2f}"[:4] in row.inner_text() or abs(link["effect"]) < 0.1
    node = data["explanation"]["groups"][int(link["source"][6:])]["nodes"][0]
    edge = next((edge for edge in data["explanation"]["edges"] if edge["source"] == node), None)
    page.locator(f'[id="node-{node}"]').dispatch_event("click")
    if edge is not None:
        assert f"{edge['kind']}, weight" in page.locator("#sheet .listed").last.inner_text()


def test_the_attention_of_a_head(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(30)
    page = show(data).page
    page.get_by_role("tab", name="Attention").click()
    page.locator("select").select_option("2")
    head = data["explanation"]["attention"][2]
    assert page.locator(".attended span").count() == len(data["explanation"]["tokens"])
    assert page.locator(".tokens .weight").count() == sum(read["weight"] > 0.004 for read in head["reads"])
    page.locator(".reads button").nth(1).click()
    told = page.locator("#sheet").inner_text()
    assert "channel 3" in told and "sink" in told and "20.0%" in told and "pattern alone" in told
    bars = page.locator(".reads .weight")
    assert len({round(bar.bounding_box()["x"]) for bar in bars.all()}) == 1
    page.get_by_role("tab", name="Evidence").click()
    assert page.locator(".tokens .weight").count() == 0


def test_heads_are_listed_as_the_explanation_lists_them(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(30)
    for head, effect in zip(data["explanation"]["attention"], (-2.0, 0.3, 0.1, 0.0), strict=True):
        head["effect"] = effect
    page = show(data).page
    page.get_by_role("tab", name="Attention").click()
    options = page.locator("select option").all_inner_texts()
    assert [option.rpartition(" ")[2] for option in options] == ["−2.00", "+0.30", "+0.10", "+0.00"]
    assert "3 more heads" in page.locator("#sheet").inner_text()
    assert "L0 head 0 reads" in page.locator(".corner").inner_text()


def test_themes_and_widths(show: Callable[[dict[str, Any]], Watched]) -> None:
    watched = show(made_up(40, 100))
    page = watched.page

    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.locator("#theme").click()
    dark = ground()
    assert dark != light
    page.reload()
    watched.ready()
    assert ground() == dark
    page.emulate_media(color_scheme="dark")
    page.evaluate("localStorage.removeItem('bridge-theme')")
    page.reload()
    watched.ready()
    assert ground() == dark
    for width in (360, 700, 1000, 2000):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#plot").bounding_box()["width"] > 250
    page.set_viewport_size({"width": 360, "height": 800})
    plot = page.locator("#plot")
    assert plot.evaluate("element => element.scrollWidth > element.clientWidth")  # cards scroll, the names of rows stay
    plot.evaluate("element => element.scrollTo(90, 0)")
    names, box = page.locator("#plot .names").bounding_box(), plot.bounding_box()
    assert names["x"] == pytest.approx(box["x"], abs=2)


def test_a_small_window_leaves_room_for_the_circuit(show: Callable[[dict[str, Any]], Watched]) -> None:
    page = show(made_up(200, 18)).page
    page.set_viewport_size({"width": 1000, "height": 700})
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    plot = page.locator("#plot").bounding_box()
    assert min(700, plot["y"] + plot["height"]) - plot["y"] >= 280
    why = page.locator("#verdict summary")
    assert why.is_visible() and not page.locator(".reasons").is_visible()
    why.click()
    assert page.locator(".reasons").is_visible()


_CONTRASTS = """() => {
  const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const read = () => [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3);
  const paint = (colour) => ((pixel.fillStyle = colour), pixel.fillRect(0, 0, 1, 1));
  const linear = (part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  return [...document.querySelectorAll(".token i, .prompt i, .context i")].map((mark) => {
    const above = [];
    for (let each = mark; each; each = each.parentElement) above.unshift(getComputedStyle(each).backgroundColor);
    above.forEach(paint);
    const behind = light(read());
    paint(getComputedStyle(mark).color);
    const [low, high] = [behind, light(read())].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contexts_show_their_token_and_marks_for_spaces_can_be_read(
    show: Callable[[dict[str, Any]], Watched], theme: str
) -> None:
    data = made_up(20)
    node = strongest(data)
    low = data["nodes"][node["name"]]["low"][0]
    low.update(value=0.0, before="\n" + 30 * " " + "return x", token="\n    ", after=" y")
    page = show(data).page
    page.emulate_media(color_scheme=theme)
    node_at(page, data)[0].dispatch_event("click")
    context = page.locator(".contexts").last.locator("li")
    assert context.locator("mark").evaluate("mark => getComputedStyle(mark).boxShadow") != "none"
    assert "↵·×30return x" in context.text_content() and "↵·×4" in context.locator("mark").text_content()
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 10 and min(contrasts) >= 4.5


def saved(page: Any, item: str, folder: Path) -> bytes:
    """What an item of the page's menu saves."""
    page.locator("#save summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=item).click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file.read_bytes()


def test_the_circuit_is_saved_as_svg_and_as_png(show: Callable[[dict[str, Any]], Watched], tmp_path: Path) -> None:
    data = made_up(30)
    page = show(data).page
    bare = saved(page, "Circuit as SVG", tmp_path)
    page.locator(".plot .card.error > g").first.click()
    assert saved(page, "Circuit as SVG", tmp_path) == bare  # what is chosen for the moment is no part of it
    assert page.locator(".plot.focused").count() == 1
    texts = " ".join(text.strip() for text in ElementTree.fromstring(bare).itertext())
    size = f"circuit at F 0.9: {data['explanation']['nested'][1]['nodes']} nodes, F 0.90"
    for told in ("log-odds of : against all other tokens", "verdict: representational", "checkpoints/bridge", size):
        assert told in texts
    names = sorted(path.name for path in tmp_path.glob("circuit*"))
    assert names and all(name.startswith("circuit-") and "true" in name for name in names)
    svg = ElementTree.fromstring(bare)
    frames = [element for element in svg.iter("{http://www.w3.org/2000/svg}rect") if element.get("rx") in ("7", "10")]
    assert len(frames) >= page.locator(".plot .card").count()
    assert not svg.findall(".//*[@class]") and "error at site" in texts
    png = saved(page, "Circuit as PNG", tmp_path)
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert png.startswith(b"\x89PNG") and (width, height) == (2 * float(svg.get("width", 0)), 2 * float(svg.get("height", 0)))
    assert json.loads(saved(page, "Explanation as JSON", tmp_path)) == data["explanation"]


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a\f\x1b\0\x85 b\n", "a\\u000c\\u001b\\u0000\\u0085·b↵"),
        ("<x>&\uffff\ufffe\ud800", "<x>&\\uffff\\ufffe\\ud800"),
        ("\U0001f600" * 30 + "y", "\U0001f600" * 30 + "y"),  # the last 60 halves of characters begin within one
        ("x" * 9 + "\U0001f600" * 60, "\U0001f600" * 60),
    ],
)
def test_a_prompt_that_xml_cannot_hold_is_saved_all_the_same(
    show: Callable[[dict[str, Any]], Watched], tmp_path: Path, prompt: str, shown: str
) -> None:
    data = made_up(10)
    data["explanation"]["prompt"] = data["explanation"]["tokens"][0]["text"] = prompt
    page = show(data).page
    svg = ElementTree.fromstring(saved(page, "Circuit as SVG", tmp_path))
    assert svg.findtext("{http://www.w3.org/2000/svg}title") == f"Circuit for {shown}"
    assert saved(page, "Circuit as PNG", tmp_path).startswith(b"\x89PNG")


def test_labels_go_out_and_in_as_json(show: Callable[[dict[str, Any]], Watched], tmp_path: Path) -> None:
    data = made_up(10)
    data["labels"] = {data["explanation"]["nodes"][0]["name"]: "came with the page"}
    page = show(data).page
    file = tmp_path / "labels.json"
    name = data["explanation"]["nodes"][1]["name"]
    file.write_text(json.dumps({name: "taken over", "bad": 3}))
    page.locator("#save input").set_input_files(file)
    page.locator("#live", has_text="Labels imported").wait_for()
    page.locator("#save summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Labels as JSON").click()
    download.value.save_as(file)
    assert json.loads(file.read_text()) == {**data["labels"], name: "taken over"}
    file.write_text("[1]")
    page.locator("#save input").set_input_files(file)
    page.locator("#live", has_text="Labels not imported: labels must be an object").wait_for()
    assert "Labels not imported" in page.locator("#notice").inner_text() and page.locator("#notice").is_visible()


def test_served_the_page_steers_and_keeps_labels_with_the_server(context: Any) -> None:
    data = {**made_up(30, contrast=True), "served": True, "job": "abc"}
    data["explanation"]["provenance"]["coupling"] = "runs/mine & yours"
    sent: list[tuple[str, str, Any]] = []

    def answer(route: Any) -> None:
        request = route.request
        path = request.url.removeprefix("http://bridge.test")
        if request.method == "GET" and path.endswith("/page"):
            return route.fulfill(body=render_html(data), content_type="text/html; charset=utf-8")
        sent.append((request.method, path, request.post_data_json))
        if len(sent) == 4:
            return route.fulfill(status=422, json={"detail": "strength <b>2</b> is above 1"})
        steered = {
            "strength": 1,
            "dense": data["explanation"]["dense"],
            "probability_target": 0.02,
            "probability_contrast": 0.7,
            "text": "<i>\n" if request.post_data_json.get("strength") else " as it is",
        }
        return route.fulfill(json=steered if path.endswith("/steer") else {})

    context.route("http://bridge.test/**", answer)
    watched = Watched(context.new_page())
    page = watched.open(SERVED)
    drawn, node = node_at(page, data)
    drawn.dispatch_event("click")
    page.locator(".label-input").fill("mine")
    page.locator(".label-input").press("Enter")
    page.locator(".kept", has_text="kept with the coupling").wait_for()
    button = page.get_by_role("button", name="Steer the dense model")
    button.click()
    page.locator(".steered pre").first.wait_for()
    told = page.locator(".steered").inner_text()
    assert "90.0% → 2.0%" in told and "5.0% → 70.0%" in told and "<i>" in told
    assert "unsteered" in told and " as it is" in told  # the continuation without a change stands beside
    stale = page.locator(".stale-note")
    assert not stale.is_visible()
    page.get_by_label("strength").fill("0.5")
    assert stale.is_visible()
    page.get_by_label("strength").fill("1")
    button.click()
    page.locator(".problem").wait_for()
    assert page.locator(".problem").inner_text() == "Not steered: strength <b>2</b> is above 1"
    assert sent[0] == ("PATCH", "/api/labels?bridge=runs%2Fmine%20%26%20yours", {node["name"]: "mine"})
    method, path, body = sent[1]
    assert (method, path) == ("POST", "/api/explanations/abc/steer")
    assert body["node"] == node["id"] and body["strength"] == 1 and isinstance(body["value"], (int, float))
    assert sent[2] == ("POST", path, {**body, "strength": 0})
    assert [line for line in watched.wrong if "422" not in line] == []  # the browser reports the refusal itself


def test_a_label_that_the_server_does_not_keep_is_said_to_be_lost_until_it_is_kept(context: Any) -> None:
    data = {**made_up(10), "served": True, "job": "abc"}
    answers: list[dict[str, Any] | None] = [{"status": 404, "json": {"detail": "there is no <b>coupling</b>"}}]

    def answer(route: Any) -> None:
        if route.request.method == "GET":
            return route.fulfill(body=render_html(data), content_type="text/html; charset=utf-8")
        return route.abort() if answers[-1] is None else route.fulfill(**answers[-1])

    context.route("http://bridge.test/**", answer)
    page = Watched(context.new_page()).open(SERVED)
    kept = page.locator(".kept")
    give_label(page, data, 0, "mine")
    kept.filter(has_text="not kept: there is no <b>coupling</b>").wait_for()
    node_at(page, data, 1)[0].dispatch_event("click")
    assert label_of(page, data, 0) == "mine"
    assert kept.inner_text() == "not kept: there is no <b>coupling</b>"
    answers.append(None)
    give_label(page, data, 0, "mine again")
    kept.filter(has_text="not kept: the server does not answer").wait_for()
    answers.append({"json": {}})
    give_label(page, data, 0, "mine at last")
    kept.filter(has_text="kept with the coupling").wait_for()
    assert label_of(page, data, 0) == "mine at last" and kept.inner_text() == "kept with the coupling"


def test_a_label_goes_to_its_own_coupling_when_the_explanation_is_forgotten(
    context: Any, coupling_folder: Path, tmp_path: Path
) -> None:
    first, second = (Path(shutil.copytree(coupling_folder, tmp_path / name)) for name in ("first", "second"))
    explanation = explain(CoupledModels.from_pretrained(second), PROMPT)
    data = {"explanation": explanation.to_json()}
    with serving(Library([first, second]), lambda *_, **__: explanation, remembered=1) as address:

        def explained(bridge: str) -> str:
            job = context.request.post(f"{address}api/explanations", data={"prompt": PROMPT, "bridge": bridge}).json()["id"]
            where = f"{address}api/explanations/{job}"
            until(lambda: context.request.get(where).json()["status"] == "done")
            return where

        where = explained("second")
        page = Watched(context.new_page()).open(f"{where}/page")
        explained("first")
        assert context.request.get(where).status == 404
        give_label(page, data, 0, "of the second")
        until(lambda: (second / "labels.json").exists())
        page.locator(".kept", has_text="kept with the coupling").wait_for()
        name = node_at(page, data)[1]["name"]
        assert json.loads((second / "labels.json").read_text()) == {name: "of the second"}
        shutil.move(second, tmp_path / "gone")
        give_label(page, data, 0, "of none")
        page.locator(".kept", has_text="not kept: there is no coupling 'second' here").wait_for()
        assert not (first / "labels.json").exists() and not second.exists()
