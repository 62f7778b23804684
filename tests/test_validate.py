"""Measures of tasks' circuits."""

from __future__ import annotations

import pytest

from bridge.validate import Measure


def test_a_measure_without_its_control_cannot_pass():
    for passed in (True, False):
        with pytest.raises(ValueError, match="cannot be judged without a value and its control"):
            Measure("KL", 0.01, None, "<= 0.1", passed)
