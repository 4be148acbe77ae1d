"""Choosing threads and loader processes from the cores that are there, and keeping memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import NamedTuple

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
KEEP_UP_TO, LARGEST_ON_HEAP = 2**31 - 1, 32 * 2**20  # bytes; the most that mallopt takes


class CorePlan(NamedTuple):
    """Threads of each training process and loader processes beside each."""

    threads: int
    workers: int


def plan_cores(
    cores: int,
    processes: int,
    *,
    device_is_cpu: bool,
    threads: int | None = None,
    workers: int | None = None,
) -> CorePlan:
    """Divide the `cores` of a machine among its `processes` training processes and their loaders.

    On CPU the model needs every core: torch's threads spin while they wait for one another, so a
    loader that shares their cores slows each parallel region down many times over. Few cores
    therefore decode in the training process; many give one core in six to loaders. Beside a GPU
    the cores belong to the loaders. Explicit numbers are kept.

    Raises:
        ValueError: an explicit number is out of range.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"train.threads must be at least 1, got {threads}")
    if workers is not None and workers < 0:
        raise ValueError(f"data.workers must not be negative, got {workers}")
    share = max(1, cores // max(1, processes))
    if workers is None:
        workers = share // 6 if device_is_cpu else min(8, share - 1)
    if threads is None:
        threads = max(1, share - workers) if device_is_cpu else 1
    return CorePlan(threads, workers)


def local_processes(world: int, environment: Mapping[str, str] = os.environ) -> int:
    """How many of the `world` training processes share this machine.

    Launchers tell by LOCAL_WORLD_SIZE, which accelerate also sets for MPI; without it all do.
    """
    return int(environment.get("LOCAL_WORLD_SIZE") or world)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Keep what is freed for the next allocation, where the C library is glibc; returns if it is.

    By default glibc hands the free top of its heap back to the system, and a training step on CPU
    that allocates the same gigabyte as the step before then pays for fresh zeroed pages
    (docs/results.md, "The training engine"). Memory stays at its peak between steps.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(
        mallopt(M_TRIM_THRESHOLD, KEEP_UP_TO) and mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
    )
