"""Going through torch's loaders so that the death of a loader process is one clear error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

from data_pipelines.errors import LoaderError

# A loader that dies loses its connections before it has ended.
ENDING_SECONDS = 5.0


def iterate(
    loader: DataLoader[Any],
    at: Callable[[int], str | None] = lambda _: None,
    advice: str = "",
) -> Iterator[Any]:
    """What a loader yields.

    Args:
        loader: of any kind.
        at: says what the process with an id has been at, where that is known.
        advice: ends the message about a death.

    Raises:
        LoaderError: a loader process has died.
    """
    loading = _start(loader)
    processes = _processes(loading)
    try:
        yield from loading
        return
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not loader.num_workers or not _tells_a_death(error):
            raise
    # Not in the clause above: with torch's error, or the loader, whoever keeps ours would keep the
    # other processes alive.
    deaths = _deaths(_dead(processes), at)
    del loading
    raise LoaderError("; ".join(deaths) + advice)


def _tells_a_death(error: Exception) -> bool:
    """Whether torch, or a lost connection, says that a process has died. What a data set raises in
    one begins with "Caught" here."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught ")


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's processes, without torch's signal handler.

    It raises wherever this process is at when a loader dies, in the middle of a training step as
    well, where nobody expects it. Without it the death is noticed when a batch is waited for,
    within five seconds.

    A program that ends in the middle of a stream kills them: it would ask them to end by SIGTERM,
    which those of a training stream ignore, and wait for ever.
    """
    before = signal.getsignal(signal.SIGCHLD)
    loading = iter(loader)
    replaced = signal.getsignal(signal.SIGCHLD) is not before
    if replaced and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    Finalize(loading, _kill, args=(_processes(loading),), exitpriority=0)
    return loading


def _processes(loading: Iterator[Any]) -> list[BaseProcess]:
    """Told by the loader, for a process may die before it has said anything."""
    return getattr(loading, "_workers", [])


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _dead(processes: Sequence[BaseProcess]) -> list[BaseProcess]:
    """Those that have ended, or are the first to end within a few seconds."""
    ended = wait([process.sentinel for process in processes], ENDING_SECONDS)
    dead = [process for process in processes if process.sentinel in ended]
    for process in dead:
        process.join()
    return dead


def _deaths(dead: list[BaseProcess], at: Callable[[int], str | None]) -> list[str]:
    if not dead:
        return ["a loader process has died (pid unknown)"]
    return [f"a loader process has died (pid {p.pid}): {_cause(p, at(p.pid or 0))}" for p in dead]


def _cause(process: BaseProcess, sample: str | None) -> str:
    """How a process ended, at what, and what to do about it."""
    code = process.exitcode or 0
    place = "" if sample is None else f" at {sample}"
    if code == -signal.SIGKILL:
        return (
            f"it was killed{place}, often by the system for lack of memory: use fewer workers or"
            " more memory"
        )
    if code < 0:
        return (
            f"it crashed ({signal.Signals(-code).name}){place}, most likely in a decoder: mend or"
            " blank that picture"
        )
    return f"it ended{place} with exit code {code}"
