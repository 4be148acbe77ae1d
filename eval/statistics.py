"""How far a measured figure would move on another sample, and what chance alone would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], float] = _mean,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic of per-query values.

    Args:
        values: (Q,) one value per query, such as `ranks < 1` for top-1 accuracy.
        statistic: Maps a resampled (Q,) float64 array to a number.
        samples: Resamples drawn with replacement.
        seed: Of the draws; the same values and seed give the same interval.

    Returns:
        The 2.5 % and 97.5 % quantiles of the resampled statistic.

    Raises:
        ValueError: `values` is not a non-empty vector, or `samples` is below 1.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"values must be a non-empty vector, got shape {data.shape}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    rng = np.random.default_rng(seed)
    # One resample at a time: memory stays at Q instead of samples * Q.
    draws = [statistic(data[rng.integers(data.size, size=data.size)]) for _ in range(samples)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def chance_recall(answers: Sequence[int], pool: int, k: int) -> float:
    """Recall at k of a random ranking, averaged over queries.

    Args:
        answers: right answers of each query, at least one and at most `pool`.
        pool: entries that are ranked.
        k: how many of the first entries count; at most `pool`.

    Returns:
        The mean of 1 - C(pool - a, k) / C(pool, k) over the queries' a.

    Raises:
        ValueError: a number out of range.
    """
    if not 1 <= k <= pool:
        raise ValueError(f"k={k}: must be between 1 and the pool of {pool}")
    if not answers or min(answers) < 1 or max(answers) > pool:
        raise ValueError(f"every query needs 1 to {pool} right answers")
    misses = [math.comb(pool - a, k) / math.comb(pool, k) for a in answers]
    return 1 - sum(misses) / len(misses)


def bootstrap_means(
    columns: NDArray[np.float64], samples: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """95 % percentile bootstrap intervals of the means of several values of the same queries.

    Args:
        columns: (Q, K), K values of each query.
        samples: Resamples; all K means of one share its draws.
        seed: Of the draws.

    Returns:
        (K, 2) lower and upper bounds.

    Raises:
        ValueError: no queries.
    """
    return np.quantile(_resampled_means(columns, samples, seed), (0.025, 0.975), axis=0).T


def paired_difference(
    first: ArrayLike, second: ArrayLike, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of two means over the same queries, with its 95 % bootstrap interval.

    Both are resampled together, so what makes a query hard for both does not widen the interval.

    Args:
        first: (Q,) values of the queries.
        second: (Q,) values of the same queries in the same order.
        samples: resamples of the queries.
        seed: of the resampling.

    Returns:
        mean(second) - mean(first), and the bounds of its interval; it is significant at 5 % if the
        interval leaves out 0.

    Raises:
        ValueError: lengths that differ, or no queries.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must be of the same queries, got {a.shape} and {b.shape}")
    difference = (b - a)[:, None]
    low, high = bootstrap_means(difference, samples, seed)[0]
    return float(difference.mean()), float(low), float(high)


def _resampled_means(columns: NDArray[np.float64], samples: int, seed: int) -> NDArray[np.float64]:
    if columns.ndim != 2 or not len(columns):
        raise ValueError(f"values must be a non-empty (queries, columns), got {columns.shape}")
    rng, size = np.random.default_rng(seed), len(columns)
    means = np.empty((samples, columns.shape[1]))
    for number in range(samples):
        # How often each query was drawn: one product in place of a copy for every column.
        counts = np.bincount(rng.integers(size, size=size), minlength=size)
        means[number] = counts @ columns / size
    return means


def bootstrap_class_mean(
    hits: NDArray[np.bool_], labels: NDArray[np.int64], samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over classes of the share of `hits` in each.

    Args:
        hits: (N,) bool.
        labels: (N,) int64, not negative; classes that a resample lacks do not count in it.
    """
    means = _resampled_class_means(hits[:, None], labels, samples, seed)[:, 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_class_difference(
    first: ArrayLike, second: ArrayLike, labels: ArrayLike, samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """As `paired_difference`, of means over classes of the share of hits in each.

    Args:
        first: (N,) hits, 0 or 1.
        second: (N,) hits of the same samples.
        labels: (N,) their classes.
        samples: times that every class is drawn anew.
        seed: of the draws.

    Raises:
        ValueError: lengths that differ.
    """
    a, b, truth = np.asarray(first), np.asarray(second), np.asarray(labels, np.int64)
    if not a.shape == b.shape == truth.shape:
        raise ValueError(f"paired values must be of the same samples, got {a.shape} and {b.shape}")
    hits = np.stack([a, b], axis=1)
    means = _resampled_class_means(hits, truth, samples, seed)
    low, high = np.quantile(means[:, 1] - means[:, 0], (0.025, 0.975))
    one, two = _class_means(hits, truth)
    return float(two - one), float(low), float(high)


def _resampled_class_means(
    hits: NDArray[Any], labels: NDArray[np.int64], samples: int, seed: int
) -> NDArray[np.float64]:
    """(samples, K) means over classes of hits (N, K)."""
    rng, size = np.random.default_rng(seed), len(hits)
    means = np.empty((samples, hits.shape[1]))
    for number in range(samples):
        rows = rng.integers(size, size=size)
        means[number] = _class_means(hits[rows], labels[rows])
    return means


def _class_means(hits: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,) means over the classes that occur of the share of hits (N, K) in each."""
    total = np.bincount(labels)
    present = total > 0
    right = [np.bincount(labels, weights=column, minlength=len(total)) for column in hits.T]
    return np.stack([(own[present] / total[present]).mean() for own in right])
