"""Signals and the time budget: requests to stop that the loop can answer with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
RESUMABLE = 75  # exit code of a run that has stopped with a checkpoint to go on from
ECHO = 2.0  # seconds in which launchers pass on a Ctrl-C that the terminal has also sent


class Stopped(Exception):
    """The run was asked to stop and has; the message says by whom and where it goes on."""


class Interrupted(BaseException):
    """Ends a wait or an evaluation in which a stop was requested.

    No `Exception`, so that code which survives any error of a sample does not survive this.
    """


class StopRequests:
    """A context in which SIGTERM, SIGINT, SIGUSR1 and the end of a time budget ask for a stop.

    Handlers take note only; the main thread looks at `reason` where it can stop, and what it must
    not wait for it runs inside `interruptible`. A second Ctrl-C ends the process at once. The
    handlers of before come back at the end. Outside the main thread only the budget works.

    Args:
        budget: seconds until a stop is requested, or None.
        says: whether to tell that a signal has come; one of many processes should.

    Attributes:
        reason: why a stop was requested, or None.
    """

    def __init__(self, budget: float | None = None, says: bool = True) -> None:
        self.reason: str | None = None
        self._process, self._says = os.getpid(), says
        self._interruptible, self._first = False, 0.0
        self._before: dict[int, Any] = {}
        self._timer = None
        if budget is not None:
            self._timer = threading.Timer(max(0.0, budget), self._time_is_up)
            self._timer.daemon = True

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _time_is_up(self) -> None:
        self.reason = self.reason or "train.max_time is over"
        if self._before:  # wakes the main thread where it waits
            os.kill(self._process, signal.SIGUSR1)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process, which ends with its parent
        if number == signal.SIGINT:
            if self._first and time.monotonic() - self._first > ECHO:
                os.write(2, b"\nstopped at once, without a checkpoint\n")
                os._exit(130)
            self._first = self._first or time.monotonic()
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if self._says:
                os.write(2, f"\n{self.reason}: stopping with a checkpoint\n".encode())
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """End what runs inside by `Interrupted` when a stop is requested, or has been."""
        try:
            self._interruptible = True
            if self.reason is not None:
                raise Interrupted
            yield
        finally:
            self._interruptible = False
