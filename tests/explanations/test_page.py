"""The page as a file: its data comes out as it went in, no text of it is markup, it needs nothing else, it is written whole."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.explained import hostile, hostile_texts, made_up
from support.models import CONTEXT, untrained
from typer.testing import CliRunner

from bridge.cli.main import app
from bridge.explanations.build import explain
from bridge.explanations.explanation import Explanation, read_explanation
from bridge.explanations.page import MAX_NODE_PAGES, PageError, described_nodes, embedded_json, page_data, render_html, write_page
from bridge.explanations.parts import Answered
from bridge.models import store as checkpoint
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from bridge.models.schema import ERROR
from bridge.nodes.statistics import collect_nodes

VIEWER = Path(__file__).parents[2] / "bridge" / "viewer"
PROMPT = "w5 w9 w12 w5 w30 w2"


class Page(HTMLParser):
    """What a browser would find: attributes by element, and the texts of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def policy(self) -> str:
        return next(a["content"] or "" for a in self.of("meta") if a.get("http-equiv") == "Content-Security-Policy")


def data_of(html: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.fixture(scope="module")
def html() -> str:
    return render_html(made_up())


@pytest.fixture(scope="module")
def explained(dense: DenseModel) -> tuple[CoupledModels, Explanation]:
    coupling = untrained(dense)
    reference_bt = torch.randint(2, 40, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    coupling = dataclasses.replace(coupling, reference_bt=reference_bt)
    return coupling, explain(coupling, PROMPT)


# -- what goes in comes out ---------------------------------------------------------------------------------------------------


def test_a_page_holds_the_explanation(explained: tuple[CoupledModels, Explanation]) -> None:
    _, explanation = explained
    values = data_of(render_html(page_data(explanation, labels={"L0.v[1]": "mine"})))
    assert set(values) == {"explanation", "nodes", "labels", "served", "job"}
    assert Explanation.from_json(values["explanation"]) == explanation
    assert values["labels"] == {"L0.v[1]": "mine"} and values["nodes"] == {} and values["served"] is False
    assert values["job"] is None
    served = data_of(render_html(page_data(explanation, job="abc")))
    assert (served["served"], served["job"]) == (True, "abc")


def test_pages_of_nodes_are_those_of_the_strongest(explained: tuple[CoupledModels, Explanation], tmp_path: Path) -> None:
    coupling, explanation = explained
    coupling = dataclasses.replace(coupling, path=str(tmp_path))
    assert described_nodes(coupling, explanation) == {}  # nothing was collected
    assert coupling.reference_bt is not None
    collect_nodes(coupling, coupling.reference_bt, folder=tmp_path)
    pages = described_nodes(coupling, explanation)
    strongest = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:MAX_NODE_PAGES]
    assert set(pages) == {node.name for node in strongest if node.kind != ERROR} and pages
    for name, page in pages.items():
        assert page["name"] == name
        assert page["dense"] is None or ("direction" not in page["dense"] and page["dense"]["length"] > 0)
    assert data_of(render_html(page_data(explanation, pages)))["nodes"] == pages


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@settings(max_examples=60, deadline=None)
def test_embedded_json_is_the_same_and_cannot_end_its_element(value: Any) -> None:
    text = embedded_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set("<>&") & set(text)


def test_numbers_that_json_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        embedded_json({"kl": float("nan")})


@pytest.mark.parametrize("served", [False, True])
def test_hostile_texts_add_no_element(served: bool) -> None:
    harmless, harmful = made_up(tokens=120), hostile(made_up(tokens=120))
    plain, html = Page(render_html(harmless)), render_html({**harmful, "served": served})
    page = Page(html)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    assert data_of(html)["explanation"] == json.loads(json.dumps(harmful["explanation"]))  # half characters that met are whole
    assert all(attributes == other for (_, attributes), (_, other) in zip(page.elements[4:], plain.elements[4:], strict=True))


@pytest.mark.parametrize("text", hostile_texts()[:60])
def test_a_hostile_prompt_stays_in_the_title(text: str) -> None:
    data = made_up(3, 2)
    data["explanation"]["prompt"] = data["explanation"]["answer"]["text"] = text
    html = render_html(data)
    assert html.encode()  # half characters included
    assert html.count("</title>") == 1 and html.count("<script") == 3


# -- it needs nothing else ----------------------------------------------------------------------------------------------------


def test_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    fetching = [
        (tag, name, value) for tag, found in page.elements for name, value in found.items() if name in ("src", "href", "action")
    ]
    assert fetching == [("a", "href", "#plot")]
    texts = dict(page.texts)
    assert all(url.startswith("data:font/woff2;base64,") for url in re.findall(r"url\(([^)]*)\)", texts["style"]))
    assert "@import" not in texts["style"]
    script = next(text for tag, text in reversed(page.texts) if tag == "script")
    assert set(re.findall(r"\w+://[^\"'`\s]*", script)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml", "http://www.w3.org/1999/xlink",
        "http://www.w3.org/XML/1998/namespace", "http://www.w3.org/2000/xmlns/",
    }  # fmt: skip
    for loader in ("XMLHttpRequest", "WebSocket", "EventSource", "importScripts", "sendBeacon", "eval("):
        assert loader not in script


@pytest.mark.parametrize("source", sorted((VIEWER / "src").iterdir()), ids=lambda path: path.name)
def test_no_source_makes_markup_of_text(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    for maker in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        ".html(",
        "document.write",
        "DOMParser",
        "setHTML",
        "Function(",
    ):
        assert maker not in text
    assert len(text.splitlines()) <= 400


def test_the_policy_names_the_one_script_and_the_one_style(html: str) -> None:
    page = Page(html)
    run = [attributes for attributes in page.of("script") if "type" not in attributes]
    assert len(run) == 1 and len(page.of("style")) == 1
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (text,) = re.findall(pattern, html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page.policy
    assert page.policy.startswith("default-src 'none'; ") and "connect-src 'none'" in page.policy
    assert "connect-src 'self'" in Page(render_html({**made_up(), "served": True})).policy


def test_no_attribute_runs_anything(html: str) -> None:
    assert [name for _, found in Page(html).elements for name in found if name.startswith("on") or name == "style"] == []


def test_licences_of_all_that_is_bundled_are_in_the_page(html: str) -> None:
    licences = next(text for tag, text in Page(html).texts if tag == "script" and "Permission to use" in text)
    lock = json.loads((VIEWER / "package-lock.json").read_text())["packages"]
    shipped = {
        name.removeprefix("node_modules/"): entry["version"] for name, entry in lock.items() if name and not entry.get("dev")
    }
    assert {"d3-scale", "d3-shape", "@fontsource-variable/inter", "@fontsource-variable/jetbrains-mono"} <= set(shipped)
    for name, version in shipped.items():
        assert f"{name} {version}\n" in licences
    assert "SIL OPEN FONT LICENSE" in licences.upper()


def test_the_bundle_was_made_from_the_sources() -> None:
    digest = hashlib.sha256()
    for file in (*sorted((VIEWER / "src").iterdir()), VIEWER / "package-lock.json"):
        digest.update(file.read_bytes())
    first = (VIEWER / "viewer.js").read_text(encoding="utf-8").partition("\n")[0]
    assert first.endswith(f"sources {digest.hexdigest()}"), "bridge/viewer/src was changed; run `make viewer`"
    assert "</script" not in (VIEWER / "viewer.js").read_text(encoding="utf-8").lower()


def luminance(colour: str) -> float:
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def colours(theme: int) -> Mapping[str, str]:
    css = (VIEWER / "viewer.css").read_text(encoding="utf-8")
    return {found[1]: found[2 + theme] for found in re.finditer(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", css)}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [(text, behind) for text in ("ink", "soft", "good", "bad") for behind in ("ground", "sheet", "raised", "band")]
    + [("for", "for-tint"), ("against", "against-tint"), ("for", "sheet"), ("against", "raised")],
)  # fmt: skip
def test_text_stands_out_from_what_is_behind_it(text: str, behind: str, theme: int) -> None:
    found = colours(theme)
    light, dark = sorted((luminance(found[text]), luminance(found[behind])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


# -- files and commands -------------------------------------------------------------------------------------------------------


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    write_page(file, "earlier")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(PageError, match="No space left on device"):
        write_page(file, "later")
    assert file.read_text() == "earlier" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("path", ["", "missing/page.html", "file/page.html", "."])
def test_where_no_page_can_be_written_is_said_before_the_work(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["explain", "--prompt", "x", "--bridge", "nowhere", "--html", path])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "cannot be written; name a file" in result.stderr


def test_view_makes_a_page_of_what_was_saved(explained: tuple[CoupledModels, Explanation], tmp_path: Path) -> None:
    saved, page = tmp_path / "saved.json", tmp_path / "page.html"
    saved.write_text(json.dumps(explained[1].to_json()))
    assert read_explanation(saved) == explained[1]
    result = CliRunner().invoke(app, ["view", str(saved), "--html", str(page)])
    assert result.exit_code == 0 and result.stdout == f"wrote {page}\n"
    assert page.read_text(encoding="utf-8") == render_html(page_data(explained[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("{", "holds no explanation"),
        ("[]", "holds no explanation"),
        ("{}", "this is no explanation"),
        ("\xff", "holds no explanation"),
    ],
)
def test_view_refuses_what_is_no_explanation(tmp_path: Path, content: str | None, message: str) -> None:
    saved = tmp_path / "saved.json"
    if content is not None:
        saved.write_text(content, encoding="latin-1")
    result = CliRunner().invoke(app, ["view", str(saved), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_explain_writes_a_page(
    explained: tuple[CoupledModels, Explanation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoupledModels, "from_pretrained", staticmethod(lambda *_, **__: explained[0]))
    early = Answered(**{field.name: getattr(explained[1], field.name) for field in dataclasses.fields(Answered)})

    def staged(*_: Any, stage: Callable[[Answered], None], **__: Any) -> Explanation:
        stage(early)
        return explained[1]

    monkeypatch.setattr(importlib.import_module("bridge.explanations.build"), "explain", staged)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["explain", "--prompt", PROMPT, "--bridge", "here", "--html", str(page), "--device", "cpu"])
    assert result.exit_code == 0 and result.stdout.endswith(f"\nwrote {page}\n")
    assert result.stdout.count("question  why") == 1  # the answer is said once, though the whole holds it too
    assert data_of(page.read_text(encoding="utf-8"))["explanation"] == explained[1].to_json()
