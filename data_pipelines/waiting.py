"""What a stream waits for, and saying so when it takes long."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info
from tqdm import tqdm

from data_pipelines.sample_index import SampleIndex

# Below the logger of a run, so that its log has the lines, too.
LOGGER = logging.getLogger("softmoe_clip.train.data")


class Board:
    """What each loader process is at, in memory that they share with the training process."""

    def __init__(self, workers: int) -> None:
        rows = torch.zeros((max(1, workers), 3), dtype=torch.int64)  # pid, sample, since (ns)
        self._rows = rows.share_memory_() if workers else rows
        self._view: np.ndarray | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_view": None}  # a copy of it would not be shared

    def start(self, sample: int) -> None:
        """Note that this process begins with a sample."""
        self._write(sample, time.monotonic_ns())

    def rest(self) -> None:
        """Note that this process has nothing to do."""
        self._write(0, 0)

    def at(self, pid: int) -> int | None:
        """The sample that a process has begun with and not left, dead or alive."""
        for owner, sample, since in self._rows.tolist():
            if owner == pid and since:
                return sample
        return None

    def _write(self, sample: int, since: int) -> None:
        if self._view is None:  # of numpy, whose small writes take a tenth of torch's time
            self._view = self._rows.numpy()
        worker = get_worker_info()
        self._view[0 if worker is None else worker.id] = os.getpid(), sample, since

    def describe(self, index: SampleIndex, waited: float) -> str:
        """One line about a wait of so many seconds."""
        states = []
        for number, (pid, sample, since) in enumerate(self._rows.tolist()):
            name = f"loader process {number} (pid {pid})" if pid != os.getpid() else "this process"
            if not pid:
                states.append(f"loader process {number} has not started")
            elif since:
                seconds = (time.monotonic_ns() - since) / 1e9
                states.append(f"{name} has been at {index.describe(sample)} for {seconds:.0f} s")
            else:
                states.append(f"{name} is idle")
        return f"no batch for {waited:.0f} s: " + "; ".join(states)


class Watch:
    """Says every `seconds` seconds of one wait what is waited for.

    A context: a thread lives inside it. `waiting` marks a wait.
    """

    def __init__(self, seconds: float, describe: Callable[[float], str]) -> None:
        self.seconds, self.describe = seconds, describe
        self._since: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stream watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        reported: tuple[float | None, int] = (None, 0)
        while not self._end.wait(min(1.0, self.seconds / 2)):
            since = self._since
            if since is None:
                continue
            times = reported[1] if reported[0] == since else 0
            waited = time.monotonic() - since
            if waited >= self.seconds * (times + 1):
                reported = since, times + 1
                say(self.describe(waited))


def say(message: str) -> None:
    """Print a line beside progress bars, and log it."""
    tqdm.write(message, file=sys.stderr)
    LOGGER.warning(message)
