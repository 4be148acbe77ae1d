"""How long a step takes, from the first that are like all later ones."""

from __future__ import annotations

import time

from training.progress import Progress

MEASURED = 20  # steps after which the pace is known
SETTLING = 5  # first of them, which compile, start loaders and fill caches


class Pace:
    """Measures steps `SETTLING` + 1 to `MEASURED` of a start, without evaluations and checkpoints.

    Args:
        first: steps that were done before.
        progress: knows the pauses.
    """

    def __init__(self, first: int, progress: Progress) -> None:
        self._begins, self._ends = first + SETTLING, first + MEASURED
        self._progress, self._started = progress, 0.0

    def is_known_after(self, step: int) -> bool:
        """Whether `step_time` can be asked for, once; called after each step with its number."""
        if step == self._begins:
            self._started = self._training_time()
        return step == self._ends

    def step_time(self) -> float:
        """Seconds a step."""
        return (self._training_time() - self._started) / (MEASURED - SETTLING)

    def _training_time(self) -> float:
        return time.perf_counter() - self._progress.total_pause
