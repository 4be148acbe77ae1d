"""The bootstrap interval against the normal approximation it must approach."""

from __future__ import annotations

import numpy as np
import pytest

from eval.statistics import (
    bootstrap_class_mean,
    bootstrap_interval,
    bootstrap_means,
    paired_class_difference,
    paired_difference,
)


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


def test_pairing_sees_what_intervals_of_their_own_do_not() -> None:
    """One model is right wherever the other is, and on a few queries more."""
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.5
    second = first | (rng.random(400) < 0.04)
    own = bootstrap_means(np.stack([first, second], axis=1).astype(np.float64))
    assert own[0, 1] > own[1, 0]  # they overlap
    value, low, high = paired_difference(first, second)
    assert value == pytest.approx(second.mean() - first.mean())
    assert 0 < low < value < high
    # The interval of a share of n independent queries, as the difference is 0 or 1.
    half = 1.96 * (value * (1 - value) / 400) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert paired_difference(first, first) == (0, 0, 0)
    with pytest.raises(ValueError, match="same queries"):
        paired_difference(first, second[1:])


def test_means_over_classes_weigh_rare_classes() -> None:
    labels = np.repeat([0, 2], [300, 20])  # class 1 does not occur
    first = np.ones(320)
    second = np.where(labels == 2, np.arange(320) % 2, 1)
    value, low, high = paired_class_difference(first, second, labels)
    assert value == -0.25
    assert low < value < high < 0
    alone = bootstrap_class_mean(second.astype(bool), labels)
    assert (alone[0] - 1, alone[1] - 1) == pytest.approx((low, high))
    half = 1.96 * (0.25 / 20) ** 0.5 / 2
    assert (high - low) / 2 == pytest.approx(half, rel=0.2)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="non-empty vector"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="non-empty vector"):
        bootstrap_interval(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="samples"):
        bootstrap_interval([1.0], samples=0)
