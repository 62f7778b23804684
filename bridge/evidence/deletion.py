"""Deletion of a circuit, transported into the dense model at every site, compared with controls that could win.

R is the reference run (every node kept, errors at their means except the circuit's), C is a circuit, and all losses are shares of
the span:

    sparse loss        d(R) - d(R less C), in the sparse model itself
    at site j          the change of the residual at j enters the dense model (dense), and enters the sparse model, with all of R
                       kept from there on (sparse); see `transport`
    ratio              minimum of dense / sparse over the sites *behind the circuit's nodes*. These are the sites where the change
                       causes at least a given share (a third by default) of the sparse loss. At earlier sites, before most of the
                       circuit, almost nothing has changed, and a ratio of two such losses means nothing
    best               largest dense loss over all sites

The deletion in an uncoupled sparse model can cost the dense model much at late sites, where the answer can be decoded from
anything, but not at early and middle sites. Therefore the minimum of the ratio is judged.

Controls: deletion of every node, which is the ceiling of what the bridges can transport; deletion of nodes matched in location
and position; deletion of other prompts' circuits. With several prompts (a task), shares are means over the prompts, and intervals
are bootstraps over the prompts.

Shape legend: c circuit, j site, b prompt, k draw, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from bridge.evidence.bootstrap import Interval, bootstrap_interval
from bridge.evidence.carry import Transporter
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.bridges import CoupledModels


@dataclass(frozen=True, eq=False)
class Deletion:
    """Shares of the span lost by deleting one circuit, for each prompt: in the sparse model, and at every site in both models."""

    lost_b: np.ndarray
    dense_jb: np.ndarray
    sparse_jb: np.ndarray

    @property
    def lost(self) -> float:
        """Loss of the sparse model itself, the mean over the prompts."""
        return float(self.lost_b.mean())

    @property
    def dense_j(self) -> tuple[float, ...]:
        """Loss of the dense model by the change transported at each site."""
        return tuple(self.dense_jb.mean(1).tolist())

    @property
    def sparse_j(self) -> tuple[float, ...]:
        """Loss of the sparse model by the change at each site."""
        return tuple(self.sparse_jb.mean(1).tolist())

    def sites_after_circuit(self, share: float) -> tuple[int, ...]:
        """Return the sites behind the circuit's nodes: those where the change causes at least `share` of the sparse loss."""
        return tuple(site for site, lost in enumerate(self.sparse_j) if self.lost > 0 and lost >= share * self.lost)

    def ratio(self, share: float) -> float | None:
        """Return the minimum of dense over sparse loss over the sites of `behind`; None if there are none."""
        return min((self.dense_j[site] / self.sparse_j[site] for site in self.sites_after_circuit(share)), default=None)

    def ratio_interval(self, share: float, seed: int) -> Interval | None:
        """Return the 95% bootstrap interval of `ratio` over the prompts, at the same sites; None for a single prompt."""
        if not (behind := list(self.sites_after_circuit(share))):
            return None

        def least(pick_kb: np.ndarray) -> np.ndarray:
            dense_jk, sparse_jk = (lost_jb[behind][:, pick_kb].mean(2) for lost_jb in (self.dense_jb, self.sparse_jb))
            return (dense_jk / sparse_jk).min(0)

        return bootstrap_interval(least, len(self.lost_b), seed)

    @property
    def best(self) -> float:
        """Largest dense loss over the sites."""
        return max(self.dense_j)


def delete_circuits(transporter: Transporter, circuit_cf: Tensor) -> tuple[Deletion, ...]:
    """Delete each circuit and measure the losses."""
    sites = [transporter.sites] * len(circuit_cf)
    models = transporter.dense_lost, transporter.sparse_lost
    lost_cb, lost_2cjb = transporter.transport(transporter.reference_f & ~circuit_cf, sites, models)
    parts = (x.double().cpu().numpy() for x in (lost_cb, *lost_2cjb))
    return tuple(Deletion(lost_b, dense_jb, sparse_jb) for lost_b, dense_jb, sparse_jb in zip(*parts, strict=True))


@dataclass(frozen=True)
class GroupLoss:
    """Loss of d in nats by deleting a group: in the sparse model with all its nodes and, transported, in the dense model."""

    sparse: float
    dense: float


def delete_groups(transporter: Transporter, groups: Sequence[Tensor]) -> tuple[GroupLoss, ...]:
    """Return the losses by deleting each group; the change is transported at the site after the group's last node."""
    if not groups:
        return ()
    last = transporter.coupling.n_sites - 1
    sets = [group_f.nonzero().flatten() for group_f in groups]
    site_g = [min(int(transporter.masked.site_f[node_n.cpu()].max()) + 1, last) if len(node_n) else last for node_n in sets]
    nats_2g = transporter.transport_deleted(sets, site_g).mean(2) * transporter.loss.span
    return tuple(GroupLoss(*pair) for pair in nats_2g.T.tolist())


@dataclass(frozen=True, eq=False)
class Deletions:
    """The deletions of a circuit, of every node, of matched nodes, and of other prompts' circuits."""

    circuit: Deletion
    every: Deletion
    matched: tuple[Deletion, ...]
    others: tuple[Deletion, ...] = ()

    @staticmethod
    def of(transporter: Transporter, circuit_f: Tensor, matched_cf: Tensor, other_cf: Tensor | None = None) -> Deletions:
        """Measure the deletions of these masks, and of all nodes."""
        other_cf = matched_cf[:0] if other_cf is None else other_cf
        circuit, every, *rest = delete_circuits(
            transporter, torch.cat([circuit_f[None], transporter.reference_f[None], matched_cf, other_cf])
        )
        return Deletions(circuit, every, tuple(rest[: len(matched_cf)]), tuple(rest[len(matched_cf) :]))

    def measures(
        self, coupling: CoupledModels, behind: float, ratio: float, best: float, matched_lost: float, seed: int
    ) -> tuple[Measure, ...]:
        """Return the measures that compare dense with sparse losses, and the circuit with its controls, with the given bounds."""
        sites, kinds = self.circuit.sites_after_circuit(behind), coupling.dense.readers
        points = tuple(
            Point(f"site {site} ({kinds[site]})", {
                "dense": self.circuit.dense_j[site], "sparse": self.circuit.sparse_j[site], "behind": float(site in sites),
                "all nodes": self.every.dense_j[site],
                **{name: sum(one.dense_j[site] for one in those) / len(those)
                   for name, those in (("matched", self.matched), ("other prompts", self.others)) if those},
            })
            for site in range(coupling.n_sites)
        )  # fmt: skip
        others = Control.of("other prompts' circuits", [one.best for one in self.others], max, "largest")
        of_matched = [sum(one.dense_j[site] for site in sites) / len(sites) for one in self.matched] if sites else []
        return (
            Measure(
                "dense_ratio", "dense over sparse loss by deletion, least", self.circuit.ratio(behind),
                Criterion(">=", ratio), interval=self.circuit.ratio_interval(behind, seed), ceiling=self.every.ratio(behind),
                note="" if sites else "deleting the circuit loses nothing in the sparse model",
                points=points,
            ),
            Measure(
                "dense_best", "span lost in dense by deletion, best site", self.circuit.best, Criterion(">=", best), others,
                ceiling=self.every.best,
            ),
            Measure(
                "dense_matched", "span lost in dense by deleting matched nodes", median(of_matched) if of_matched else None,
                Criterion("<=", matched_lost), note="median over the draws, each the mean over the sites after the circuit",
            ),
        )  # fmt: skip

    def lost(self, value: float, least: float, note: str = "") -> Measure:
        """Return the share of the span that the sparse model loses without the circuit, with matched nodes as the control."""
        control = Control.of("matched", [one.lost for one in self.matched], max, "largest")
        return Measure("lost", "span lost in sparse by deletion", value, Criterion(">=", least, True), control, note=note)
