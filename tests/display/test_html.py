"""What notebooks show: everything escaped, nothing that runs or is fetched, numbers where they are in the result."""

from __future__ import annotations

import dataclasses
import html
from html.parser import HTMLParser

import pytest
from support.explanation_cases import PROMPT, agreeing
from support.models import untrained

from bridge.display import html as display
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation
from bridge.models.dense import DenseModel
from bridge.training.evaluate import evaluate

HOSTILE = "</td></details><script>alert('1')</script><img src=x onerror=alert(1)>\"' &amp; {x}"
TAGS = {"div", "b", "span", "code", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}


class Page(HTMLParser):
    """The tags, attributes and text of a piece of HTML, every tag closed in its turn."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS and {name for name, _ in attrs} <= {"style"}
        assert all("url(" not in (value or "") for _, value in attrs)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def explanation(dense: DenseModel) -> Explanation:
    return explain(agreeing(dense), PROMPT)


def test_an_explanation_shows_its_verdict_and_its_strongest_nodes(explanation: Explanation) -> None:
    page = Page(explanation._repr_html_())
    assert explanation.report.verdict in page.words
    assert f"why {explanation.answer} at all" in page.words
    words = "\n".join(page.words)
    strongest = max(explanation.nodes, key=lambda node: abs(node.effect or 0))
    assert f"{strongest.effect:+.2f}" in words
    assert strongest.kind == "error" or strongest.name in words
    for circuit in explanation.nested:
        assert f"{circuit.nodes:,}" in words and f"{circuit.faithfulness:.3f}" in words
    for measure in explanation.report.measures:
        assert measure.name in words


def test_hostile_text_is_text(explanation: Explanation) -> None:
    hostile = dataclasses.replace(
        explanation,
        prompt=HOSTILE,
        tokens=tuple(dataclasses.replace(token, text=HOSTILE) for token in explanation.tokens),
        answer=dataclasses.replace(explanation.answer, text=HOSTILE),
        nodes=tuple(dataclasses.replace(node, label=HOSTILE) for node in explanation.nodes),
    )
    page = Page(hostile._repr_html_())
    assert "".join(HOSTILE.split()) in "".join("".join(page.words).split()) and repr(HOSTILE)[1:-1] in page.words


def test_an_explanation_without_nodes_can_be_shown(explanation: Explanation) -> None:
    assert Page(dataclasses.replace(explanation, nodes=(), edges=())._repr_html_()).words


def test_an_evaluation_shows_every_site(dense: DenseModel) -> None:
    coupling = agreeing(dense)
    assert coupling.reference_bt is not None
    result = evaluate(untrained(dense), coupling.reference_bt)
    words = Page(result._repr_html_()).words
    for site in result.sites:
        assert f"{site.kl_in:.3f}" in words and f"{site.ev_decoder:.3f}" in words


@pytest.mark.parametrize("bar", [0.0, 1.0, -0.3, 7.0])
def test_pieces_escape_what_they_are_given(bar: float) -> None:
    parts = [
        display.card(
            HOSTILE, display.text(HOSTILE), display.listing(HOSTILE), display.token(HOSTILE, bar), display.verdict(HOSTILE)
        ),
        display.fold(HOSTILE, display.table((HOSTILE,), [(HOSTILE,)])),
    ]
    for part in parts:
        Page(part)
        assert HOSTILE not in part and html.escape(HOSTILE) in part
