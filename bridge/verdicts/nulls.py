"""Nulls of a coupling on prompts: the same search and evidence, run on null couplings that must fail.

For each null (`null_couplings`) and each prompt, the question is the dense model's own answer. Error nodes make the null's
sparse model follow the dense model, circuits are searched and judged by the same bounds, and the number of explanations per
verdict is kept. None may earn "representational" or better. If one would by its circuit's deletion alone, deletion is not enough
for the coupling's circuits either: single nodes' effects must rank alike too. A span below `least_span` is no explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense, reference_means
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import find_nested
from bridge.display.columns import columns
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.errors import UserError
from bridge.evidence.sufficiency import measure_nested
from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location
from bridge.verdicts.null_couplings import MINUTES, NULL_NAMES, NullName, null_coupling
from bridge.verdicts.null_table import PromptNull, PromptVerdict, keep_nulls, rules_digest
from bridge.verdicts.prompt import EvidenceConfig, gather_evidence, opening_of

LENGTHS = 8, 24  # tokens of a prompt

Means = dict[Location, Tensor]


def prompt_means(coupling: CoupledModels) -> Means:
    """Return the means of all nodes and errors over the coupling's reference text, which must exist; kept with the coupling."""
    assert coupling.reference_bt is not None
    return reference_means(coupling, coupling.reference_bt)


def cut_prompts(coupling: CoupledModels, count: int, seed: int = 0) -> list[Tensor]:
    """Return prompts of 8 to 24 tokens, cut by seed from the coupling's held-out text. Raises UserError if it has none."""
    if coupling.reference_bt is None or not coupling.reference_bt.numel():
        raise UserError("the coupling", "holds no reference text to cut prompts from", "fit it again")
    text_bt, generator = coupling.reference_bt, torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    prompts = []
    for _ in range(count):
        length = min(draw(*LENGTHS), text_bt.shape[1])
        row, start = draw(0, len(text_bt) - 1), draw(0, text_bt.shape[1] - length)
        prompts.append(text_bt[row, start : start + length])
    return prompts


def judged(
    coupling: CoupledModels, tokens_t: Tensor, means: Means, search: SearchConfig, config: EvidenceConfig, seed: int = 0
) -> PromptVerdict:
    """Search and judge the circuit for one prompt."""
    followed = follow_dense(coupling, tokens_t[None])
    question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()))
    loss = CircuitLoss(MaskedModel(coupling.sparse, question, means, followed.errors), followed.dense_bv, search)
    if abs(loss.span) < search.least_span:
        return PromptVerdict("no explanation", "no explanation", None)
    nested = find_nested(loss)
    circuits = measure_nested(loss, nested, seed)
    opening = opening_of(circuits, search.opening, config)
    report = gather_evidence(coupling, loss, nested, circuits, opening, followed, config=config, seed=seed).report
    by_deletion = replace(report, rules=config.rules(counterfactual=False, by_deletion=True)).verdict
    return PromptVerdict(report.verdict, by_deletion, report["dense_ratio"].value)


def run_prompt_nulls(
    coupling: CoupledModels,
    prompts: Sequence[Tensor],
    against: Path | None,
    *,
    names: Sequence[NullName] = NULL_NAMES,
    search: SearchConfig | None = None,
    config: EvidenceConfig | None = None,
    minutes: float = MINUTES,
    seed: int = 0,
    progress: OnProgress = ignore_progress,
) -> tuple[PromptNull, ...]:
    """Run each null on the prompts, and write the results to the coupling's folder if it has one.

    The uncoupled model is loaded from the folder `against`, or trained there for `minutes`. Raises NullError without a folder.
    """
    search, config = search or SearchConfig(), config or EvidenceConfig()
    nulls: list[PromptNull] = []
    for name in names:
        progress(Phase(f"{name}: making the null coupling"))
        null = null_coupling(coupling, name, against=against, minutes=minutes, seed=seed, progress=progress)
        means = prompt_means(null)
        found: list[PromptVerdict] = []
        for place, tokens_t in enumerate(prompts):
            found.append(judged(null, tokens_t.to(coupling.dense.device), means, search, config, seed))
            progress(Phase(f"{name}, prompts", place + 1, len(prompts), found[-1].verdict))
        nulls.append(PromptNull.of(name, found))
    if coupling.path is not None:
        keep_nulls(coupling, "prompts", nulls, rules_digest(search, config))
    return tuple(nulls)


def render_prompt_nulls(nulls: Sequence[PromptNull]) -> str:
    """Return a table of the nulls: number of explanations with each verdict, and median ratio of dense to sparse loss."""
    rows: list[tuple[str, ...]] = [
        ("null", "prompts", "representational or better", "by deletion alone", "verdicts", "dense over sparse loss")
    ]
    for null in nulls:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(null.verdicts.items()))
        ratio = "-" if null.ratio is None else f"{null.ratio:.2f}"
        rows.append((null.name, *map(str, (null.prompts, null.strong, null.by_deletion)), verdicts, ratio))
    return "\n".join(columns(rows, 120))
