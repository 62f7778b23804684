"""Blind prediction: what the circuit alone, in the sparse model, says of the dense model's answers on prompts not seen before.

On stress prompts (`stress`) the logit difference D of S_C, with its edges, stands as a prediction of the dense model's D, as it
is: nothing is fitted to the dense model. Which answer is right is not told: D is that of the same two answers, in the same order,
for both members of a pair.

    R^2          1 - sum (D_dense - D_C)^2 / sum (D_dense - mean D_dense)^2; above 0, and above a bigram's, with the intervals
                 of itself and of the difference
    correlation  of D_C and D_dense among prompts when D is turned so that the right answer comes first: told, not judged; what is
                 foreseen beyond which answer is given
    signs        share of prompts where both prefer the same answer: .9 and at least a bigram's
    mistakes     of the prompts that the dense model gets wrong, the share that S_C gets wrong, above a half, and above its
                 share of mistakes where the dense model is right; left out where there are fewer than ten
    ceiling      the whole sparse model in the circuit's place
    bigram       the dense model's own mean logits over held-out text after the prompt's last token (where that text has none of
                 it, its logits after the token alone)

Intervals are over the held-out pairs that stress prompts were made from: all that was made from one is drawn together.

Shape legend: b stress pair (row; of `_differences` a prompt), v vocabulary, k draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from bridge.bootstrap import Draws
from bridge.card.card import CardMeasure, Point
from bridge.card.case import Case, numbers
from bridge.card.stress import Stress
from bridge.circuits.subject import SparseSubject, masked_gate
from bridge.dense import DenseModel
from bridge.tasks.tokens import TokenPairs
from bridge.validate import Control

FEWEST, FEWEST_MISTAKES = 200, 10
FORESEEN = 0.9
BIGRAM_ROWS = 128
R2, SIGNS, MISTAKES = "R^2 on unseen prompts", "answers foreseen", "dense mistakes foreseen"
AIMS: Mapping[str, str] = {R2: "> bigram, > 0", SIGNS: f">= {FORESEEN:g}, >= bigram", MISTAKES: "> 0.5, > false alarms"}


@torch.no_grad()
def blind_measures(
    case: Case,
    stress: Mapping[str, Stress],
    reference_bt: Tensor,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[CardMeasure, ...]:
    """The test's measures, each kind of stress a point of the first. reference_bt is text for the bigram baseline."""
    prompts = sum(2 * len(pairs) for pairs in stress.values())
    if prompts < FEWEST:
        note = f"{prompts} stress prompts could be made of this task's pairs, and {FEWEST} are asked"
        return tuple(CardMeasure(name, None, None, aim, None, note, test="blind") for name, aim in AIMS.items())
    progress(f"blind prediction: {prompts} stress prompts of {len(stress)} kinds")
    device = case.coupling.dense.device
    found = {kind: _differences(case, some.pairs.to(device), reference_bt) for kind, some in stress.items()}
    draws = Draws(np.concatenate([some.source_b.numpy() for some in stress.values()]), seed)
    # pairs in rows, their two members in columns
    dense_b2, circuit_b2, whole_b2, bigram_b2 = (np.concatenate([each[name] for each in found.values()]) for name in _NAMES)
    points = tuple(
        Point(kind, {"prompts": float(each["dense"].size), "R^2": _r2(each["dense"] * _ORDER, each["circuit"] * _ORDER),
                     "correlation": _correlation(each["dense"], each["circuit"]),
                     "answers foreseen": _same(each["dense"], each["circuit"]), "dense right": float(np.mean(each["dense"] > 0))})
        for kind, each in found.items()
    )  # fmt: skip
    explained = _explained(dense_b2, circuit_b2, whole_b2, bigram_b2, points, draws)
    mistakes = int((dense_b2 <= 0).sum())
    few = mistakes < FEWEST_MISTAKES or mistakes == dense_b2.size
    note = f"the dense model makes {mistakes} mistakes in {dense_b2.size} prompts{': there is nothing to foresee' if few else ''}"
    signs = _signs(dense_b2, circuit_b2, whole_b2, bigram_b2, note, draws)
    return (explained, signs) if few else (explained, signs, _mistakes(dense_b2, circuit_b2, whole_b2, draws))


_NAMES = ("dense", "circuit", "whole", "bigram")
_ORDER = np.array([1.0, -1.0])  # by which both members of a pair have D of the same two answers in the same order


def _differences(case: Case, pairs: TokenPairs, reference_bt: Tensor) -> dict[str, np.ndarray]:
    """D_b2 of both members of every pair, by who says it."""
    both = pairs.both()
    kept_f = case.whole.space.join({at: kept_tn[:1] for at, kept_tn in case.kept.items()})
    dense = case.coupling.dense
    columns: dict[str, list[Tensor]] = {name: [] for name in _NAMES}
    order_b = both.last_b.argsort(stable=True)
    for row_b in order_b.split(32):
        some = both.rows(row_b)
        columns["dense"].append(some.difference(some.at_last(dense.run(some.prompt_bt).logits_btv)))
        columns["circuit"].append(some.difference(_alone(case.alone, some, kept_f)))
        columns["whole"].append(some.difference(case.whole.logits(some)))
    unsorted = torch.argsort(order_b)
    bigram_bv = bigram_logits(dense, both, reference_bt)
    found = {name: torch.cat(parts)[unsorted] for name, parts in columns.items() if parts}
    found["bigram"] = both.difference(bigram_bv)
    return {name: numbers(value_b).reshape(2, -1).T for name, value_b in found.items()}


def _alone(subject: SparseSubject, pairs: TokenPairs, kept_f: Tensor) -> Tensor:
    return subject.logits(pairs, masked_gate(subject, kept_f))


def bigram_logits(dense: DenseModel, pairs: TokenPairs, reference_bt: Tensor) -> Tensor:
    """logits_bv: the dense model's mean logits over text after the last token of each prompt; after it alone where unseen."""
    last_b = pairs.prompt_bt.gather(1, pairs.last_b[:, None])[:, 0]
    token_k, of_b = last_b.unique(return_inverse=True)
    alone_kv = dense.run(token_k[:, None]).logits_btv[:, 0].float()
    sum_kv, count_k = torch.zeros_like(alone_kv), torch.zeros(len(token_k), device=token_k.device)
    for rows_bt in reference_bt[:BIGRAM_ROWS].to(token_k.device).split(16):
        place_bt = torch.searchsorted(token_k, rows_bt).clamp(max=len(token_k) - 1)
        here_bt = token_k[place_bt] == rows_bt
        if bool(here_bt.any()):
            logits_iv = dense.run(rows_bt).logits_btv.float()[here_bt]
            sum_kv.index_add_(0, place_bt[here_bt], logits_iv)
            count_k += torch.bincount(place_bt[here_bt], minlength=len(token_k))
    mean_kv = torch.where(count_k[:, None] > 0, sum_kv / count_k[:, None].clamp(min=1), alone_kv)
    return mean_kv[of_b]


def _r2(dense: np.ndarray, other: np.ndarray) -> float:
    return float(1 - np.sum((dense - other) ** 2) / max(np.sum((dense - dense.mean()) ** 2), 1e-12))


def _correlation(dense: np.ndarray, other: np.ndarray) -> float:
    deviation, of_other = (x - x.mean() for x in (dense, other))
    return float((deviation * of_other).sum() / max(np.sqrt((deviation**2).sum() * (of_other**2).sum()), 1e-12))


def _same(dense: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((dense > 0) == (other > 0)))


def _explained(
    dense_b2: np.ndarray,
    circuit_b2: np.ndarray,
    whole_b2: np.ndarray,
    bigram_b2: np.ndarray,
    points: tuple[Point, ...],
    draws: Draws,
) -> CardMeasure:
    correlation = _correlation(dense_b2, circuit_b2)
    dense_b2, circuit_b2, whole_b2, bigram_b2 = (x_b2 * _ORDER for x_b2 in (dense_b2, circuit_b2, whole_b2, bigram_b2))

    def r2(weight_kb: np.ndarray, other_b2: np.ndarray) -> np.ndarray:
        mean_k = weight_kb @ dense_b2.mean(1) / weight_kb.sum(1)
        deviation_k = weight_kb @ (dense_b2**2).sum(1) - 2 * weight_kb.sum(1) * mean_k**2
        return 1 - weight_kb @ ((dense_b2 - other_b2) ** 2).sum(1) / deviation_k

    value, most, bigram = (_r2(dense_b2, x_b2) for x_b2 in (circuit_b2, whole_b2, bigram_b2))
    better = draws.interval(lambda weight_kb: r2(weight_kb, circuit_b2) - r2(weight_kb, bigram_b2))
    bounds = draws.interval(lambda weight_kb: r2(weight_kb, circuit_b2))
    passed = all(found is not None and found[0] > 0 for found in (bounds, better))
    kinds = ", ".join(f"{point.label} {point.values['R^2']:.2f}" for point in points)
    return CardMeasure(
        R2, value, Control("bigram", 1, bigram, bigram, "it"), AIMS[R2], passed,
        f"{dense_b2.size} prompts: {kinds}; correlation where the answer is known {correlation:.2f}", "blind", bounds,
        Control("all nodes", 1, most, most, "it"), points,
    )  # fmt: skip


def _signs(
    dense_b2: np.ndarray, circuit_b2: np.ndarray, whole_b2: np.ndarray, bigram_b2: np.ndarray, note: str, draws: Draws
) -> CardMeasure:
    value, most, bigram = (_same(dense_b2, x_b2) for x_b2 in (circuit_b2, whole_b2, bigram_b2))
    same_b = ((dense_b2 > 0) == (circuit_b2 > 0)).mean(1)
    bounds = draws.interval(lambda weight_kb: weight_kb @ same_b / weight_kb.sum(1))
    return CardMeasure(
        SIGNS, value, Control("bigram", 1, bigram, bigram, "it"), AIMS[SIGNS], value >= max(bigram, FORESEEN), note, "blind",
        bounds, Control("all nodes", 1, most, most, "it"),
    )  # fmt: skip


def _mistakes(dense_b2: np.ndarray, circuit_b2: np.ndarray, whole_b2: np.ndarray, draws: Draws) -> CardMeasure:
    wrong_b2 = dense_b2 <= 0
    value, most = (float(np.mean(x_b2[wrong_b2] <= 0)) for x_b2 in (circuit_b2, whole_b2))
    alarms = float(np.mean(circuit_b2[~wrong_b2] <= 0))
    hits_b, wrongs_b = ((circuit_b2 <= 0) & wrong_b2).sum(1), wrong_b2.sum(1)
    bounds = draws.interval(lambda weight_kb: weight_kb @ hits_b / (weight_kb @ wrongs_b))
    return CardMeasure(
        MISTAKES, value, Control("false alarms", int((~wrong_b2).sum()), alarms, alarms, "it"), AIMS[MISTAKES],
        value > 0.5 and value > alarms, f"{int(wrong_b2.sum())} mistakes of the dense model", "blind", bounds,
        Control("all nodes", 1, most, most, "it"),
    )  # fmt: skip
