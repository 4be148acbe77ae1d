"""What an evaluation gives: figures with intervals, the outcome of every sample, and details."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.statistics import bootstrap_means

Interval = tuple[float, float]


@dataclass
class Measurement:
    """The figures of one task on one set.

    `metrics` by name, None where undefined; `samples` the per-sample values whose means are the
    figures of the same name, for paired comparisons; `details` whatever else is worth writing down,
    as JSON; `intervals` are functions that give intervals by name, which nobody has asked for yet.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    intervals: list[Callable[[], dict[str, Interval]]] = field(default_factory=list)
    _drawn: dict[str, Interval] = field(default_factory=dict, repr=False)

    @property
    def ci95(self) -> dict[str, Interval]:
        """The 95 % interval of the figures that have one, resampled when it is asked for: records
        show it, evaluations in training do not."""
        while self.intervals:  # each of which keeps the outcomes that it draws from
            self._drawn |= self.intervals.pop(0)()
        return self._drawn

    def add_means(self, columns: dict[str, NDArray[Any]]) -> None:
        """Add figures that are the means of per-sample values; all columns are equally long."""
        if not columns:
            return
        values = np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1)
        for number, name in enumerate(columns):
            self.metrics[name] = float(values[:, number].mean())
            self.samples[name] = values[:, number]
        names = list(columns)

        def intervals() -> dict[str, Interval]:
            bounds = bootstrap_means(values).tolist()
            return {name: (low, high) for name, (low, high) in zip(names, bounds, strict=True)}

        self.intervals.append(intervals)
