"""Explain held-out prompts and summarise: how many are explained, circuit sizes, faithfulness, deletion, and time.

    python tests/benchmarks/prompts.py --bridge checkpoints/python-bridge-32 --count 40
    python tests/benchmarks/prompts.py --tokens 120 --count 8   prompts of 120 tokens
    python tests/benchmarks/prompts.py --prompts FILE           one JSON string per line

Prompts are 8 to 24 tokens, drawn by seed from anywhere in the held-out text that is stored with the coupling. The script prints a
line for each prompt and, at the end, one line of JSON with medians and 90 % quantiles (p90). F is the normalised faithfulness of
the drawn circuit; shares are of the span. Wall seconds are a user's waiting time, processor seconds those of an idle core.
Neither includes the means over the reference text, which are taken once for a coupling.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do, before torch is imported

import numpy as np
import torch

import bridge
from bridge.circuits.error_nodes import reference_rows
from bridge.errors import UserError
from bridge.explanations.explanation import Explanation
from bridge.models.bridges import CoupledModels

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "python-bridge-32"
LENGTHS = 8, 24  # tokens


def held_out_prompts(coupling: CoupledModels, count: int, seed: int, lengths: tuple[int, int] = LENGTHS) -> list[str]:
    """Return pieces of the coupling's held-out text (except the text of the means) whose tokens survive decoding and encoding."""
    assert coupling.reference_bt is not None
    rows = coupling.reference_bt[len(reference_rows(coupling, coupling.reference_bt)) :].tolist()
    draw, prompts, tokenizer = random.Random(seed), list[str](), coupling.dense.tokenizer
    assert tokenizer is not None
    special = set(tokenizer.all_special_ids)
    for _ in range(200 * count):
        if len(prompts) == count:
            break
        row, length = draw.choice(rows), draw.randint(*lengths)
        start = draw.randrange(0, max(1, len(row) - length))
        ids = row[start : start + length]
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        again = tokenizer(text)["input_ids"]
        if special.isdisjoint(ids) and text.strip() and again[-length:] == ids:
            prompts.append(text)
    return prompts


def given_prompts(file: Path) -> list[str]:
    """Return the prompts of a file with one JSON string per line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def middle(values: Iterable[float | None], quantile: float = 0.5) -> float | None:
    """Return a quantile of the values that are not None, rounded; None if there are none."""
    known = [value for value in values if value is not None]
    return round(float(np.quantile(known, quantile)), 3) if known else None


def both(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the median and the 90 % quantile."""
    return {"median": middle(values), "p90": middle(values, 0.9)}


def value_of(explanation: Explanation, key: str) -> float | None:
    """Return the value of a measure of an explanation, None if it has none."""
    return next((measure.value for measure in explanation.report.measures if measure.key == key), None)


def at_site(explanation: Explanation, name: str) -> float | None:
    """Return the largest value over sites that the points of the transported deletion have under a name (`dense`, `matched`)."""
    points = next((measure.points for measure in explanation.report.measures if measure.key == "dense_ratio"), ())
    return max((point.values[name] for point in points if name in point.values), default=None)


def line_of(place: int, explanation: Explanation, wall: float, processor: float) -> str:
    """Return the line that is printed for a prompt."""
    circuit, counts = explanation.circuit, explanation.counts
    size = f"{circuit.nodes:>6,} nodes {circuit.errors:>2} errors {len(explanation.groups):>3} groups {counts.edges:>6,} edges"
    holds = f"F {circuit.faithfulness:.2f} {circuit.supersets_mean:.2f} {circuit.supersets_worst:.2f}  left {circuit.left:+.2f}"
    return (
        f"{place:>3} {len(explanation.tokens):>3} tokens  span {explanation.span:>+6.1f}  {size}  {holds}  errors' share "
        f"{circuit.error_share:.2f}  {wall:>4.1f} s {processor:>4.1f} s  {explanation.report.verdict:<19} "
        f"{explanation.prompt[-24:]!r} -> {explanation.answer.text!r}"
    )


def summary(explanations: Sequence[Explanation], wall: Sequence[float], processor: Sequence[float]) -> dict[str, Any]:
    """Return the summary; figures of circuits are over the prompts that have a span to explain."""
    some = [each for each in explanations if each.circuit.nodes]
    verdicts = Counter(each.report.verdict for each in explanations)
    total = max(1, len(explanations))
    names = [] if not some else ["all" if each.asked is None else f"{each.asked:g}" for each in some[0].nested]
    levels = {
        name: {
            "nodes": both([each.nested[place].nodes for each in some]),
            "errors": both([each.nested[place].errors for each in some]),
            "within": round(sum(each.nested[place].within for each in some) / len(some), 3),
            "kl": middle(each.nested[place].kl for each in some),
            "faithfulness": middle(each.nested[place].faithfulness for each in some),
            "miss_nats": middle(abs(each.nested[place].miss) for each in some),
            "supersets_mean": middle(each.nested[place].supersets_mean for each in some),
            "supersets_worst": middle(each.nested[place].supersets_worst for each in some),
            "left": middle(each.nested[place].left for each in some),
        }
        for place, name in enumerate(names)
    }
    circuits = [each.circuit for each in some]
    return {
        "prompts": len(explanations),
        "explained": round(sum(each.report.verdict not in ("no explanation", "refuted") for each in explanations) / total, 3),
        "verdicts": {verdict: round(count / total, 3) for verdict, count in sorted(verdicts.items())},
        "drawn_above": sum(each.opening > each.config.opening for each in some),  # if the circuit asked for does not hold
        "levels": levels,
        "edges": both([each.counts.edges for each in some]),
        "edges_before": both([each.counts.edges_before for each in some]),
        "edges_faithfulness": middle(each.counts.edges_faithfulness for each in some),
        "groups": both([len(each.groups) for each in some]),
        "group_correlation": middle(each.group_correlation for each in some),
        "seconds_wall": both(wall),
        "seconds_processor": both(processor),
        "span": middle(abs(each.span) for each in explanations),
        "faithfulness": {
            "alone": middle(circuit.faithfulness for circuit in circuits),
            "supersets_mean": middle(circuit.supersets_mean for circuit in circuits),
            "supersets_worst": middle(circuit.supersets_worst for circuit in circuits),
            "matched": middle(value_of(each, "matched") for each in some),
            "adversary": middle(circuit.adversary for circuit in circuits),
        },
        "miss_nats": {
            "alone": middle(abs(circuit.miss) for circuit in circuits),
            "supersets_rms": middle(circuit.supersets_rms * abs(each.span) for circuit, each in zip(circuits, some, strict=True)),
            "matched": middle(
                None if (matched := value_of(each, "matched")) is None else (1 - matched) * abs(each.span) for each in some
            ),
        },
        "lost": {
            "sparse": middle(1 - circuit.left for circuit in circuits),
            "sparse_with_backup": middle(value_of(each, "lost") for each in some),
            "dense_best_site": middle(value_of(each, "dense_best") for each in some),
            "dense_over_sparse": middle(value_of(each, "dense_ratio") for each in some),
            "matched_sparse": middle(None if (control := each.report["lost"].control) is None else control.mean for each in some),
            "matched_dense": middle(value_of(each, "dense_matched") for each in some),
            "matched_dense_best_site": middle(at_site(each, "matched") for each in some),
        },
        "error_share": both([circuit.error_share for circuit in circuits]),
        "with_errors": round(sum(circuit.errors > 0 for circuit in circuits) / max(1, len(some)), 3),
        "replacement": middle(each.replacement for each in some),
        "completeness": middle(each.completeness for each in some),
    }


def main() -> None:
    """Explain the prompts, print a line for each and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default=str(SHIPPED))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--chat", action="store_true", help="what a user says, put into the model's chat template")
    parser.add_argument("--tokens", type=int, help="of a prompt, instead of 8 to 24")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    coupling = bridge.load(arguments.bridge)
    if arguments.prompts is None:
        lengths = LENGTHS if arguments.tokens is None else (arguments.tokens, arguments.tokens)
        prompts = held_out_prompts(coupling, arguments.count, arguments.seed, lengths)
    else:
        prompts = given_prompts(arguments.prompts)[: arguments.count]
    if arguments.chat:
        prompts = [coupling.dense.prompts.chat(prompt) for prompt in prompts]
    bridge.explain(coupling, prompts[0])  # stores the means with the coupling, and compiles kernels
    explanations, walls, processors = list[Explanation](), list[float](), list[float]()
    for place, prompt in enumerate(prompts):
        started = time.perf_counter(), time.process_time()
        try:
            explanation = bridge.explain(coupling, prompt)
        except UserError as error:
            print(f"{place:>3} {error}")
            continue
        wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
        explanations.append(explanation)
        walls.append(wall)
        processors.append(processor)
        print(line_of(place, explanation, wall, processor), flush=True)
    print(
        json.dumps({"bridge": arguments.bridge, "threads": torch.get_num_threads(), **summary(explanations, walls, processors)})
    )


if __name__ == "__main__":
    main()
