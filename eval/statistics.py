"""How far a measured figure would move on another sample, and what chance alone would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
