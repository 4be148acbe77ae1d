"""What an evaluation gives: figures with intervals, the outcome of every sample, and details."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.statistics import bootstrap_means

Interval = tuple[float, float]


@dataclass
class Measurement:
    """The figures of one task on one set.

    `metrics` by name, None where undefined; `ci95` the bootstrap interval of those that have one;
    `samples` the per-sample values whose means are the figures of the same name, for paired
    comparisons; `details` whatever else is worth writing down, as JSON.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)
    ci95: dict[str, Interval] = field(default_factory=dict)
    samples: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add_means(self, columns: dict[str, NDArray[Any]]) -> None:
        """Add figures that are the means of per-sample values; all columns are equally long."""
        if not columns:
            return
        values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
        intervals = bootstrap_means(values)
        for number, name in enumerate(columns):
            self.metrics[name] = float(values[:, number].mean())
            self.ci95[name] = (float(intervals[number, 0]), float(intervals[number, 1]))
            self.samples[name] = values[:, number]
