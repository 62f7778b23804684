"""Render an Explanation as one self-contained HTML file, which fetches nothing and treats no text of the user as markup.

Its data, embedded as JSON:

    {"explanation": Explanation.to_json(), "nodes": {name: a node's page}, "labels": {name: text},
     "served": bool, "job": the explanation's id on the server or null}

In the JSON, `<`, `>`, `&` and line separators are escaped, so no prompt can end the element that contains it. The file includes
the viewer, d3 and two fonts, built once from `viewer/src`. A policy in the head names the only script and the only style by their
SHA-256, and forbids all connections, except to the server if served. The strongest nodes have pages if `bridge nodes` was run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from bridge.errors import UserError
from bridge.explanations.explanation import Explanation, Fingerprints, check_coupling
from bridge.models.bridges import CoupledModels
from bridge.models.schema import ERROR
from bridge.models.store import check_writable_file, write_text
from bridge.nodes.description import describe_node
from bridge.nodes.statistics import parse_node, stored_facts

MAX_NODE_PAGES = 500  # maximum number of nodes whose pages are included, the strongest ones
PARTS = ("index.html", "viewer.css", "fonts.css", "viewer.js", "licences.txt")  # files in the viewer's folder, as installed


class PageError(UserError):
    """A page that cannot be made or written. The message is one line."""


def page_data(
    explanation: Explanation,
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
    labels: Mapping[str, str] | None = None,
    *,
    job: str | None = None,
) -> dict[str, Any]:
    """Return the data of a page as plain JSON values; `nodes` is from `described_nodes`, `labels` are people's, by name.

    job is the explanation's id on the server, if a server shows the page.
    """
    values = {"explanation": explanation.to_json(), "nodes": dict(nodes or {}), "labels": dict(labels or {})}
    return {**values, "served": job is not None, "job": job}


def described_nodes(
    coupling: CoupledModels, explanation: Explanation, known: Fingerprints | None = None
) -> dict[str, dict[str, Any]]:
    """Return pages of an explanation's strongest nodes, by name; {} if no node facts are stored with the coupling.

    The dense direction is replaced by its length, because a page draws no vectors. `known` are the coupling's fingerprints, if
    the caller has them and the coupling does not change. Raises ExplainError if the coupling is not the explanation's.
    """
    known = Fingerprints.of(coupling) if known is None else known
    check_coupling(explanation, coupling, known)
    facts = stored_facts(coupling, fingerprint=known.sparse)
    if facts is None:
        return {}
    sizes, pages = coupling.sparse.locations(), {}
    for node in sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:MAX_NODE_PAGES]:
        if node.kind != ERROR and node.name not in pages:
            page = describe_node(coupling, facts, parse_node(node.name, sizes)).to_json()
            if page["dense"] is not None:
                page["dense"]["length"] = sum(x * x for x in page["dense"].pop("direction")) ** 0.5
            pages[node.name] = page
    return pages


def render_html(data: Mapping[str, Any]) -> str:
    """Return the self-contained HTML page for the result of `page_data`."""
    viewer = files("bridge") / "viewer"
    read = {name: (viewer / name).read_text(encoding="utf-8") for name in PARTS}
    script, style = read["viewer.js"], read["fonts.css"] + read["viewer.css"]
    connect = "'self'" if data["served"] else "'none'"
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; font-src data:; img-src blob: data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    prompt = " ".join(data["explanation"]["prompt"].split())
    title = f"{prompt[-60:]} \u2192 {data['explanation']['answer']['text'].strip()}"
    parts = {
        "policy": escape(policy),
        "title": escape(title.encode(errors="replace").decode()),
        "style": style,
        "data": embedded_json(data),
        "licences": read["licences.txt"],
        "script": script,
    }
    return fill_template(read["index.html"], parts.__getitem__)


def fill_template(template: str, part: Callable[[str], str]) -> str:
    """Return a template with a part inserted for each {{name}}; inserted text is not searched again."""
    return re.sub(r"{{(.+?)}}", lambda place: part(place[1]), template)


def embedded_json(data: Any) -> str:
    """Return JSON that is safe inside an HTML element for any text: ASCII, without `<`, `>` and `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write_page(path: str | Path, html: str) -> None:
    """Write a page atomically. Raises CheckpointError if the path cannot be a file, PageError if writing fails."""
    try:
        write_text(check_writable_file(path, "html"), html)
    except OSError as error:
        raise PageError(f"could not write {str(path)!r} ({error.strerror})", remedy="free space or name another file") from None


def digest(text: str) -> str:
    """Return the SHA-256 that names a script or style in the policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
