"""The machine that a benchmark ran on, and where results are kept."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """What ran a benchmark: processor, GPU (None for "cpu"), torch, threads, load and day."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "cpu": f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "threads": threads,
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
    }
