"""95% bootstrap intervals of a statistic of independent measurements, which are resampled with replacement.

Shape legend: b measurement, s source that measurements come from, k draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

BOOTSTRAPS = 2000

Interval = tuple[float, float]


def bootstrap_interval(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> Interval | None:
    """Return the 95% interval of statistic(pick_kb) -> value_k over draws of `count` measurements; None if they are too few."""
    if count < 2:
        return None
    pick_kb = np.random.default_rng(seed).integers(count, size=(BOOTSTRAPS, count))
    with np.errstate(invalid="ignore", divide="ignore"):
        values_k = statistic(pick_kb)
    values_k = values_k[np.isfinite(values_k)]
    if len(values_k) < BOOTSTRAPS / 2:
        return None
    low, high = np.quantile(values_k, [0.025, 0.975])
    return float(low), float(high)


class ClusterBootstrap:
    """Bootstrap draws over the sources of measurements: all measurements of one source are drawn together."""

    def __init__(self, source_b: np.ndarray | Sequence[str], seed: int) -> None:
        """Take the name of the source of each measurement."""
        found, self.source_b = np.unique(np.asarray(source_b), return_inverse=True)
        self.sources, self.seed = len(found), seed

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
        """Return the 95% interval of statistic(weight_kb) -> value_k; weight_kb counts how often a measurement was drawn."""

        def of_picks(pick_ks: np.ndarray) -> np.ndarray:
            drawn_ks = np.stack([np.bincount(pick_s, minlength=self.sources) for pick_s in pick_ks])
            return statistic(drawn_ks[:, self.source_b].astype(float))

        return bootstrap_interval(of_picks, self.sources, self.seed)
