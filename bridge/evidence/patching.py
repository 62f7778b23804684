"""Interchange interventions (counterfactual patching): a circuit's nodes take values of another prompt, transported into dense.

With R the reference on a prompt and R_c that on a counterfactual of as many tokens (every node kept, errors at their means but
those of the circuit), the sparse model is run on the prompt with

    a_i  <-  a_i(R_c)  for i in the circuit        (its errors as well)

every other node computing on from what it then reads. The change of the residual at each site is transported into the dense
model. The share is that of the counterfactual's effect, d(dense on the prompt) - d(dense on the counterfactual), in the mean
over all sites behind the first sublayer: no site is chosen. Of several prompts (a task's pairs) both are sums over them.
Beside it

    all nodes     patched, the ceiling (the embedding is no node, and stays the prompt's)
    dense         by site, the dense model's own writes, h_j(c) - h_j(p) - (h_0(c) - h_0(p))
    matched       nodes matched in location and position

and of several prompts, each of them at one site a draw,

    rotated       the circuit's change in the dense model rotated at random, in the same way at every position of every
                  prompt: as large, and as coherent over prompts
    other pairs   the change of another prompt of as many tokens

Shape legend: c circuit, b prompt, p some of the prompts, k item (a prompt at a site), t token, n nodes of a location, s sparse
width, d dense width, j site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed
from bridge.circuits.masked_model import MaskedModel
from bridge.evidence.bootstrap import interval
from bridge.evidence.carry import Transporter
from bridge.evidence.controls import node_values
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.sparse import Gate, Location
from bridge.models.transport import decoded

LEAST_EFFECT = 0.2  # nats; shares of less mean nothing
ROTATIONS, QUANTILE, OTHER_PAIRS = 100, 0.99, 20

Changes = list[Tensor]  # change_bts of the sparse residual at every site


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Another prompt of as many tokens for every prompt, and its dense run with the errors by which the sparse model follows."""

    prompt_bt: Tensor
    followed: Followed


def counterfactual_effect(transporter: Transporter, counterfactual: Counterfactual) -> Tensor:
    """effect_b: how much d of the dense model falls from each prompt to its counterfactual, in nats."""
    row_b = torch.arange(transporter.prompts, device=transporter.loss.model_b.device)
    return transporter.loss.model_b - transporter.masked.question.difference(counterfactual.followed.dense_bv, row_b)


@torch.no_grad()
def patched(transporter: Transporter, counterfactual: Counterfactual, circuit_cf: Tensor) -> list[Changes]:
    """Changes at every site, by circuit, where its nodes take their counterfactual values.

    Raises ValueError where a counterfactual has more or fewer tokens than its prompt.
    """
    masked, question = transporter.masked, transporter.masked.question
    if counterfactual.prompt_bt.shape != question.prompt_bt.shape:
        raise ValueError(
            f"the counterfactual has {counterfactual.prompt_bt.shape[1]} tokens and the prompt {masked.n_tokens}; "
            "patching needs as many, at the same positions"
        )
    asked = replace(question, prompt_bt=counterfactual.prompt_bt)
    errors = None if masked.errors is None else counterfactual.followed.errors
    there = MaskedModel(masked.sparse, asked, masked.means, errors, by_position=masked.space.n_tokens > 1)
    found: list[list[Changes]] = [[] for _ in circuit_cf]
    for row_p in torch.arange(transporter.prompts).split(masked.rows):
        kept_pf = transporter.reference_f.expand(len(row_p), -1)
        own, other = masked.gates(kept_pf, row_p)[1], there.gates(kept_pf, row_p)[1]
        values = node_values(there, transporter.reference_f, row_p)
        run = partial(masked.sparse.run, question.prompt_bt[row_p], last_only=True)
        plain = run(correct=own)
        for into, circuit_f in zip(found, circuit_cf, strict=True):
            parts = masked.space.split(circuit_f)

            def gate(at: Location, x_ptn: Tensor, parts: dict = parts, values: dict = values) -> Tensor:
                return torch.where(parts[at], values[at], x_ptn)

            def correct(at: Location, x_pts: Tensor, parts: dict = parts, own: Gate = own, other: Gate = other) -> Tensor:
                return torch.where(parts[at][-x_pts.shape[1] :], other(at, x_pts), own(at, x_pts)) if at in parts else x_pts

            changed = run(gate=gate, correct=correct)
            into.append([after - before for after, before in zip(changed.residuals, plain.residuals, strict=True)])
    return [[torch.cat(parts) for parts in zip(*rows, strict=True)] for rows in found]


def dense_losses(transporter: Transporter, changes: Sequence[Changes]) -> Tensor:
    """lost_cjb: the dense model's loss of the span by each circuit's change, by the site that it enters at."""
    places = [(each, site, row) for each in changes for site in transporter.sites for row in range(transporter.prompts)]
    row_k, site_k = [row for _, _, row in places], [site for _, site, _ in places]
    lost_k = transporter.dense_lost(row_k, site_k, [each[site][row] for each, site, row in places])
    return lost_k.view(len(changes), -1, transporter.prompts)


@torch.no_grad()
def dense_writes(transporter: Transporter, counterfactual: Counterfactual) -> Tensor:
    """lost_jb by the dense model's own change at every site, the embedding's taken off."""
    residuals = zip(counterfactual.followed.dense.residuals, transporter.dense.residuals, strict=True)
    first_btd, *later = [there_btd - here_btd for there_btd, here_btd in residuals]
    row_b = torch.arange(transporter.prompts)
    lost = [transporter.lost_by(row_b, torch.full_like(row_b, site), x - first_btd) for site, x in enumerate(later, 1)]
    return torch.stack([torch.zeros_like(lost[0]), *lost])


def mean_share(transporter: Transporter, lost_jb: Tensor, effect_b: Tensor) -> float:
    """The share of the counterfactual's effect in the mean over the sites behind the first sublayer."""
    return float(lost_jb[1:].mean(0).sum()) * transporter.loss.span / float(effect_b.sum())


def patching_measures(
    transporter: Transporter, counterfactual: Counterfactual, circuit_f: Tensor, matched_cf: Tensor, least: float, seed: int
) -> tuple[Measure, ...]:
    """The circuit's share of the effect, of that of all nodes, beside matched ones; of several prompts, two controls more.

    It is held to `least`, above every control, and where there are several prompts to three times the matched nodes' mean.
    """
    several, above = transporter.prompts > 1, Criterion(">=", 0.0, True)
    names = ["patching", *(("patching_rotated", "patching_pairs") if several else ())]
    titles = "share of the counterfactual's effect, of all nodes'", "above rotations of the change", "above other pairs' changes"
    effect_b = counterfactual_effect(transporter, counterfactual)
    effect = float(effect_b.mean())

    def unknown(note: str) -> tuple[Measure, ...]:
        criteria = (Criterion(">=", least, True), above, above)
        return tuple(Measure(*row, note=note) for row in zip(names, titles, [None] * 3, criteria, strict=False))

    if abs(effect) < LEAST_EFFECT:
        return unknown(f"the counterfactual changes the dense model's d by {effect:.2f} nats only")
    changes = patched(transporter, counterfactual, torch.cat([circuit_f[None], torch.ones_like(circuit_f)[None], matched_cf]))
    lost_cjb, dense_jb = dense_losses(transporter, changes), dense_writes(transporter, counterfactual)
    share, every, *matched = (mean_share(transporter, lost_jb, effect_b) for lost_jb in lost_cjb)
    if every <= 0:
        return unknown("all nodes together have none of the effect")
    value, kinds = share / every, transporter.coupling.dense.readers
    shares = torch.stack([lost_cjb[0], lost_cjb[1], dense_jb]).mean(2) * transporter.loss.span / effect
    points = tuple(
        Point(f"site {site} ({kinds[site]})", dict(zip(("circuit", "all nodes", "dense"), shares[:, site].tolist(), strict=True)))
        for site in transporter.sites
    )
    own_b, every_b = (lost_cjb[c, 1:].mean(0).double().cpu().numpy() for c in (0, 1))
    bounds = interval(lambda pick_kb: own_b[pick_kb].sum(1) / every_b[pick_kb].sum(1), len(own_b), seed)
    note = (
        f"{share:.2f} of the effect of {effect:.1f} nats, all nodes {every:.2f}, dense itself {float(shares[2, 1:].mean()):.2f}"
    )
    criterion = Criterion(">=", least, True, value / 3 if several and matched else None)
    control = Control.of("matched", [other / every for other in matched], max, "largest")
    measures = [Measure(names[0], titles[0], value, criterion, control, bounds, note=note, points=points)]
    if several:
        generator = torch.Generator().manual_seed(seed + 2_000_003)
        rotated = [each / every for each in rotations(transporter, changes[0], effect_b, generator)]
        bar = Control.of("rotated", rotated, lambda draws: float(np.quantile(draws, QUANTILE)), f"{QUANTILE:.0%}")
        others = [each / every for each in other_pairs(transporter, changes[0], effect_b, generator)]
        of_others, none = Control.of("other pairs", others, max, "largest"), "" if others else "no two pairs are equally long"
        measures.append(Measure(names[1], titles[1], value, above, bar))
        measures.append(Measure(names[2], titles[2], value, above, of_others, note=none))
    return tuple(measures)


def _items(transporter: Transporter, draw: int) -> tuple[Tensor, Tensor]:
    """row_k and site_k for one draw of a control: every prompt at one site, at another in each draw; of few, at every site."""
    prompts, sites = transporter.prompts, len(transporter.sites) - 1
    if prompts < sites:
        return torch.arange(prompts).repeat_interleave(sites), torch.arange(sites).repeat(prompts) + 1
    return torch.arange(prompts), (torch.arange(prompts) + draw) % sites + 1


def _share_of(transporter: Transporter, effect_b: Tensor, row_k: Tensor, site_k: Tensor, change_ktd: Tensor) -> float:
    lost = transporter.lost_by(row_k, site_k, change_ktd).sum()
    return float(lost) * transporter.loss.span / float(effect_b[row_k].sum())


def _decoded(transporter: Transporter, changes: Changes, row_k: Tensor, site_k: Tensor) -> Tensor:
    """change_ktd of the dense residual of items."""
    rows = zip(row_k.tolist(), site_k.tolist(), strict=True)
    return decoded(transporter.coupling, site_k, torch.stack([changes[site][row] for row, site in rows]))


def rotations(
    transporter: Transporter, changes: Changes, effect_b: Tensor, generator: torch.Generator, draws: int = ROTATIONS
) -> list[float]:
    """The share of the effect that the change has when it is rotated, a rotation for every draw."""

    def rotated_share(draw: int) -> float:
        row_k, site_k = _items(transporter, draw)
        change_ktd = _decoded(transporter, changes, row_k, site_k)
        frame, triangle = torch.linalg.qr(torch.randn(*[change_ktd.shape[-1]] * 2, generator=generator))
        rotation_dd = (frame * triangle.diagonal().sign()).to(change_ktd)  # uniform: without the signs QR prefers some
        return _share_of(transporter, effect_b, row_k, site_k, change_ktd @ rotation_dd)

    return [rotated_share(draw) for draw in range(draws)]


def other_pairs(
    transporter: Transporter, changes: Changes, effect_b: Tensor, generator: torch.Generator, draws: int = OTHER_PAIRS
) -> list[float]:
    """The share of the changes of other prompts of the same length, dealt out at random; none where no two are as long."""
    found, last_b = [], transporter.masked.question.last_b.cpu()
    for draw in range(draws):
        row_k, site_k = _items(transporter, draw)
        given_b = torch.full_like(last_b, -1)
        for last in last_b.unique():
            here_k = (last_b == last).nonzero().flatten()
            if len(here_k) > 1:  # in a circle, so that none gets its own
                here_k = here_k[torch.randperm(len(here_k), generator=generator)]
                given_b[here_k] = here_k.roll(1)
        dealt_k = given_b[row_k] >= 0
        if bool(dealt_k.any()):
            row_k, site_k = row_k[dealt_k], site_k[dealt_k]
            found.append(_share_of(transporter, effect_b, row_k, site_k, _decoded(transporter, changes, given_b[row_k], site_k)))
    return found
