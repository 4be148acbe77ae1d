"""Records beside shards: what is read in their place, and when they are not believed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import sidecar
from data_pipelines.contact_sheet import draw_contact_sheet
from data_pipelines.shard_counts import choose, recorded_count
from data_pipelines.shard_stats import measure, spread
from data_pipelines.tar_headers import ShardPart
from data_pipelines.tool_config import ShowConfig, StatsConfig, ValidateConfig
from data_pipelines.validate import validate

SIZES = (4, 0, 9, 1, 6, 3)


def record(count: object, failed: int = 2) -> str:
    """As img2dataset 1.47.0 writes it."""
    entries = {
        "count": failed + 3, "successes": count, "failed_to_download": failed,
        "failed_to_resize": 0, "duration": 1.5, "start_time": 1.0, "end_time": 2.5,
        "status_dict": {"success": 3, "HTTP Error 404: Not Found": failed},
    }  # fmt: skip
    return json.dumps(entries, indent=4)


@pytest.fixture
def folder(make_shard: Any, picture: Callable[[int], bytes]) -> Path:
    number = 0
    for shard, size in enumerate(SIZES):
        samples = []
        for _ in range(size):
            samples.append((f"{number:09d}", {"png": picture(number), "txt": b"text"}))
            number += 1
        path = make_shard(f"set/{shard:05d}.tar", samples)
        path.with_name(f"{shard:05d}_stats.json").write_text(record(size))
    return path.parent


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the shards whose headers are read from now on."""
    found: set[str] = set()
    real = sidecar.read_headers

    def read(path: str, *args: Any) -> ShardPart:
        found.add(os.path.basename(path))
        return real(path, *args)

    monkeypatch.setattr(sidecar, "read_headers", read)
    return found


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", record(-1), record("3"), record(True), record(None), "[" * 9999]
)
def test_nonsense_is_no_record(folder: Path, text: str) -> None:
    assert recorded_count(str(folder / "00002.tar")) == 9
    (folder / "00002_stats.json").write_text(text)
    assert recorded_count(str(folder / "00002.tar")) is None
    assert recorded_count("https://host/00002.tar") is None


def test_the_same_samples_are_chosen_with_and_without_records(folder: Path, tmp_path: Path) -> None:
    paths = sorted(map(str, folder.glob("*.tar")))

    def chosen(samples: list[int]) -> tuple[list[str], int, list[int], list[int], bool]:
        choice = choose(paths, str(tmp_path / "indexes"), lambda total: samples)
        keys = [str(choice.index.keys[sample]) for sample in choice.samples]
        counts, sizes = list(choice.counts), list(choice.file_bytes)
        return keys, choice.total, counts, sizes, choice.recorded

    rng = np.random.default_rng(0)
    picks = [rng.permutation(23)[: 1 + n % 6].tolist() for n in range(40)]
    by_record = [chosen(samples) for samples in picks]
    for path in folder.glob("*_stats.json"):
        path.unlink()
    by_headers = [chosen(samples) for samples in picks]
    assert [result[:4] for result in by_record] == [result[:4] for result in by_headers]
    assert [result[0] for result in by_record] == [[f"{n:09d}" for n in pick] for pick in picks]
    assert {result[4] for result in by_headers} == {False}
    assert {result[4] for result in by_record} == {True}


def test_tools_open_only_the_shards_that_they_look_into(
    folder: Path, tmp_path: Path, reads: set[str]
) -> None:
    figures = measure(StatsConfig(str(folder), samples=2, tokenizer=None), 0).as_json(3)
    assert spread(23, 2) == [0, 11]
    assert reads == {"00000.tar", "00002.tar"}
    assert (figures["samples"], figures["shards"], figures["looked_at"]) == (23, 6, 2)
    assert figures["counts_from"] == "_stats.json"
    assert figures["distributions"]["samples per shard"]["max"] == 9
    reads.clear()
    config = ShowConfig(str(folder), count=1, output=str(tmp_path / "x.png"))
    assert draw_contact_sheet(config)[1] == 1
    assert reads <= {"00000.tar"}


def test_a_record_that_is_wrong_is_seen_and_reported(folder: Path, reads: set[str]) -> None:
    (folder / "00002_stats.json").write_text(record(10))
    figures = measure(StatsConfig(str(folder), samples=2, tokenizer=None), 0).as_json(3)
    assert (figures["samples"], figures["counts_from"]) == (23, "headers")
    assert len(reads) == 6
    found = validate(ValidateConfig(str(folder)), 0).findings
    assert [(f.kind, os.path.basename(f.shard), f.detail) for f in found] == [
        ("empty_shard", "00001.tar", ""),
        ("miscounted_shard", "00002.tar", "9 samples, 10 were written"),
    ]
