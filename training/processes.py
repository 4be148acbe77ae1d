"""What the processes of a run tell one another beside gradients: decisions, and signs of life.

Both use groups of their own over gloo, on the CPU, so that nothing waits for a device.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import distributed

from training.run_log import LOGGER
from training.signals import RESUMABLE, StopRequests

INTERVAL = 1.0  # seconds between signs of life
LIMITED = ("waiting for data", "in a training step")  # not longer than the limit
PHASES = (*LIMITED, "starting", "waiting for the others", "evaluating", "saving")


def _cpu_group(processes: int) -> Any:
    """A group of its own over gloo; None for one process."""
    return distributed.new_group(backend="gloo") if processes > 1 else None


class Agreement:
    """Decisions that every process takes alike; every process calls `largest` the same times."""

    def __init__(self, processes: int) -> None:
        self._group = _cpu_group(processes)

    def largest(self, value: int) -> int:
        """The largest of the values of all processes."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._group)
        return int(tensor)


class Sign(NamedTuple):
    """What a process tells: its phase, the seconds it is in it, its step, and three flags."""

    phase: int
    seconds: int
    step: int
    stops: int
    failed: int
    done: int


class Watch(threading.Thread):
    """Exchanges signs of life, and ends a process whose run cannot go on.

    A main thread that waits for another process or for data cannot say so; this thread can. It
    ends the process with code 1 and a message on every process when one has died or failed, or
    waits or computes longer than `limit`. When a stop is requested during an evaluation of several
    processes, which cannot leave it together, it calls `rescue` and ends them with code 75.

    Args:
        rank: this process.
        processes: how many there are.
        limit: seconds that a wait for data or a step may last.
        requests: of this process.
        rescue: on the main process, publishes the checkpoint that is written; returns words, or
            none if there is nothing to publish any more.
    """

    def __init__(
        self,
        rank: int,
        processes: int,
        limit: float,
        requests: StopRequests,
        rescue: Callable[[], str] | None,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.processes, self.limit, self.requests = rank, processes, limit, requests
        self.rescue = rescue
        self._phase, self._since, self._step = PHASES.index("starting"), time.monotonic(), 0
        self._failed = self._done = 0
        self._ended = threading.Event()
        self._group = _cpu_group(processes)

    def enter(self, phase: str, step: int) -> None:
        """The main thread begins something; see `PHASES`."""
        self._phase, self._since, self._step = PHASES.index(phase), time.monotonic(), step

    def explain(self) -> None:
        """The main thread has met an error of the group: leaves the time to find out whose."""
        if self.processes > 1:
            time.sleep(3 * INTERVAL)

    def close(self, failed: bool) -> None:
        """The main thread has ended; waits until all have, for a few seconds if it failed."""
        self._failed, self._done = int(failed), 1
        self._ended.set()
        self.join(3 * INTERVAL if failed else None)

    def run(self) -> None:
        while True:
            self._ended.wait(INTERVAL)
            own = Sign(
                self._phase,
                int(time.monotonic() - self._since),
                self._step,
                int(self.requests.reason is not None),
                self._failed,
                self._done,
            )
            try:
                signs = self._exchange(own)
                if not own.failed:  # as the others have heard it, so that all judge alike
                    self._judge(signs)
            except RuntimeError as error:
                if self._done:
                    return
                _exit(self.rank, 1, f"another process of the run has died ({_first_line(error)})")
            if all(sign.done for sign in signs):
                return

    def _exchange(self, own: Sign) -> list[Sign]:
        if self._group is None:
            return [own]
        rows = [torch.zeros(len(own), dtype=torch.int64) for _ in range(self.processes)]
        distributed.all_gather(rows, torch.tensor(own), group=self._group)
        return [Sign(*row.tolist()) for row in rows]

    def _judge(self, signs: list[Sign]) -> None:
        for rank, sign in enumerate(signs):
            # Also after the last step: what one could not save, the others must not call saved.
            if sign.failed and rank != self.rank:
                _exit(
                    self.rank, 1, f"process {rank} has failed at step {sign.step}, see its message"
                )
            if PHASES[sign.phase] in LIMITED and sign.seconds > self.limit and not sign.done:
                if rank == self.rank:
                    faulthandler.dump_traceback(sys.stderr)
                _exit(
                    self.rank,
                    1,
                    f"process {rank} is {PHASES[sign.phase]} since {sign.seconds} s at step"
                    f" {sign.step + 1}, longer than train.stall_limit",
                )
        evaluating = all(sign.phase == PHASES.index("evaluating") for sign in signs)
        if self.processes > 1 and evaluating and any(sign.stops for sign in signs):
            self._leave_evaluation()

    def _leave_evaluation(self) -> None:
        """End all processes, unless the first has just left the evaluation by itself: it then
        answers the stop in the loop, as do the others."""
        saved = ""
        if self.rescue is not None:
            try:
                saved = self.rescue()
            except Exception as error:
                _exit(self.rank, 1, str(error))
        # The others stay alive until the checkpoint has its name.
        rescued = torch.tensor(int(bool(saved)))
        distributed.broadcast(rescued, 0, group=self._group)
        if rescued:
            _exit(
                self.rank,
                RESUMABLE,
                f"stopped during the evaluation after step {self._step};"
                f" {saved or 'see process 0'}",
            )


def end_loaders() -> None:
    """Kill loader processes, which may hang in a read and would be waited for at exit."""
    for child in multiprocessing.active_children():
        child.kill()


def _exit(rank: int, code: int, message: str) -> NoReturn:
    text = f"{message}; process {rank} ends here (--resume auto goes on)"
    if LOGGER.handlers:  # of the main process
        LOGGER.error(text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
