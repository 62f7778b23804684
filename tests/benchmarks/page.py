"""Time the page of an explanation, opened from a file in Chromium: until it can be used, and for opening groups and the like.

    python tests/benchmarks/page.py [--nodes 20 500 3000] [--tokens 100] [--rounds 5]

The circuits are synthetic, with up to 5,000 edges and the pages of 500 nodes. "interactive" is the time from the start of the
navigation to the end of the page's script, when every control responds; the other times run from an event to the second frame
after it, when its effect is visible. Medians in ms, each round in a new page. The aim is interactive under 1,000 with 500 nodes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.explained import made_up

from bridge.explanations.page import render_html

_AFTER = """(act) => new Promise((done) => {
  const began = performance.now();
  new Function(act)();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
})"""
_ACTS = {
    "open": "document.querySelectorAll('.plot [data-key]')[3].dispatchEvent(new MouseEvent('click', {bubbles: true}))",
    "open all": "document.getElementById('open-all').click()",
    "choose": "document.querySelectorAll('.plot .leaf')[3].dispatchEvent(new MouseEvent('click', {bubbles: true}))",
    "hover": "document.querySelectorAll('.plot .leaf')[9].dispatchEvent(new PointerEvent('pointerenter'))",
    "slide": "const slider = document.getElementById('level'); slider.value = 0; slider.dispatchEvent(new Event('input'))",
    "find": "const box = document.getElementById('find'); box.value = 'mlp'; box.dispatchEvent(new Event('input'))",
}


def times(page: Page, file: Path) -> dict[str, float]:
    """Return the milliseconds of one round."""
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    taken = {"interactive": float(page.evaluate("Number(document.documentElement.dataset.ready)"))}
    return taken | {name: page.evaluate(_AFTER.replace("new Function(act)()", act), None) for name, act in _ACTS.items()}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--nodes", type=int, nargs="+", default=[20, 500, 3000])
    options.add_argument("--tokens", type=int, default=100)
    options.add_argument("--rounds", type=int, default=5)
    asked = options.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("there is no Chromium on the path")
    with sync_playwright() as started, tempfile.TemporaryDirectory() as folder:
        browser = started.chromium.launch(executable_path=chromium)
        print(f"Chromium {browser.version}, {asked.tokens} tokens, median of {asked.rounds} rounds in ms\n")
        print(f"{'nodes':>6}{'drawn':>7}{'MB':>6}{'render':>8}{'interactive':>13}" + "".join(f"{name:>8}" for name in _ACTS))
        for nodes in asked.nodes:
            data = made_up(nodes, asked.tokens, above=0)
            began = time.perf_counter()
            html = render_html(data)
            rendered = 1000 * (time.perf_counter() - began)
            file = Path(folder) / f"{nodes}.html"
            file.write_text(html, encoding="utf-8")
            rounds, drawn = [], 0
            for _ in range(asked.rounds):
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                rounds.append(times(page, file))
                drawn = page.locator(".plot .card").count()
                page.close()
            row = {name: median(each[name] for each in rounds) for name in rounds[0]}
            print(
                f"{nodes:>6}{drawn:>7}{len(html) / 1e6:>6.1f}{rendered:>8.0f}{row['interactive']:>13.0f}"
                + "".join(f"{row[name]:>8.0f}" for name in _ACTS)
            )
        browser.close()


if __name__ == "__main__":
    main()
