"""Real processes that need the same indexes at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from data_pipelines.shards import index_shards
from data_pipelines.sidecar import SUFFIX

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
ROOT = Path(__file__).parents[2]
SHARDS = 30
# Reads headers slowly, notes which, and stops for good at the shard that is named.
SLOW = """
import os, pathlib, sys, time
from data_pipelines import sidecar
log, stuck = pathlib.Path(sys.argv[1]), sys.argv[3]
read = sidecar.read_headers
def slow(path, *rest):
    with open(log / f"{os.getpid()}", "a") as file:
        print(os.path.basename(path), file=file, flush=True)
    time.sleep(3600 if os.path.basename(path) == stuck else 0.02)
    return read(path, *rest)
sidecar.read_headers = slow
from data_pipelines.shards import expand_shards, index_shards
from data_pipelines.turns import is_first_process
paths = expand_shards(sys.argv[2])
"""
GLOO = """
import torch.distributed as dist
place, rank = f"file://{log}/store", int(sys.argv[4])
dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
dist.barrier()
index = index_shards(paths)
everybody = [None, None]
dist.all_gather_object(everybody, (index.fingerprint(), is_first_process(), len(index)))
assert everybody[0][0] == everybody[1][0] and len(index) == 60, everybody
assert [first for _, first, _ in everybody] == [True, False], everybody
dist.destroy_process_group()
"""


def start(code: str, log: Path, pattern: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW + code, str(log), pattern, *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(log / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)


def notes(log: Path) -> dict[str, list[str]]:
    """Shards whose headers each process has read, by its id."""
    return {path.name: path.read_text().split() for path in log.glob("[0-9]*")}


@pytest.fixture
def pattern(make_shard: MakeShard) -> str:
    for number in range(SHARDS):
        members = {"txt": b"text", "cls": b"0"}
        samples = [(f"k{number:02d}{letter}", members) for letter in "ab"]
        path = make_shard(f"many/{number:02d}.tar", samples)
        os.utime(path, (1, 1))
    return str(path.parent / "*.tar")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_two_gloo_processes_share_the_work(
    pattern: str, log: Path, running: list[subprocess.Popen[str]]
) -> None:
    running += [start(GLOO, log, pattern, "", str(rank)) for rank in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    read = notes(log)
    assert len(read) == 2  # each has done some
    assert Counter(name for names in read.values() for name in names) == Counter(
        f"{number:02d}.tar" for number in range(SHARDS)
    )
    left = sorted(os.listdir(Path(pattern).parent))
    assert left == sorted(f"{n:02d}.tar{end}" for n in range(SHARDS) for end in ("", SUFFIX))


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_a_builder_that_dies_is_replaced(
    pattern: str, log: Path, running: list[subprocess.Popen[str]], death: int
) -> None:
    builder = start("index_shards(paths)", log, pattern, "03.tar")
    running.append(builder)
    end = time.monotonic() + 60
    while "03.tar" not in notes(log).get(str(builder.pid), []):
        assert time.monotonic() < end
        assert builder.poll() is None
        time.sleep(0.01)
    other = start("assert len(index_shards(paths)) == 60", log, pattern, "")
    running.append(other)
    while "29.tar" not in notes(log).get(str(other.pid), []):  # gone past the one that is stuck
        assert time.monotonic() < end
        assert other.poll() is None
        time.sleep(0.01)
    assert "03.tar" not in notes(log)[str(other.pid)]
    builder.send_signal(death)
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 0, errors
    assert notes(log)[str(other.pid)][-1] == "03.tar"
    builder.communicate(timeout=60)
    assert not list(Path(pattern).parent.glob(".*"))


def test_where_no_lock_can_be_had_nobody_waits(
    pattern: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that takes neither locks nor indexes, and a cache that is a file."""
    paths = [str(Path(pattern).parent / f"{number:02d}.tar") for number in range(SHARDS)]
    for path in paths:
        Path(path + SUFFIX).mkdir()
        Path(path).with_name(f".{Path(path).name}{SUFFIX}.lock").mkdir()
    (log / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(log / "cache"))
    assert len(index_shards(paths)) == 2 * SHARDS
    assert len(index_shards(paths)) == 2 * SHARDS
