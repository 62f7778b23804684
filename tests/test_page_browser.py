"""The page in a real browser, as a person uses it; skipped where there is no Chromium."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from explained import hostile, made_up
from test_server import OTHER, PATIENCE, PROMPT, Carded, until

from bridge.bridges import Coupling
from bridge.explain import explain
from bridge.page import render_html
from bridge.server.app import create_app
from bridge.server.library import Library
from bridge.server.run import bound_socket, server_of
from bridge.server.security import Rules

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (it is in bridge[dev])")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")

WIDE = {"width": 1400, "height": 900}
SERVED = "http://bridge.test/api/explanations/abc/page"


class Watched:
    """A page, and everything that it should not have done: messages on the console, errors, dialogs, requests."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url.partition(":")[0]))

    def open(self, where: str) -> Any:
        self.page.goto(where)
        self.ready()
        return self.page

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready]", state="attached")


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


def node_at(page: Any, data: dict[str, Any], rank: int = 0) -> tuple[Any, dict[str, Any]]:
    """A drawn node, the `rank`th by effect, and what the data says of it."""
    nodes = sorted(data["explanation"]["nodes"], key=lambda node: -abs(node["effect"] or 0))
    return page.locator(f'[id="node-{nodes[rank]["id"]}"]'), nodes[rank]


def test_a_node_its_sheet_the_slider_and_a_label_that_is_kept(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    watched = show(data)
    page = watched.page
    assert page.locator("#verdict .word").inner_text() == "Representational"
    assert "continues with" in page.locator("h1").inner_text()

    drawn, node = node_at(page, data)
    drawn.click()
    sheet = page.locator("#sheet")
    assert page.get_by_role("tab", name="Node").get_attribute("aria-selected") == "true"
    told = sheet.inner_text()
    assert node["name"] in told and f"{abs(node['effect']):.2f}" in told and f"({node['position']})" in told
    assert f"at 'while' ({node['name']})" in told  # what it is on text
    assert "carried to the dense model" in told or "not among those measured" in told
    assert drawn.get_attribute("aria-pressed") == "true"
    edge = sheet.locator("section", has_text="Feeds").locator("button.row").first
    if edge.count():
        name = edge.locator("code").first.inner_text().partition("@")[0]
        edge.click()
        assert name in page.locator(".who").inner_text()
        drawn.click()

    levels = [level["nodes"] for level in data["explanation"]["levels"]]
    slider = page.locator("#level")
    for place, count in enumerate(levels):
        slider.fill(str(place))
        assert page.locator(".plot .node").count() == count
        assert f"{count} " in page.locator("#level-text").inner_text()

    slider.fill("0")
    label = page.locator(".label-input")
    assert label.input_value() == "" and label.get_attribute("placeholder") == node["label"]
    label.fill("the one that <b>counts</b>")
    label.press("Enter")
    assert "kept in this browser" in sheet.inner_text()
    page.reload()
    watched.ready()
    node_at(page, data)[0].click()
    assert page.locator(".label-input").input_value() == "the one that <b>counts</b>"
    page.locator("#find").fill("<b>counts")
    assert node["name"] in page.locator("#found").inner_text()

    other = made_up(60)
    other["explanation"]["provenance"]["coupling_fingerprint"] = "another"
    again = show(other).page
    node_at(again, other)[0].click()
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
    data = hostile(made_up(620, 120, levels=1))
    page = show(data).page
    elements = "script, img, iframe, base, style, object, embed, link, meta"
    assert page.locator(elements).count() == 3 + 1 + 4  # the page's own: scripts, a style, metas
    assert page.locator("h1 .token").first.inner_text() == "<script>alert(1)</script>"
    assert "</script><script>alert(1)</script>" in page.locator(".prompt").inner_text().replace("\n", "")
    assert "\\u202egnp.exe" in page.locator(".prompt").inner_text()
    assert page.evaluate("document.dir + getComputedStyle(document.body).direction") == "ltr"
    page.locator("#level").fill(page.locator("#level").get_attribute("max"))
    for rank in range(0, 450, 50):
        node_at(page, data, rank)[0].dispatch_event("click")
        page.locator(".plot .node").nth(rank).dispatch_event("pointerenter")
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
    data = made_up(5)
    for node, name in zip(data["explanation"]["nodes"], ("__proto__", "constructor", "toString"), strict=False):
        node["name"] = name
    page = show(data).page
    for node in data["explanation"]["nodes"][:3]:
        page.locator(f'[id="node-{node["id"]}"]').dispatch_event("click")
        assert page.locator(".label-input").input_value() == ""
        page.locator(".label-input").fill(f"mine {node['name']}")
        page.locator(".label-input").press("Enter")
    page.reload()
    for node in data["explanation"]["nodes"][:3]:
        page.locator(f'[id="node-{node["id"]}"]').dispatch_event("click")
        assert page.locator(".label-input").input_value() == f"mine {node['name']}"


def test_everything_is_reached_by_keys(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    page = show(data).page
    strongest = node_at(page, data)[1]
    page.keyboard.press("ArrowUp")
    assert strongest["name"] in page.locator(".who").inner_text()
    seen = set()
    for key in ("ArrowDown", "ArrowLeft", "ArrowUp", "ArrowRight") * 3:
        page.keyboard.press(key)
        seen.add(page.evaluate("document.activeElement.id"))
    assert len(seen) > 2 and all(name.startswith("node-") for name in seen)
    assert page.locator("#live").inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "sheet"
    page.keyboard.press("l")
    assert page.evaluate("document.activeElement.className") == "label-input"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator(".node.chosen").count() == 0
    before = page.locator(".plot .node").count()
    page.keyboard.press("[")
    assert page.locator(".plot .node").count() < before
    page.keyboard.press("1")
    assert "On this prompt" in page.locator("#sheet").inner_text()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert "find a node" in page.locator("#help").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("/")
    page.keyboard.type(strongest["name"])
    page.keyboard.press("Enter")
    assert strongest["name"] in page.locator(".who").inner_text()


def test_what_there_is_not_is_said(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(20, card=False, attention=False, levels=1)
    data["nodes"] = {}
    page = show(data).page
    assert page.locator("#verdict .word").inner_text() == "Behavioural"
    assert "No card has been made" in page.locator("#sheet").inner_text()
    assert "bridge explain --card" in page.locator("#card").inner_text()
    page.get_by_role("tab", name="Node").click()
    assert "Choose a node" in page.locator("#sheet").inner_text()
    node_at(page, data)[0].click()
    assert "run bridge nodes" in page.locator("#sheet").inner_text()
    page.get_by_role("tab", name="Attention").click()
    assert "holds no attention" in page.locator("#sheet").inner_text()
    nothing = show(made_up(0, levels=1, attention=False)).page
    nothing.get_by_role("tab", name="Node").click()
    assert "The circuit has no nodes" in nothing.locator("#sheet").inner_text()


def test_evidence_is_drawn_with_its_controls(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up()
    faithfulness = data["explanation"]["faithfulness"]
    name = "total variation of attention"
    faithfulness["attention"] = {**faithfulness["share_lost"], "name": name, "value": 0.31, "aim": "<= 0.1", "passed": False}
    page = show(data).page
    measures = page.locator(".measure")
    assert measures.count() == 9 + 2
    assert "Does it attend alike?" in measures.nth(7).inner_text() and "missed" in measures.nth(7).inner_text()
    assert "0.024 nats" in measures.nth(1).inner_text() and "nats" not in measures.nth(2).inner_text()
    assert {"0", "0.9", "1.1"} <= set(measures.nth(2).locator(".axis .tick-text").all_text_contents())
    for place, (low, high) in {1: (0, 0.1), 2: (0.9, 1.1)}.items():  # a region where the aim is, the dot within it
        aim, dot = (measures.nth(place).locator(name).bounding_box() for name in (".aim", "circle.value"))
        assert aim["x"] <= dot["x"] + dot["width"] / 2 <= aim["x"] + aim["width"], (low, high)
    missed = measures.nth(6)
    assert "missed" in missed.inner_text() and missed.locator(".control-band").count() == 1
    assert measures.nth(9).locator(".ceiling").count() == 1 and measures.nth(9).locator(".interval").count() == 1
    assert "not known" in measures.nth(10).inner_text()
    assert page.locator(".profile .tick-text", has_text="logits of D").count() == 2
    assert page.locator(".profile .tick-text", has_text="0").count() >= 4
    assert f"Of the whole circuit, {data['explanation']['counts']['nodes']} nodes" in page.locator("#sheet").inner_text()
    assert "Without nulls" in page.locator("#nulls").inner_text()


BAR, BELOW, CEILING = {"mean": 0.2, "bar": 0.6}, {"mean": -1.4, "bar": -1.4}, {"mean": 0.9}
MEASURES = Path(__file__).parent.parent / "bridge" / "viewer" / "src" / "measures.js"


def region_of(context: Any, aim: str, control: Any, ceiling: Any) -> list[float] | None:
    """What the page makes of an aim in words: its source by itself, in an empty page."""
    call = """async ([source, ...asked]) =>
      (await import(`data:text/javascript,${encodeURIComponent(source)}`)).aimRegion(...asked)"""
    return context.new_page().evaluate(call, [MEASURES.read_text(encoding="utf-8"), aim, control, ceiling])


@pytest.mark.parametrize(
    ("aim", "control", "ceiling", "region"),
    [
        (">= 0.8, random <= 0.3", None, None, [0.8, math.inf]),
        ("> turned", None, CEILING, None),
        ("> bigram, > 0", BELOW, CEILING, [0, math.inf]),
        (">= 3 times theirs", BELOW, None, [0, math.inf]),
        (">= 0.5 of ceiling, > turned", BAR, BELOW, None),  # of such a ceiling no share is enough
    ],
)
def test_aims_in_words_without_a_control_or_with_one_below_0(
    context: Any, aim: str, control: Any, ceiling: Any, region: list[float] | None
) -> None:
    assert region_of(context, aim, control, ceiling) == region


@pytest.mark.parametrize(
    ("aim", "region"),
    [
        ("<= 0.1", [-math.inf, 0.1]),
        ("<= 0.1, below random", [-math.inf, 0.1]),
        (">= 0.5, above the null", [0.6, math.inf]),
        ("above random", [0.6, math.inf]),
        ("0.9 to 1.1", [0.9, 1.1]),
        ("-0.5 to 1.1", [-0.5, 1.1]),
        (">= 0.5 of ceiling, > turned", [0.6, math.inf]),
        (">= 0.8 of ceiling, > turned", [0.8 * 0.9, math.inf]),
        (">= 3 times theirs", [3 * 0.2, math.inf]),
        (">= 0.8, random <= 0.3", [0.8, math.inf]),
        ("0.8 to 1.25, random <= 0.3", [0.8, 1.25]),
        ("> bigram, > 0", [0.6, math.inf]),
        (">= 0.9, >= bigram", [0.9, math.inf]),
        ("> 0.5, > false alarms", [0.6, math.inf]),
        ("12 times fewer than dense", None),
        (">= 12 times fewer than dense", None),
        ("<= 0.5, > 0.7", None),  # nothing can meet it
        ("same answer", None),
        ("random <= 0.3", None),
        ("", None),
    ],
)
def test_aims_in_words_are_regions(context: Any, aim: str, region: list[float] | None) -> None:
    assert region_of(context, aim, BAR, CEILING) == (region and pytest.approx(region))


def test_nulls_are_counted_by_task(show: Callable[[dict[str, Any]], Watched]) -> None:
    def task(accuracy: float | None, **holds: bool) -> dict[str, Any]:
        return {"task": "var_if", "holds": {"gate": True, **holds}, "values": {}, "passed": False, "accuracy": accuracy}

    data = made_up()
    tasks = [task(0.95, swap=False, blind=True), task(0.8, swap=False, blind=False), task(None, swap=False)]
    data["explanation"]["card"]["nulls"] = [{"name": "uncoupled", "what": "x", "note": "", "passed": False, "tasks": tasks}]
    page = show(data).page
    assert page.locator("#nulls thead th").all_inner_texts() == ["solved", "transport", "loop", "profile", "blind"]
    cells = ["1 of 3", "on none", "on none", "on none", "on 1 of 3 tasks"]
    assert page.locator("#nulls tbody td").all_inner_texts() == cells
    assert "fails" in page.locator("#nulls tbody th").inner_text()
    assert "none may pass all four" in page.locator("#nulls h3").inner_text()


def test_a_node_of_which_nothing_is_known_is_grey(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(40, levels=1)
    unknown = data["explanation"]["nodes"][-1]
    unknown["effect"] = unknown["importance"] = None
    edges = data["explanation"]["edges"]
    data["explanation"]["edges"] = [edge for edge in edges if edge["source"] != unknown["id"]]
    data["explanation"]["levels"] = []
    page = show(data).page
    page.locator("#level").fill(page.locator("#level").get_attribute("max"))
    drawn = page.locator(f'[id="node-{unknown["id"]}"]')
    stroke, grey, blue = drawn.locator(".dot").evaluate(
        """dot => {
          const colour = (name) => {
            const probe = document.createElement("i");
            probe.style.color = `var(--${name})`;
            document.body.append(probe);
            const found = getComputedStyle(probe).color;
            probe.remove();
            return found;
          };
          return [getComputedStyle(dot).stroke, colour("faint"), colour("for")];
        }"""
    )
    assert stroke == grey != blue
    assert "effect not measured" in drawn.get_attribute("aria-label")
    drawn.dispatch_event("click")
    told = page.locator("#sheet").inner_text()
    assert "deleted from the circuit: not measured" in told and "+0.00" not in page.locator(".effects").inner_text()
    assert "not measured" in page.locator("#legend").inner_text()


def test_what_an_edge_says_and_how_many_there_are(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    data["explanation"]["counts"]["edges"] = 13653
    edge = next(edge for edge in data["explanation"]["edges"] if edge["kind"] == "weight")
    kept = f"({len(data['explanation']['edges'])} of 13,653)"
    page = show(data).page
    drawn = page.locator(".edges:not(.focus) path")
    legend = page.locator("#legend").inner_text()
    assert f"{drawn.count()} strongest of the edges that were kept {kept}" in legend
    assert all("adds" in title and "D owes it" in title for title in drawn.locator("title").all_text_contents())
    page.locator(f'[id="node-{edge["source"]}"]').dispatch_event("click")
    feeds = page.locator("#sheet section", has_text="Feeds").last
    assert f"of the edges that were kept {kept}" in feeds.inner_text()
    row = feeds.locator(".row", has_text=edge["target"])
    assert f"weight, adds {'−' if edge['weight'] < 0 else '+'}" in row.inner_text()
    page.set_viewport_size({"width": 1000, "height": 700})
    chip = row.locator(".token")
    assert chip.evaluate("chip => chip.scrollWidth <= chip.clientWidth")  # its token is to be read beside its place


def test_a_smaller_circuit_is_not_the_one_that_was_judged(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    for level, (kl, share) in zip(data["explanation"]["levels"], [(0.5, 0.7), (0.2, 1.0), (0.05, 1.02)], strict=True):
        level.update(kl=kl, share=share)
    page = show(data).page
    slider, bar = page.locator("#level"), page.locator("#bar")
    assert [mark.get_attribute("class") for mark in page.locator(".marks i").all()] == ["missed", "missed", ""]
    told = []
    for place in range(3):
        slider.fill(str(place))
        told.append(bar.inner_text())
    count = data["explanation"]["counts"]["nodes"]
    assert [f"Verdict and evidence are of the whole circuit, {count} nodes" in each for each in told] == [True, True, False]
    assert [each.count("✗") for each in told] == [2, 1, 0]


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


def test_heads_are_listed_by_the_effect_that_is_shown(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(30)
    for head, effect in zip(data["explanation"]["attention"], (0.1, -2.0, 0.3, 0.0), strict=True):
        head["effect"] = effect
    page = show(data).page
    page.get_by_role("tab", name="Attention").click()
    options = page.locator("select option").all_inner_texts()
    assert [option.rpartition(" ")[2] for option in options] == ["−2.00", "+0.30", "+0.10", "+0.00"]
    assert all("at ·True (8)" in option for option in options)
    assert "L1 head 1 reads" in page.locator(".corner").inner_text()


def test_a_large_circuit_shows_its_strongest_and_says_so(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(1500, 60, levels=1)
    data["explanation"].pop("levels", None)
    page = show(data).page
    slider = page.locator("#level")
    slider.fill(slider.get_attribute("max"))
    assert page.locator(".plot .node").count() == 500
    assert "Drawn are the 500 strongest" in page.locator("#bar").inner_text()
    hidden = sorted(data["explanation"]["nodes"], key=lambda node: abs(node["effect"]) if node["effect"] is not None else -1)[0]
    page.get_by_role("button", name="Draw all 1,500").click()
    assert page.locator(".plot .node").count() == 1500
    page.get_by_role("button", name="Draw the 500 strongest").click()
    page.locator("#find").fill(hidden["id"])
    page.keyboard.press("Enter")
    assert hidden["name"] in page.locator(".who").inner_text()  # what is found is drawn
    assert page.locator(".node.chosen").count() == 1


def test_all_of_a_wide_circuit_is_drawn_with_its_strongest_in_view(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(2400, layers=1, levels=1)
    last = len(data["explanation"]["tokens"]) - 1
    max((n for n in data["explanation"]["nodes"] if n["position"] == last), key=lambda n: abs(n["effect"] or 0))["effect"] = 99.0
    page = show(data).page
    page.set_viewport_size({"width": 1000, "height": 700})
    page.locator("#level").fill(page.locator("#level").get_attribute("max"))
    page.get_by_role("button", name="Draw all 2,400").click()
    plot = page.locator("#plot")
    assert plot.evaluate("plot => plot.scrollWidth > 1.5 * plot.clientWidth")
    view = plot.bounding_box()
    for place in (node_at(page, data)[0], page.locator(".side.for rect")):  # and the answer above them
        assert view["x"] + 96 < place.bounding_box()["x"] < view["x"] + view["width"]


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
    plot = page.locator("#plot")
    assert plot.evaluate("element => element.scrollWidth > element.clientWidth")  # a hundred tokens scroll, their names stay
    plot.evaluate("element => element.scrollTo(900, 0)")
    names, box = page.locator("#plot .names").bounding_box(), plot.bounding_box()
    assert names["x"] == pytest.approx(box["x"], abs=2)


def test_a_small_window_leaves_room_for_the_circuit(show: Callable[[dict[str, Any]], Watched]) -> None:
    page = show(made_up(200, 18)).page
    page.set_viewport_size({"width": 1000, "height": 700})
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    plot = page.locator("#plot").bounding_box()
    assert min(700, plot["y"] + plot["height"]) - plot["y"] >= 300
    why = page.locator("#verdict summary")
    assert why.is_visible() and not page.locator(".reasons").is_visible()
    why.click()
    assert page.locator(".reasons").is_visible()
    hint = page.locator("#below")
    assert hint.is_visible()
    hint.click()
    assert page.locator("#plot").evaluate("plot => plot.scrollTop") > 0
    page.locator("#plot").evaluate("plot => plot.scrollTo(0, 1e6)")
    hint.wait_for(state="hidden")


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
    node = sorted(data["explanation"]["nodes"], key=lambda node: -abs(node["effect"] or 0))[0]
    low = data["nodes"][node["name"]]["low"][0]
    low.update(value=0.0, before="\n" + 30 * " " + "return x", token="\n    ", after=" y")
    page = show(data).page
    page.emulate_media(color_scheme=theme)
    node_at(page, data)[0].click()
    context = page.locator(".contexts").last.locator("li")
    assert context.locator("mark").evaluate("mark => getComputedStyle(mark).boxShadow") != "none"
    assert "↵·×30return x" in context.text_content() and "↵·×4" in context.locator("mark").text_content()
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 10 and min(contrasts) >= 4.5


def test_what_is_found_has_the_focus(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(60)
    page = show(data).page
    node = node_at(page, data)[1]
    page.keyboard.press("/")
    page.keyboard.type(node["name"])
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == f"node-{node['id']}"


def test_the_neighbours_of_a_node_that_is_gone_to_are_in_view(show: Callable[[dict[str, Any]], Watched]) -> None:
    data = made_up(8, 100)
    first, last = data["explanation"]["nodes"][:2]
    first["position"], last["position"] = 70, 80
    for node in (first, last):
        node["id"] = f"{node['name']}@{node['position']}"
    edge = {"source": first["id"], "target": last["id"], "kind": "weight", "weight": 1.0, "effect": 2.0}
    data["explanation"]["edges"] = [edge]
    page = show(data).page
    page.set_viewport_size({"width": 1000, "height": 800})
    plot = page.locator("#plot")
    left = page.locator(f'[id="node-{first["id"]}"]')
    for start in (0, 1e6):
        plot.evaluate("(plot, start) => plot.scrollTo(start, 0)", start)
        page.locator("#find").fill(last["id"])
        page.keyboard.press("Enter")
        assert left.bounding_box()["x"] >= plot.bounding_box()["x"] + 96  # not below the names of the rows


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
    node_at(page, data)[0].click()
    assert saved(page, "Circuit as SVG", tmp_path) == bare  # what is chosen for the moment is no part of it
    assert page.locator(".plot.focused").count() == 1
    texts = " ".join(text.strip() for text in ElementTree.fromstring(bare).itertext())
    for told in ("→ : rather than ·and", "D +2.90", "verdict: representational", "checkpoints/bridge", "not measured"):
        assert told in texts
    names = sorted(path.name for path in tmp_path.glob("circuit*"))
    assert names and all(name.startswith("circuit-") and "true" in name for name in names)
    svg = ElementTree.fromstring(saved(page, "Circuit as SVG", tmp_path))
    dots = [element for element in svg.iter("{http://www.w3.org/2000/svg}circle") if element.get("fill", "").startswith("rgb(")]
    assert len(dots) >= page.locator(".plot .node").count()
    assert not svg.findall(".//*[@class]") and "mlp_out" in "".join(svg.itertext())
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
    page.locator("#live", has_text="Labels taken over").wait_for()
    page.locator("#save summary").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Labels as JSON").click()
    download.value.save_as(file)
    assert json.loads(file.read_text()) == {**data["labels"], name: "taken over"}
    file.write_text("[1]")
    page.locator("#save input").set_input_files(file)
    page.locator("#live", has_text="Labels not taken over: labels are an object").wait_for()
    assert "Labels not taken over" in page.locator("#notice").inner_text() and page.locator("#notice").is_visible()


def test_served_the_page_steers_and_keeps_labels_with_the_server(context: Any) -> None:
    data = {**made_up(30), "served": True, "job": "abc"}
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
    drawn.click()
    page.locator(".label-input").fill("mine")
    page.locator(".label-input").press("Enter")
    page.locator(".kept", has_text="kept with the coupling").wait_for()
    button = page.get_by_role("button", name="Steer the dense model")
    button.click()
    page.locator(".steered pre").first.wait_for()
    told = page.locator(".steered").inner_text()
    assert "90.0% → 2.0%" in told and "5.0% → 70.0%" in told and "<i>" in told
    assert "by itself" in told and " as it is" in told  # the continuation without a change stands beside
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


@contextmanager
def serving(library: Library, explain: Callable[..., Any], **bounds: int) -> Iterator[str]:
    """The address of a real server."""
    with bound_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        server = server_of(create_app(library, Rules.for_address("127.0.0.1", port, None), explain=explain, **bounds))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def test_a_label_goes_to_its_own_coupling_when_the_explanation_is_forgotten(
    context: Any, coupling_folder: Path, tmp_path: Path
) -> None:
    first, second = (Path(shutil.copytree(coupling_folder, tmp_path / name)) for name in ("first", "second"))
    explanation = explain(Coupling.from_pretrained(second), PROMPT)
    data = {"explanation": explanation.to_json()}
    with serving(Library([first, second]), lambda *_, **__: explanation, kept=1) as address:

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


# -- the card, which comes into a page that is open -----------------------------------------------------------------------------


@pytest.fixture
def computing(coupling_folder: Path, tmp_path: Path) -> Iterator[tuple[str, Carded]]:
    """The address of a real server, and what holds up the cards that it is asked for."""
    folder = Path(shutil.copytree(coupling_folder, tmp_path / coupling_folder.name))  # it keeps labels there
    held = Carded(explain(Coupling.from_pretrained(folder), PROMPT, card=True, counterfactual=OTHER))
    with serving(Library([folder]), held) as address:
        yield address, held
        held.go.set()


def test_the_card_comes_into_the_page_that_is_open(context: Any, computing: tuple[str, Carded]) -> None:
    address, held = computing
    watched = Watched(context.new_page())
    page = watched.page
    page.goto(address)
    page.locator("#bridge option").wait_for(state="attached")
    page.locator("#prompt").fill(PROMPT)
    assert not page.locator("#card").is_checked()
    page.locator("#counterfactual").fill(OTHER)
    assert page.locator("#card").is_checked()  # that is what it is for
    page.get_by_role("button", name="Explain").click()
    page.wait_for_url("**/api/explanations/*/page")  # opened as soon as it is there, and the card is not
    watched.ready()
    page.locator("#card", has_text="The card is being computed: held").wait_for()
    assert page.locator("#nulls").count() == 0
    before = page.locator("#verdict").inner_text()

    page.locator(".plot .node").first.click()
    chosen = page.locator(".node.chosen").get_attribute("id")
    page.locator(".label-input").fill("half a lab")
    levels = page.locator("#level")
    place = levels.get_attribute("max") if levels.count() else None
    if place is not None:
        levels.fill(place)
    page.evaluate("window.still = true")
    assert held.explanation.card is not None
    held.go.set()
    page.locator("#live", has_text=f"The card is there: {held.explanation.card.verdict}").wait_for(state="attached")
    assert page.evaluate("window.still")  # the same page
    assert page.locator(".node.chosen").get_attribute("id") == chosen
    assert page.locator(".label-input").input_value() == "half a lab"
    assert place is None or levels.input_value() == place
    assert page.get_by_role("tab", name="Node").get_attribute("aria-selected") == "true"
    assert page.locator("#verdict").inner_text() != before
    page.get_by_role("tab", name="Evidence").click()
    assert "1. Counterfactual transport" in page.locator("#card").inner_text()
    assert "being computed" not in page.locator("#sheet").inner_text() and page.locator("#nulls").count() == 1
    asked = len(watched.requests)
    page.wait_for_timeout(1500)
    assert len(watched.requests) == asked  # nothing is asked any more
    page.get_by_role("link", name="Ask another").click()
    page.locator("#jobs a", has_text="open").wait_for()
    assert page.url == address and watched.wrong == []


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"json": {"status": "failed", "error": "no <b>room</b>", "explanation": None}}, "The card failed: no <b>room</b>"),
        ({"json": {"status": "cancelled", "explanation": {"card": None}}}, "The card was cancelled"),
        ({"json": {"status": "done", "explanation": {"card": None}}}, "No card has been made"),  # none was asked for
        ({"status": 404, "json": {"detail": "there is no explanation 'abc'"}}, "will not come: there is no explanation 'abc'"),
        (None, "The server does not answer any more"),
    ],
)
def test_a_card_that_does_not_come_is_a_line(context: Any, answer: dict[str, Any] | None, line: str) -> None:
    data = {**made_up(10, card=False), "served": True, "job": "abc", "pending": True}
    asked = []

    def route(route: Any) -> None:
        if route.request.url == SERVED:
            return route.fulfill(body=render_html(data), content_type="text/html; charset=utf-8")
        asked.append(route.request.url)
        if len(asked) == 1:
            running = {"status": "running", "phase": "transport: 100 rotations", "explanation": None}
            return route.fulfill(json=running)
        return route.abort() if answer is None else route.fulfill(**answer)

    context.route("http://bridge.test/**", route)
    page = Watched(context.new_page()).open(SERVED)
    card = page.locator("#card")
    card.filter(has_text="The card is being computed: transport: 100 rotations").wait_for()
    card.filter(has_text=line).wait_for()
    assert set(asked) == {"http://bridge.test/api/explanations/abc?brief=true"} and page.locator("#card b").count() == 0
    count = len(asked)
    page.wait_for_timeout(1200)
    assert len(asked) == count == (6 if answer is None else 2)
    assert "bridge explain --card" not in card.inner_text()
    if "No card" in line:
        assert "start page" in card.inner_text()


def test_a_page_saved_while_its_card_was_computed_asks_nothing(show: Callable[[dict[str, Any]], Watched]) -> None:
    page = show({**made_up(10, card=False), "served": True, "job": "abc", "pending": True}).page
    assert "No card has been made" in page.locator("#card").inner_text()
    assert page.get_by_role("link", name="Ask another").count() == 0
