"""How long a step takes, from the first that are like all later ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

MEASURED = 20  # steps after which the pace is known
SETTLING = 5  # first of them, which compile, start loaders and fill caches


class Pace:
    """Measures steps `SETTLING` + 1 to `MEASURED` of a start, without what is done in between.

    Args:
        first: steps that were done before.
    """

    def __init__(self, first: int) -> None:
        self._begins, self._ends = first + SETTLING, first + MEASURED
        self._started = self._paused = 0.0

    def is_known_after(self, step: int) -> bool:
        """Whether `step_time` can be asked for, once; called after each step with its number."""
        if step == self._begins:
            self._started, self._paused = time.perf_counter(), 0.0
        return step == self._ends

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count: an evaluation or a checkpoint."""
        begun = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begun

    def step_time(self) -> float:
        """Seconds a step."""
        elapsed = time.perf_counter() - self._started - self._paused
        return elapsed / (MEASURED - SETTLING)
