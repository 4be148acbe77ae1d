"""Tasks that are done in their order, at once or in a thread beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs tasks one after the other; an error in the thread surfaces at the next call.

    No task is begun after one that has failed, before that error has surfaced: what would follow a
    checkpoint that could not be written is to give it its name, and to remove older ones.
    Two threads may call it: the training's, and the watch's where that rescues a checkpoint.

    Args:
        threaded: whether there is a thread; without one `do` does the task at once.
    """

    def __init__(self, threaded: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if threaded else None
        self._tasks: list[Future[None]] = []
        self._failed = threading.Event()  # a task of those in the list
        self._lock = threading.RLock()

    def do(self, task: Callable[[], None]) -> None:
        """Do the task, or have it done after those before it."""
        with self._lock:
            self.check()
            if self._pool is None:
                task()
            else:
                self._tasks.append(self._pool.submit(_unless, self._failed, task))

    def check(self) -> None:
        """Raise what a task that has ended has raised; what was to follow it is given up."""
        with self._lock:
            while self._tasks and self._tasks[0].done():
                try:
                    self._tasks.pop(0).result()
                except BaseException:
                    self._tasks, self._failed = [], threading.Event()
                    raise

    def finish(self) -> None:
        """Wait for all tasks; raises as `check` does."""
        with self._lock:
            while self._tasks:
                self._tasks[0].exception()
                self.check()


def _unless(failed: threading.Event, task: Callable[[], None]) -> None:
    """Do the task unless one before it has failed."""
    if failed.is_set():
        return
    try:
        task()
    except BaseException:
        failed.set()
        raise
