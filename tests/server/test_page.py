"""The page to ask from in a real browser; skipped where there is no Chromium."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.page_browser_cases import CHROMIUM, WIDE, Watched, playwright, serving
from support.server_cases import HOSTILE, OTHER, PATIENCE, PROMPT

from bridge.display.progress import OnProgress, Phase
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.models.bridges import CoupledModels
from bridge.server.library import Library

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")
PHASE = "deletions: 2,971 nodes, 300 to try"


class Deaf:
    """An `explain` that says one phase and ends it, whoever cancels, only when it is let go."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation, self.go = explanation, threading.Event()

    def __call__(self, coupling: CoupledModels, prompt: str, *, progress: OnProgress, **more: Any) -> Explanation:
        progress(Phase(PHASE))
        assert self.go.wait(PATIENCE)
        return replace(self.explanation, prompt=prompt)


@pytest.fixture(scope="module")
def explanation(coupling_folder: Path) -> Explanation:
    return explain(CoupledModels.from_pretrained(coupling_folder), PROMPT, counterfactual=OTHER)


@pytest.fixture
def served(coupling_folder: Path, explanation: Explanation, tmp_path: Path) -> Iterator[tuple[str, Deaf]]:
    """The address of a real server of two couplings, and what holds up its explanations."""
    second = Path(shutil.copytree(coupling_folder, tmp_path / "second"))
    deaf = Deaf(explanation)
    with serving(Library([coupling_folder, second]), deaf) as address:
        yield address, deaf
        deaf.go.set()


@pytest.fixture
def page(served: tuple[str, Deaf]) -> Iterator[Any]:
    """The page to ask from; whatever it does wrong fails the test."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        context = browser.new_context(viewport=WIDE, color_scheme="light")
        context.set_default_timeout(20_000)
        watched = Watched(context.new_page())
        come(watched.page, served[0])
        yield watched.page
        browser.close()
    assert [line for line in watched.wrong if "the server responded with a status" not in line] == []  # the browser tells those


def come(page: Any, address: str) -> None:
    page.goto(address)
    for name in ("bridge", "task"):
        page.locator(f"#{name} option").first.wait_for(state="attached")


def asking(page: Any) -> dict[str, Any]:
    """What is sent when Explain is pressed."""
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.get_by_role("button", name="Explain").click()
    assert sent.value.response().status == 202
    return sent.value.post_data_json


def posted(page: Any, address: str, **body: Any) -> str:
    answer = page.request.post(f"{address}api/explanations", data=body)
    assert answer.status == 202, answer.text()
    return answer.json()["id"]


def test_an_examples_counterfactual_is_used(page: Any) -> None:
    page.get_by_role("button", name="Fill in").click()
    page.locator("#said", has_text="Example 1 of 8").wait_for()
    text = page.locator("#counterfactual").input_value()
    sent = asking(page)
    assert text and (sent["counterfactual"], sent["prompt"]) == (text, page.locator("#prompt").input_value())
    assert "target" not in sent and "contrast" not in sent
    page.locator("#jobs li", has_text="with a counterfactual").wait_for()


def test_tokens_are_shown_as_they_are_taken(page: Any) -> None:
    for text, seen in ((" and", "·and"), ("and", "and"), ("\n", "↵"), ("\t\u202e", "⇥\\u202e"), ("<b>", "<b>")):
        page.locator("#target").fill(text)
        assert page.locator("#target-seen code").text_content() == seen
    page.locator("#target").fill("")
    assert page.locator("#target-seen").inner_text() == ""
    page.locator("#prompt").fill("w5 w9 ")
    assert page.locator("#prompt-note code").text_content() == "·"
    page.locator("#prompt").fill(PROMPT)
    page.locator("#contrast").press("Shift+Enter")  # a line end; without shift it asks
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.locator("#target").press("Enter")
    assert sent.value.post_data_json == {"prompt": PROMPT, "bridge": page.locator("#bridge").input_value()} | {"contrast": "\n"}
    page.locator("#jobs li code", has_text="↵").wait_for()


def test_the_list_tells_where_each_is_and_what_was_asked(page: Any, served: tuple[str, Deaf], explanation: Explanation) -> None:
    address, deaf = served
    running = posted(page, address, prompt=f"<i>one</i> {HOSTILE[1]}\n\u202eend ", target=" w7", contrast="w8")
    posted(page, address, prompt="   ", bridge="second")  # which is not loaded, and so cannot say that this is empty
    posted(page, address, prompt=f"w5 {'x' * 400}", contrast="w8")
    page.reload()
    rows = page.locator("#jobs > li")
    rows.nth(2).wait_for()
    last, blank, first = (rows.nth(index) for index in range(3))
    first.locator(".note", has_text="Deletions: 2,971 nodes, 300 to try").wait_for()
    assert first.locator(".said").text_content() == f"<i>one</i> {HOSTILE[1]}↵\\u202eend·"
    assert page.locator("#jobs img").count() == 0
    assert first.locator(".about").text_content().startswith("·w7 rather than w8")
    assert blank.locator(".said").text_content() == "···" and "Next in the queue" in blank.inner_text()
    assert "Place 2 of 2 in the queue" in last.inner_text() and "the model's answer rather than w8" in last.inner_text()
    assert len(last.locator(".said").text_content()) < 300  # and the end of it
    assert "second" in blank.inner_text() and "second" not in last.inner_text() and first.locator("time").count() == 1

    stop = first.get_by_role("button", name="Cancel")
    stop.focus()
    page.evaluate("document.activeElement.id = 'held'")
    clock = first.locator(".state small")
    before = clock.inner_text()
    shown = "document.querySelectorAll('#jobs > li')[2].querySelector('.state small').innerText"
    page.wait_for_function(f"before => {shown} != before", arg=before)
    assert page.evaluate("document.activeElement.id") == "held"  # changed in place
    page.keyboard.press("Enter")
    first.locator(".state", has_text="stopping").wait_for()
    assert "Stops when this phase ends: deletions: 2,971" in first.inner_text() and first.get_by_role("button").count() == 0
    assert page.evaluate("document.activeElement.tagName") == "LI"  # in its row still
    blank.get_by_role("button", name="Cancel").click()
    blank.locator(".state", has_text="cancelled").wait_for()
    deaf.go.set()
    first.locator(".state", has_text="cancelled").wait_for()
    last.locator(".state", has_text="done").wait_for()
    posted(page, address, prompt=PROMPT, counterfactual=OTHER)
    done = page.locator("#jobs > li", has_text="with a counterfactual").first
    done.locator("a").wait_for()
    shown = done.locator(".about").inner_text().lower()
    assert shown.startswith(explanation.report.verdict) and "took" in shown
    assert done.get_by_role("link", name=f"Open {PROMPT.replace(' ', '·')}").count() == 1
    assert running not in page.url


def test_an_explanation_that_was_asked_for_opens_and_the_theme_is_that_of_its_page(page: Any, served: tuple[str, Deaf]) -> None:
    served[1].go.set()
    page.get_by_role("button", name="Switch to the dark theme").click()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#prompt").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.wait_for_url("**/api/explanations/*/page")
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    page.get_by_role("button", name="Switch to the light theme").click()
    page.go_back()
    page.locator("#jobs a", has_text="Open").wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.wait_for_timeout(1200)
    assert page.url == served[0]  # it is opened once
    assert page.evaluate("document.fonts.check('14px Inter') && getComputedStyle(document.body).fontFamily.startsWith('Inter')")


def test_a_server_that_does_not_answer_is_said_and_asked_again(page: Any, served: tuple[str, Deaf]) -> None:
    jobs = "**/api/explanations"
    page.locator("#jobs .empty").wait_for()
    posted(page, served[0], prompt=PROMPT)
    page.reload()
    page.locator("#jobs .note", has_text="Deletions").wait_for()
    answers = [{"status": 500, "body": "no JSON"}, {"status": 429, "body": json.dumps({"detail": "too <b>many</b>"})}]
    page.route(jobs, lambda route: route.fulfill(**answers[-1]))
    said = page.locator("#said.problem")
    said.filter(has_text="too <b>many</b>").wait_for()
    answers.pop()
    said.filter(has_text="The server answered 500").wait_for()
    page.unroute(jobs)
    served[1].go.set()
    page.locator("#jobs .state", has_text="done").wait_for()
    assert page.locator("#said").inner_text() == ""
