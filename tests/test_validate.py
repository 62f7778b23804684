"""Measures and the statistics that they share: ranks, ties, nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from bridge.evidence.effects import permuted_null, rank_correlation
from bridge.validate import Measure


def test_rank_correlation_is_spearmans_with_ties_and_rows():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (4, 30)).astype(float), generator.normal(size=(4, 30))
    for row in range(4):
        assert rank_correlation(x, y)[row] == pytest.approx(scipy.stats.spearmanr(x[row], y[row])[0])  # pyright: ignore[reportArgumentType]
    assert math.isnan(rank_correlation(np.zeros(5), np.arange(5.0)))


def test_the_null_of_unrelated_effects_is_centred_on_0_and_keeps_what_sites_explain():
    generator = np.random.default_rng(1)
    site_p = np.repeat(np.arange(4), 25)
    x_p, y_p = generator.normal(size=100), generator.normal(size=100)
    null = permuted_null(x_p, y_p, site_p, generator)
    assert abs(null.mean()) < 0.06
    assert null.std() == pytest.approx(1 / math.sqrt(99), rel=0.15)
    # effects that grow with the site alone correlate, and so does their null
    x_p, y_p = x_p * 0.1 + site_p, y_p * 0.1 + site_p
    null = permuted_null(x_p, y_p, site_p, generator)
    assert null.mean() > 0.8
    assert rank_correlation(x_p, y_p) == pytest.approx(null.mean(), abs=0.05)


def test_a_measure_without_its_control_cannot_pass():
    for passed in (True, False):
        with pytest.raises(ValueError, match="cannot be judged without a value and its control"):
            Measure("KL", 0.01, None, "<= 0.1", passed)
