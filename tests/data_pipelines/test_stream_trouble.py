"""Loader processes that die or hang, and what is done about samples that cannot be used."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data_pipelines.config import (
    AugmentationConfig,
    ImageTextConfig,
    ReadingConfig,
    StreamConfig,
)
from data_pipelines.errors import LoaderError
from data_pipelines.image_text import image_text_stream
from data_pipelines.loaders import iterate
from data_pipelines.shards import ShardError
from data_pipelines.stream import SkipSample
from tests.data_pipelines.test_orders import stream_of


class Hanging:
    """Loads samples until a file is there; then sample 3 takes as long as the file exists."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, sample: int) -> dict[str, Any]:
        while sample == 3 and self.path.exists():
            time.sleep(0.01)
        return {"sample": torch.tensor(sample)}


def kill_and_read_on(pid: int, batches: Iterator[Any]) -> None:
    os.kill(pid, signal.SIGKILL)
    deque(batches, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_loader_ends_the_stream_and_a_new_one_goes_on(workers: int) -> None:
    whole = [b["sample"] for b in itertools.islice(stream_of([30], global_batch=5).batches(), 9)]
    start, seen = 0, []
    for _ in range(3):  # three kills in one epoch and a half
        batches: Any = stream_of([30], global_batch=5, workers=workers).batches(start)
        seen += [next(batches)["sample"] for _ in range(2)]
        start += 2
        victim = multiprocessing.active_children()[-1]
        began = time.monotonic()
        with pytest.raises(LoaderError, match=rf"pid {victim.pid}\): it was killed"):
            kill_and_read_on(victim.pid or 0, batches)
        batches.close()
        assert time.monotonic() - began < 60
        assert not multiprocessing.active_children()
    rest = stream_of([30], global_batch=5, workers=workers).batches(start)
    seen += [next(rest)["sample"] for _ in range(3)]
    assert torch.equal(torch.stack(seen), torch.stack(whole))


def test_a_loader_that_dies_before_it_has_begun_is_named(tmp_path: Path) -> None:
    def die(worker: int) -> None:
        if worker == 1:
            (tmp_path / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    samples: Any = range(9)
    loader = DataLoader(samples, num_workers=3, worker_init_fn=die)
    with pytest.raises(LoaderError) as caught:
        deque(iterate(loader, lambda pid: None, "; begin again"), 0)
    pid = (tmp_path / "pid").read_text()
    assert str(caught.value) == (
        f"a loader process has died (pid {pid}): it was killed, often by the system for lack of"
        " memory: use fewer workers or more memory; begin again"
    )
    assert not multiprocessing.active_children()


class Unreachable(Dataset[int]):
    """A data set whose store is lost, which is not a process that dies."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise ConnectionError("the store does not answer")


def test_what_a_data_set_raises_is_no_death() -> None:
    with pytest.raises(ConnectionError, match="the store does not answer"):
        deque(iterate(DataLoader(Unreachable(), num_workers=1)), 0)


ABANDONED = """
import sys
from tests.data_pipelines.test_stream_trouble import ends_in_the_middle
batches = ends_in_the_middle()
print(next(batches)["sample"].tolist(), flush=True)
"""


def ends_in_the_middle() -> Iterator[Any]:
    return stream_of([30], global_batch=5, workers=2, shuffle=False).batches()


def test_a_program_may_end_in_the_middle_of_a_stream() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2, 3, 4]\n"), done.stderr


def crash_at_9(sample: int) -> dict[str, Any]:
    """As a decoder with a bug does."""
    if sample == 9:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"sample": torch.tensor(sample)}


def test_a_crashing_decoder_is_told_with_its_sample_and_never_in_the_middle_of_a_step() -> None:
    stream = stream_of([30], global_batch=5, workers=2, shuffle=False)
    stream.index.keys[:] = [f"key{number}" for number in range(30)]
    stream.dataset.load = crash_at_9
    handler = signal.getsignal(signal.SIGCHLD)
    batches = stream.batches()
    assert next(batches)["sample"].tolist() == list(range(5))
    assert signal.getsignal(signal.SIGCHLD) is handler
    end = time.monotonic() + 60
    while len(multiprocessing.active_children()) == 2:  # a step in which nothing may be raised
        assert time.monotonic() < end
    message = (
        r"died \(pid \d+\): it crashed \(SIGSEGV\) at sample 'key9' of '0\.tar', most likely in"
    )
    with pytest.raises(LoaderError, match=message):
        deque(batches, 0)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_long_wait_is_explained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    stream = stream_of(
        [8],
        global_batch=4,
        shuffle=False,
        workers=workers,
        config=StreamConfig(report_wait=0.1),
    )
    stream.index.keys[:] = [f"key{number}" for number in range(8)]
    stream.dataset.load = Hanging(hold)
    said = ""

    def release() -> None:
        nonlocal said
        end = time.monotonic() + 60
        while said.count("has been at sample") < 2 and time.monotonic() < end:
            said += capfd.readouterr().err
            time.sleep(0.02)
        hold.unlink()

    thread = threading.Thread(target=release)
    thread.start()
    batch = next(stream.batches())
    thread.join()
    assert batch["sample"].tolist() == [0, 1, 2, 3]
    who = r"this process" if workers == 0 else r"loader process 0 \(pid \d+\)"
    line = [line for line in said.splitlines() if "has been at sample" in line][-1]
    assert re.search(rf"no batch for .*{who} has been at sample 'key3' of '0\.tar' for \d+ s", line)
    assert (workers == 0) or "loader process 1 (pid" in line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("report_wait", 0.0, r"data\.report_wait must be above 0, got 0\.0"),
        ("max_skipped", float("nan"), r"data\.max_skipped must be from 0 to 1, got nan"),
        ("max_pixels", 0, r"data\.max_pixels must be at least 1, got 0"),
        ("reading", ReadingConfig(backoff=-1), r"data\.reading\.backoff must be 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of([8], global_batch=4, config=StreamConfig(**{name: value}))


def bad_half(sample: int) -> dict[str, Any]:
    if sample % 2:
        raise SkipSample("odd one")
    return {"sample": torch.tensor(sample)}


def test_too_large_a_share_of_skipped_samples_stops_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(limit: float, steps: int) -> None:
        config = StreamConfig(max_skipped=limit)
        stream = stream_of([400], global_batch=20, config=config)
        stream.dataset.load = bad_half
        for _ in itertools.islice(stream.batches(), steps):
            pass

    run(0.7, 100)  # half of the tries, and half of the substitutes
    with pytest.raises(ShardError) as caught:
        run(0.3, 100)
    message = str(caught.value)
    assert "odd one; that is more than data.max_skipped 0.3 allows" in message
    tried = int(message.split()[1])
    assert 100 <= tried < 200
    run(0.3, 2)  # too few to tell
    told = [line for line in capsys.readouterr().err.splitlines() if "odd one" in line]
    assert len(told) == 3  # once a run


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_at_the_first_bad_sample_names_it(
    make_shard: Any, picture: Callable[[int], bytes], tokenize: Any, workers: int
) -> None:
    good = [(f"k{n}", {"png": picture(n), "txt": b"x"}) for n in range(6)]
    bad = [("broken one", {"png": picture(9)[:100], "txt": b"x"})]
    shards = [make_shard("0.tar", good), make_shard("1.tar", bad)]
    config = ImageTextConfig(
        shards="::".join(map(str, shards)),
        shuffle=False,
        on_bad_sample="stop",
        augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)),
    )
    stream = image_text_stream(
        config, image_size=8, tokenize=tokenize, seed=0, global_batch=3, workers=workers
    )
    batches = stream.batches()
    assert [key for _ in range(2) for key in next(batches)["key"]] == [f"k{n}" for n in range(6)]
    with pytest.raises(ShardError, match=r"^sample 'broken one' of '.*1\.tar' cannot be used: br"):
        next(batches)
    assert not multiprocessing.active_children()


def test_a_shard_that_shrinks_during_a_run_is_counted(captioned: str, tokenize: Any) -> None:
    config = ImageTextConfig(shards=captioned)
    config.reading.attempts, config.reading.backoff = 2, 0.0
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=0, global_batch=10)
    path = stream.index.paths[2]
    os.truncate(path, 100)
    skipped = Counter(
        reason for batch in itertools.islice(stream.batches(), 2) for reason in batch["skipped"]
    )
    assert skipped.keys() == {"cannot be read (shard ends early)"}
