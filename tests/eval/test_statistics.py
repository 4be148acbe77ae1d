"""The bootstrap interval against the normal approximation it must approach."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics import bootstrap_interval


def test_interval_of_a_share_is_near_the_normal_one() -> None:
    hits = np.arange(1000) % 10 < 3
    low, high = bootstrap_interval(hits)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)


def test_seed_and_statistic_are_honoured() -> None:
    values = np.random.default_rng(0).exponential(size=50)
    first = bootstrap_interval(values, samples=200)
    assert first == bootstrap_interval(values, samples=200)
    assert first != bootstrap_interval(values, samples=200, seed=1)
    low, high = bootstrap_interval(values, lambda v: float(np.median(v)), samples=200)
    assert low < np.median(values) < high < values.mean() + 0.2
    assert bootstrap_interval(np.ones(5), samples=10) == (1.0, 1.0)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="non-empty vector"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="non-empty vector"):
        bootstrap_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="samples"):
        bootstrap_interval([1.0], samples=0)
