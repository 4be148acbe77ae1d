"""Dividing cores among training processes and their loaders."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from training.machine import CorePlan, available_cores, local_processes, plan_cores

PASSES = """
import resource, sys
import torch
from training.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 * 2**20) for _ in range(6)]  # 20 MiB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(3):
    step()
print(step())
"""


def pages_of_a_step(mode: str) -> int:
    """Fresh pages that a repeated step of 120 MiB asks the system for.

    glibc's first thresholds are held, which it would else raise to what the heap happens to be.
    """
    command = [sys.executable, "-c", PASSES, mode]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_step_takes_the_memory_that_the_last_one_freed() -> None:
    assert pages_of_a_step("default") > 1000
    assert pages_of_a_step("keep") < 100


@pytest.mark.parametrize(
    ("cores", "processes", "device_is_cpu", "expected"),
    [
        (1, 1, True, CorePlan(threads=1, workers=0)),
        (2, 1, True, CorePlan(threads=2, workers=0)),
        (16, 1, True, CorePlan(threads=14, workers=2)),
        (16, 4, True, CorePlan(threads=4, workers=0)),
        (2, 4, True, CorePlan(threads=1, workers=0)),
        (1, 1, False, CorePlan(threads=1, workers=0)),
        (16, 1, False, CorePlan(threads=1, workers=8)),
        (16, 4, False, CorePlan(threads=1, workers=3)),
    ],
)
def test_plans(cores: int, processes: int, device_is_cpu: bool, expected: CorePlan) -> None:
    assert plan_cores(cores, processes, device_is_cpu=device_is_cpu) == expected


def test_explicit_numbers_are_kept() -> None:
    plan = plan_cores(16, 1, device_is_cpu=True, threads=3, workers=5)
    assert plan == CorePlan(threads=3, workers=5)
    assert plan_cores(16, 1, device_is_cpu=True, workers=0) == CorePlan(threads=16, workers=0)


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        plan_cores(4, 1, device_is_cpu=True, threads=0)
    with pytest.raises(ValueError, match="workers must not be negative"):
        plan_cores(4, 1, device_is_cpu=True, workers=-1)


def test_only_processes_of_this_machine_share_its_cores() -> None:
    assert local_processes(16, {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}) == 8
    assert local_processes(4, {}) == 4


def test_there_is_a_core() -> None:
    assert available_cores() >= 1
