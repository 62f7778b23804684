"""A prompt's circuit deleted, and the deletion carried into the dense model at every site, beside controls that could win.

With R the reference (every node, errors at their means but the circuit's), C a circuit, and shares of the span throughout:

    sparse loss        d(R) - d(R less C): what the sparse model itself loses
    at site j          `carry`: the change of the residual there, carried into the dense model (dense) and into the sparse one,
                       all of R kept from there on (sparse)
    ratio              dense / sparse at j, at its least over the sites *behind the circuit's nodes*: those at which the same
                       change carries at least a third of the sparse model's own loss. Before most of the circuit there is
                       nothing to carry, and what is divided by next to nothing says nothing
    best               the dense loss at the site where it is largest

An uncoupled sparse model can lose much in the dense one at late sites, where the answer is decoded from anything; at the early
and middle ones it does not. So the ratio is judged at its least.

Beside it: every node deleted, the ceiling of what the bridges can carry; nodes matched in location and position; the circuits of
other prompts.

Shape legend: c circuit, j site, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bridge.evidence.carry import Carrier


@dataclass(frozen=True, eq=False)
class Deletion:
    """Shares of the span that are lost by one circuit's deletion: in the sparse model itself, and at every site in both."""

    lost: float
    dense_j: tuple[float, ...]
    sparse_j: tuple[float, ...]

    def behind(self, share: float) -> tuple[int, ...]:
        """The sites behind the circuit's nodes: those where the change carries a share of the sparse model's own loss."""
        return tuple(site for site, lost in enumerate(self.sparse_j) if self.lost > 0 and lost >= share * self.lost)

    def ratio(self, share: float) -> float | None:
        """Dense over sparse loss at its least over those sites; None where there are none."""
        return min((self.dense_j[site] / self.sparse_j[site] for site in self.behind(share)), default=None)

    @property
    def best(self) -> float:
        """The dense loss at the site where it is largest."""
        return max(self.dense_j)


def delete(carrier: Carrier, circuit_cf: Tensor) -> tuple[Deletion, ...]:
    """The deletion of some circuits."""
    changes, lost_c = carrier.runs(carrier.deleted(circuit_cf))
    count, sites = len(circuit_cf), list(carrier.sites)
    site_k = [site for _ in range(count) for site in sites]
    change_k = [changes[site][circuit] for circuit in range(count) for site in sites]
    dense_cj = carrier.dense_lost(site_k, change_k).view(count, len(sites)).tolist()
    sparse_cj = carrier.sparse_lost(site_k, change_k).view(count, len(sites)).tolist()
    rows = zip(lost_c.tolist(), dense_cj, sparse_cj, strict=True)
    return tuple(Deletion(lost, tuple(dense_j), tuple(sparse_j)) for lost, dense_j, sparse_j in rows)


def delete_groups(carrier: Carrier, groups: Sequence[Tensor]) -> tuple[float, ...]:
    """What the dense model loses, in nats, by each group's deletion carried at the site behind the last of its nodes."""
    if not groups:
        return ()
    last = carrier.coupling.n_sites - 1
    sets = [group_f.nonzero().flatten() for group_f in groups]
    site_g = [min(int(carrier.masked.site_f[set_n.cpu()].max()) + 1, last) if len(set_n) else last for set_n in sets]
    changes, _ = carrier.without(sets, site_g)
    return tuple((carrier.dense_lost(site_g, changes) * carrier.loss.span).tolist())
