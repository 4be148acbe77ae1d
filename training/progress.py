"""Progress bar and throughput of the loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Counts time spent training and waiting for data; shows a bar on a main process's terminal.

    Time inside `paused` (evaluation, checkpoints) does not count as training time.
    """

    def __init__(self, step: int, total: int, is_main: bool) -> None:
        self.bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )
        self.total_wait = self.total_pause = 0.0  # seconds
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._wait = self._pause = 0.0
        self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        self._wait, self.total_wait = self._wait + waited, self.total_wait + waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self._pause, self.total_pause = self._pause + paused, self.total_pause + paused

    def set_total(self, total: int) -> None:
        """Correct the number of steps, once it is known."""
        self.bar.total = total

    def advance(self, samples: int) -> None:
        """One step is done, of so many samples over all processes."""
        self._samples += samples
        self.bar.update()

    def speed(self) -> dict[str, float]:
        """Samples per second and share of time spent waiting for data, since the last call."""
        elapsed = max(1e-9, time.perf_counter() - self._start - self._pause)
        figures = {
            "samples_per_second": round(self._samples / elapsed, 1),
            "data_wait": round(self._wait / elapsed, 4),
        }
        self._reset()
        return figures

    def show(self, loss: float, speed: dict[str, float]) -> None:
        """Figures beside the bar; `speed` is what `speed()` gave."""
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {speed['samples_per_second']:.0f} images/s,"
            f" data wait {speed['data_wait']:.0%}"
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
