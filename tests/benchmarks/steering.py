"""Measure how far sparse nodes steer the dense model from a prompt's answer to its counterfactual's, on held-out pairs.

    python tests/benchmarks/steering.py [--bridge DIR] [--task NAME ...] [--circuit NAME=DIR ...] [--pairs 16] [--out DIR]

Every pair of the test split is used twice, once from each side. The following are patched at strength 1: the whole change of the
residual, by the bridge at each site (the ceiling, embeddings included); every node; a circuit's nodes, if a folder written by
`bridge circuit` is given; and the K channels with the largest first-order effect on train pairs in the sparse model, which is the
change of a channel times the gradient of the log odds. Controls are random directions of equal norm at the same sites and
positions. "share" is the counterfactual's answer as a share of both answers. "reach" is the number of prompts that go from under
5 % to over 50 % while random directions stay under 10 % in the mean, out of those whose counterfactual itself has over 50 %.
--out writes an SVG per task and contender with curves that are means over prompts, which takes five times as long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bridge.cli.console import shipped_coupling
from bridge.data.task_pairs import load_task
from bridge.data.task_tokens import TokenPairs, resolve
from bridge.display.plots import svg
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node, recording_gate
from bridge.models.sparse import Location
from bridge.models.store import write_text
from bridge.models.transport import change_between, decode_changes
from bridge.steering.curves import Spread, random_directions, steered_logits
from bridge.steering.figure import Panel, figure_of
from bridge.steering.interventions import Intervention, Steerer, circuit_interventions, intervene_on_every_node

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
FEW = (1, 10, 100, 1000)
LOW, HIGH, RANDOM = 0.05, 0.5, 0.1  # the aim


@dataclass(frozen=True)
class Result:
    """Probabilities of the wrong side (the counterfactual's answer) and of the answer; b prompts, r draws, k strengths."""

    wrong_bk: Tensor
    answer_bk: Tensor
    random_wrong_brk: Tensor
    random_answer_brk: Tensor


def sides(pairs: TokenPairs, row: int, logits_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the wrong answer and of the answer, each summed over its spellings."""
    probability_v = logits_v.softmax(-1)

    def total(ids_bk: Tensor, other: bool) -> Tensor:
        ids_k = ids_bk[row][ids_bk[row] >= 0]
        listed = probability_v[..., ids_k].sum(-1)
        return 1 - listed if other else listed

    return total(pairs.wrong_bk, bool(pairs.wrong_not_b[row])), total(pairs.answer_bk, bool(pairs.answer_not_b[row]))


def patched(
    coupling: CoupledModels,
    pairs: TokenPairs,
    changes_of: Callable[[Tensor, Tensor], dict[int, Tensor]],
    draws: int,
    strengths: Sequence[float],
) -> Result:
    """Return the answers at each strength under changes of the dense residual, which changes_of makes from both prompts."""
    found: list[tuple[Tensor, ...]] = []
    for row in range(len(pairs)):
        length = int(pairs.last_b[row]) + 1
        tokens_t, other_t = pairs.prompt_bt[row, :length], pairs.counterfactual_bt[row, :length]
        plain = coupling.dense.run(tokens_t[None])
        changes = changes_of(tokens_t, other_t)
        generator = torch.Generator().manual_seed(row)
        rows = {site: torch.cat([c_1td, random_directions(c_1td[0], draws, generator)]) for site, c_1td in changes.items()}
        wrong_rk, answer_rk = sides(pairs, row, steered_logits(coupling, tokens_t, plain, rows, strengths))
        found.append((wrong_rk[0], answer_rk[0], wrong_rk[1:], answer_rk[1:]))
    return Result(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def best_channels(coupling: CoupledModels, pairs: TokenPairs, most: int) -> list[Intervention]:
    """Return the channels that lower the answer's log odds most, to first order, when set to the counterfactual's values."""
    sparse = coupling.sparse
    other: dict[Location, Tensor] = {}
    sparse.run(pairs.counterfactual_bt, gate=recording_gate(other))
    probe: dict[Location, Tensor] = {}
    value: dict[Location, Tensor] = {}

    def probing(location: Location, x_btn: Tensor) -> Tensor:
        value[location], probe[location] = x_btn.detach(), torch.zeros_like(x_btn).requires_grad_()
        return x_btn + probe[location]

    with torch.enable_grad():
        odds_b = pairs.difference(pairs.logits_at_last(sparse.run(pairs.prompt_bt, gate=probing).logits_btv))
        gradients = torch.autograd.grad(odds_b.sum(), list(probe.values()))
    there_bt1 = (torch.arange(pairs.prompt_bt.shape[1]) <= pairs.last_b[:, None])[..., None]
    changed = {
        at: ((other[at] - value[at]) * gradient * there_bt1).sum((0, 1)) for at, gradient in zip(probe, gradients, strict=True)
    }
    named = [
        (float(effect), Node(at, index)) for at, effect_n in changed.items() for index, effect in enumerate(effect_n.tolist())
    ]
    return [Intervention(node) for _, node in sorted(named)[:most]]


def line(label: str, result: Result, ceiling_b: Tensor, since: float) -> str:
    """Return a contender's row at the largest strength; ceiling_b is the answer's probability on the counterfactual itself."""
    wrong_b, random_b = result.wrong_bk[:, -1], result.random_wrong_brk[:, :, -1].mean(1)
    reached = (result.wrong_bk[:, 0] < LOW) & (wrong_b > HIGH) & (random_b < RANDOM)
    share = (wrong_b / (wrong_b + result.answer_bk[:, -1])).mean()
    per_draw_r = result.random_wrong_brk[:, :, -1].mean(0)
    return (
        f"{label:<34}{float(result.wrong_bk[:, 0].mean()):9.3f}{float(wrong_b.mean()):9.3f}"
        f"{float(wrong_b.mean() / ceiling_b.mean()):9.2f}{float(share):7.2f}{float(per_draw_r.mean()):8.3f}"
        f"{float(per_draw_r.max()):7.3f}{int(reached.sum()):5}/{int((ceiling_b > HIGH).sum())}{time.monotonic() - since:5.0f}"
    )


def main() -> None:
    """Print a table for each task, and write its plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bridge")
    parser.add_argument("--task", nargs="+", default=["single_double_quote", "while_return_true"])
    parser.add_argument("--circuit", nargs="*", action="extend", default=[], metavar="NAME=DIR")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    coupling = CoupledModels.from_pretrained(arguments.bridge or shipped_coupling())
    sizes, circuits = coupling.sparse.locations(), dict(text.split("=", 1) for text in arguments.circuit)
    for name in arguments.task:
        task = resolve(load_task(name), coupling.dense.tokenizer, context=coupling.context, splits=("train", "test"))
        pairs = task.splits["test"].rows(torch.arange(min(arguments.pairs, len(task.splits["test"])))).both_members()
        train = task.splits["train"].rows(torch.arange(min(64, len(task.splits["train"])))).both_members()
        counterfactual = [
            sides(
                pairs, row, coupling.dense.run(pairs.counterfactual_bt[row, : int(pairs.last_b[row]) + 1][None]).logits_btv[0, -1]
            )
            for row in range(len(pairs))
        ]
        wrong_b, answer_b = (torch.stack(parts) for parts in zip(*counterfactual, strict=True))
        print(f"\n{name}: {len(pairs)} prompts; on the counterfactual itself p {float(wrong_b.mean()):.3f}")
        heads = f"{'p before':>9}{'p after':>9}{'of cf':>9}{'share':>7}{'random':>8}{'most':>7}{'reach':>8}{'s':>5}"
        print(f"{'patched at strength 1':<34}{heads}")
        best = best_channels(coupling, train, max(FEW))
        chosen: dict[str, list[Intervention]] = {"every node": intervene_on_every_node(sizes)}
        if name in circuits:
            chosen["the circuit's nodes"] = circuit_interventions(circuits[name], coupling)
        chosen |= {f"{few} channels": best[:few] for few in FEW}

        def whole_at(site: int) -> Callable[[Tensor, Tensor], dict[int, Tensor]]:
            def changes(tokens_t: Tensor, other_t: Tensor) -> dict[int, Tensor]:
                plain, other = coupling.sparse.run(tokens_t[None]), coupling.sparse.run(other_t[None])
                site_b = torch.tensor([site])
                return {site: decode_changes(coupling, site_b, change_between(plain, other, site_b))}

            return changes

        def by_nodes(interventions: list[Intervention], site: int | None) -> Callable[[Tensor, Tensor], dict[int, Tensor]]:
            return lambda tokens_t, other_t: Steerer(coupling, tokens_t, interventions, other_t, site=site).residual_changes(
                tokens_t[None]
            )

        for site in range(coupling.n_sites):
            since = time.monotonic()
            result = patched(coupling, pairs, whole_at(site), arguments.draws, (1.0,))
            print(line(f"whole residual at site {site}", result, wrong_b, since), flush=True)
        every_bk = every_answer_bk = None
        for label, interventions in chosen.items():
            for site in (None, coupling.n_sites - 2):
                since = time.monotonic()
                if site is not None and not any(coupling.sparse.site(each.node.location) < site for each in interventions):
                    continue
                strengths = STRENGTHS if site is None and arguments.out is not None else (1.0,)
                result = patched(coupling, pairs, by_nodes(interventions, site), arguments.draws, strengths)
                where = "own sites" if site is None else f"at site {site}"
                print(line(f"{label}, {where}", result, wrong_b, since), flush=True)
                if site is not None or arguments.out is None:
                    continue
                if every_bk is None or every_answer_bk is None:
                    every_bk, every_answer_bk = result.wrong_bk, result.answer_bk
                panels = [
                    _panel("the counterfactual's answer", result.wrong_bk, result.random_wrong_brk, every_bk, wrong_b),
                    _panel("the prompt's answer", result.answer_bk, result.random_answer_brk, every_answer_bk, answer_b),
                ]
                band = f"band: lowest to highest of {arguments.draws} random directions"
                note = f"Means over {len(pairs)} prompts of the test split; {band}."
                arguments.out.mkdir(parents=True, exist_ok=True)
                file = f"{name}-{label.replace(' ', '-').replace(chr(39), '')}.svg"
                write_text(arguments.out / file, svg(figure_of(f"Steering the dense model: {name}, {label}", note, panels)))


def _panel(title: str, chosen_bk: Tensor, random_brk: Tensor, every_bk: Tensor, counterfactual_b: Tensor) -> Panel:
    random_rk = random_brk.mean(0)
    spreads = [Spread.of(value_r) for value_r in random_rk.unbind(1)]
    every = None if every_bk is chosen_bk else every_bk.mean(0).tolist()
    return Panel(title, (0.0, *STRENGTHS), chosen_bk.mean(0).tolist(), spreads, every, float(counterfactual_b.mean()))


if __name__ == "__main__":
    main()
