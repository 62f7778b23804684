"""Interchange interventions (counterfactual patching) on a circuit's nodes, transported into the dense model.

R is the reference run on a prompt, R_c the reference run on a counterfactual with as many tokens. Both keep every node, and
errors are at their means, except the circuit's errors. The sparse model is run on the prompt with

    a_i  <-  a_i(R_c)  for i in the circuit        (its errors as well)

and every other node computes from its changed inputs. The change of the residual at each site is transported into the dense
model. The share is the loss of d there, divided by the counterfactual's effect, d(dense on the prompt) - d(dense on the
counterfactual). The loss is the mean over all sites after the first sublayer, so no site is chosen. With several prompts (a
task's pairs), loss and effect are sums over the prompts. The share is compared with

    all nodes     all nodes patched, the ceiling (the embedding is no node, and stays the prompt's)
    dense         at each site, the dense model's own writes, h_j(c) - h_j(p) - (h_0(c) - h_0(p))
    matched       nodes matched in location and position

and, if there are several prompts, with two controls that take each prompt at one site per draw (at every site if there are few):

    rotated       the circuit's change in the dense model after a random rotation, the same at every position of every prompt,
                  so that the change stays as large, and as coherent over prompts
    other pairs   the change of another prompt with as many tokens

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
from bridge.evidence.bootstrap import bootstrap_interval
from bridge.evidence.carry import Transporter
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.sparse import Gate, Location
from bridge.models.transport import decode_changes

LEAST_EFFECT = 0.2  # nats; shares of a smaller effect mean nothing
ROTATIONS, QUANTILE, OTHER_PAIRS = 100, 0.99, 20

Changes = list[Tensor]  # change_bts of the sparse residual at every site


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """For each prompt another one with as many tokens, its dense run, and the errors that make the sparse model follow it."""

    prompt_bt: Tensor
    followed: Followed


def counterfactual_effect(transporter: Transporter, counterfactual: Counterfactual) -> Tensor:
    """Return effect_b, the fall of the dense model's d in nats from each prompt to its counterfactual."""
    row_b = torch.arange(transporter.prompts, device=transporter.loss.model_b.device)
    return transporter.loss.model_b - transporter.masked.question.difference(counterfactual.followed.dense_bv, row_b)


@torch.no_grad()
def patch_circuits(transporter: Transporter, counterfactual: Counterfactual, circuit_cf: Tensor) -> list[Changes]:
    """Return, for each circuit, the changes at every site when its nodes take their counterfactual values.

    Raises ValueError if the counterfactuals do not have as many tokens as the prompts.
    """
    masked, question = transporter.masked, transporter.masked.question
    if counterfactual.prompt_bt.shape != question.prompt_bt.shape:
        raise ValueError(
            f"the counterfactual has {counterfactual.prompt_bt.shape[1]} tokens and the prompt {masked.n_tokens}; "
            "give a counterfactual of the same length, because equal positions are patched"
        )
    counterfactual_question = replace(question, prompt_bt=counterfactual.prompt_bt)
    errors = None if masked.errors is None else counterfactual.followed.errors
    counterfactual_masked = MaskedModel(
        masked.sparse, counterfactual_question, masked.means, errors, by_position=masked.space.n_tokens > 1
    )
    found: list[list[Changes]] = [[] for _ in circuit_cf]
    for row_p in torch.arange(transporter.prompts).split(masked.rows_per_batch):
        kept_pf = transporter.reference_f.expand(len(row_p), -1)
        own, other = masked.gates(kept_pf, row_p)[1], counterfactual_masked.gates(kept_pf, row_p)[1]
        values = counterfactual_masked.node_values(transporter.reference_f, row_p)
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
    """Return lost_cjb, the share of the span that the dense model loses by each circuit's change, for each site it enters at."""
    places = [(each, site, row) for each in changes for site in transporter.sites for row in range(transporter.prompts)]
    row_k, site_k = [row for _, _, row in places], [site for _, site, _ in places]
    lost_k = transporter.dense_lost(row_k, site_k, [each[site][row] for each, site, row in places])
    return lost_k.view(len(changes), -1, transporter.prompts)


@torch.no_grad()
def dense_writes(transporter: Transporter, counterfactual: Counterfactual) -> Tensor:
    """Return lost_jb by the dense model's own change at each site, less the change of its embedding."""
    residuals = zip(counterfactual.followed.dense.residuals, transporter.dense.residuals, strict=True)
    first_btd, *later = [there_btd - here_btd for there_btd, here_btd in residuals]
    row_b = torch.arange(transporter.prompts)
    lost = [transporter.lost_by(row_b, torch.full_like(row_b, site), x - first_btd) for site, x in enumerate(later, 1)]
    return torch.stack([torch.zeros_like(lost[0]), *lost])


def mean_share(transporter: Transporter, lost_jb: Tensor, effect_b: Tensor) -> float:
    """Return the share of the counterfactual's effect, the mean over the sites after the first sublayer."""
    return float(lost_jb[1:].mean(0).sum()) * transporter.loss.span / float(effect_b.sum())


def patching_measures(
    transporter: Transporter, counterfactual: Counterfactual, circuit_f: Tensor, matched_cf: Tensor, least: float, seed: int
) -> tuple[Measure, ...]:
    """Return the circuit's share of the effect over all nodes' share, once for each control: matched; for several prompts, all.

    It must be above each control, at least `least`, and with several prompts at least three times the matched nodes' mean.
    """
    several, above = transporter.prompts > 1, Criterion(">=", 0.0, True)
    names = ["patching", *(("patching_rotated", "patching_pairs") if several else ())]
    titles = (
        "share of the counterfactual's effect over all nodes'",
        "patching share against rotated changes",
        "patching share against other pairs' changes",
    )
    effect_b = counterfactual_effect(transporter, counterfactual)
    effect = float(effect_b.mean())

    def unknown(note: str) -> tuple[Measure, ...]:
        criteria = (Criterion(">=", least, True), above, above)
        return tuple(Measure(*row, note=note) for row in zip(names, titles, [None] * 3, criteria, strict=False))

    if abs(effect) < LEAST_EFFECT:
        return unknown(f"the counterfactual changes the dense model's d by only {effect:.2f} nats")
    changes = patch_circuits(
        transporter, counterfactual, torch.cat([circuit_f[None], torch.ones_like(circuit_f)[None], matched_cf])
    )
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
    bounds = bootstrap_interval(lambda pick_kb: own_b[pick_kb].sum(1) / every_b[pick_kb].sum(1), len(own_b), seed)
    dense_share = float(shares[2, 1:].mean())
    note = (
        f"{share:.2f} of the effect of {effect:.1f} nats; all nodes {every:.2f}, the dense model's own change {dense_share:.2f}"
    )
    criterion = Criterion(">=", least, True, value / 3 if several and matched else None)
    control = Control.of("matched", [other / every for other in matched], max, "largest")
    measures = [Measure(names[0], titles[0], value, criterion, control, bounds, note=note, points=points)]
    if several:
        generator = torch.Generator().manual_seed(seed + 2_000_003)
        rotated = [each / every for each in rotated_shares(transporter, changes[0], effect_b, generator)]
        bar = Control.of("rotated", rotated, lambda draws: float(np.quantile(draws, QUANTILE)), f"{QUANTILE:.0%}")
        others = [each / every for each in other_pair_shares(transporter, changes[0], effect_b, generator)]
        of_others, none = Control.of("other pairs", others, max, "largest"), "" if others else "no two pairs are equally long"
        measures.append(Measure(names[1], titles[1], value, above, bar))
        measures.append(Measure(names[2], titles[2], value, above, of_others, note=none))
    return tuple(measures)


def _draw_items(transporter: Transporter, draw: int) -> tuple[Tensor, Tensor]:
    """Return row_k, site_k of one draw: each prompt at one site, another in each draw, or if prompts are few, at every site."""
    prompts, sites = transporter.prompts, len(transporter.sites) - 1
    if prompts < sites:
        return torch.arange(prompts).repeat_interleave(sites), torch.arange(sites).repeat(prompts) + 1
    return torch.arange(prompts), (torch.arange(prompts) + draw) % sites + 1


def _share_of(transporter: Transporter, effect_b: Tensor, row_k: Tensor, site_k: Tensor, change_ktd: Tensor) -> float:
    lost = transporter.lost_by(row_k, site_k, change_ktd).sum()
    return float(lost) * transporter.loss.span / float(effect_b[row_k].sum())


def _decoded(transporter: Transporter, changes: Changes, row_k: Tensor, site_k: Tensor) -> Tensor:
    """Return change_ktd of the dense residual for each item."""
    rows = zip(row_k.tolist(), site_k.tolist(), strict=True)
    return decode_changes(transporter.coupling, site_k, torch.stack([changes[site][row] for row, site in rows]))


def rotated_shares(
    transporter: Transporter, changes: Changes, effect_b: Tensor, generator: torch.Generator, draws: int = ROTATIONS
) -> list[float]:
    """Return the share of the effect that the rotated change has, for each draw of a random rotation."""

    def rotated_share(draw: int) -> float:
        row_k, site_k = _draw_items(transporter, draw)
        change_ktd = _decoded(transporter, changes, row_k, site_k)
        frame, triangle = torch.linalg.qr(torch.randn(*[change_ktd.shape[-1]] * 2, generator=generator))
        rotation_dd = (frame * triangle.diagonal().sign()).to(change_ktd)  # uniform; without the signs QR prefers some
        return _share_of(transporter, effect_b, row_k, site_k, change_ktd @ rotation_dd)

    return [rotated_share(draw) for draw in range(draws)]


def other_pair_shares(
    transporter: Transporter, changes: Changes, effect_b: Tensor, generator: torch.Generator, draws: int = OTHER_PAIRS
) -> list[float]:
    """Return the share of other prompts' changes, dealt at random among equally long prompts; [] if no two are equally long."""
    found, last_b = [], transporter.masked.question.last_b.cpu()
    for draw in range(draws):
        row_k, site_k = _draw_items(transporter, draw)
        donor_b = torch.full_like(last_b, -1)
        for last in last_b.unique():
            same_length_k = (last_b == last).nonzero().flatten()
            if len(same_length_k) > 1:  # rolled by one, so no prompt gets its own change
                same_length_k = same_length_k[torch.randperm(len(same_length_k), generator=generator)]
                donor_b[same_length_k] = same_length_k.roll(1)
        dealt_k = donor_b[row_k] >= 0
        if bool(dealt_k.any()):
            row_k, site_k = row_k[dealt_k], site_k[dealt_k]
            found.append(_share_of(transporter, effect_b, row_k, site_k, _decoded(transporter, changes, donor_b[row_k], site_k)))
    return found
