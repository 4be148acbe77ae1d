"""Mutated bytes never crash a tool: what comes out is a report, a count or a ShardError."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.clean_copy import write_clean_copy
from data_pipelines.contact_sheet import draw_contact_sheet
from data_pipelines.findings import Validation
from data_pipelines.pack import pack
from data_pipelines.shard_stats import measure
from data_pipelines.shards import ShardError, index_shards
from data_pipelines.tool_config import PackConfig, ShowConfig, StatsConfig, ValidateConfig
from data_pipelines.validate import validate

FUZZ = 120
MAX_PIXELS = 100_000  # mutated headers may claim large pictures, which would take long


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut out, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(0, max(1, len(changed))))
        length = int(rng.integers(1, 600))
        match int(rng.integers(0, 5)):
            case 0:
                changed[place : place + 1] = rng.bytes(1)
            case 1:
                changed[place : place + length] = rng.bytes(length)
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case _:
                del changed[place + 1 + len(changed) // 2 :]
    return bytes(changed)


def check(shards: Path, **settings: Any) -> Validation:
    return validate(ValidateConfig(str(shards), max_pixels=MAX_PIXELS, **settings), 0)


@pytest.fixture
def samples(encode: Callable[..., bytes]) -> list[tuple[str, dict[str, bytes]]]:
    noise = np.random.default_rng(0).integers(0, 256, (18, 20, 3), np.uint8)
    image = Image.fromarray(noise)
    record = b'{"caption": ["a", "b"], "n": 1.5}'
    return [
        (
            f"k{kind.lower()}",
            {kind.lower(): encode(image, kind), "txt": b"two\nlines", "cls": b"1", "json": record},
        )
        for kind in ("PNG", "JPEG", "WEBP")
    ]


def test_mutated_shards(
    samples: list[tuple[str, dict[str, bytes]]], make_shard: Callable[..., Path], tmp_path: Path
) -> None:
    whole = make_shard("whole.tar", samples).read_bytes()
    folder, clean = tmp_path / "shards", tmp_path / "clean"
    folder.mkdir()
    path, sane = folder / "0.tar", 0
    for seed in range(FUZZ):
        path.write_bytes(mutate(whole, np.random.default_rng(seed)))
        try:
            total = len(index_shards([str(path)]))
            known = index_shards([str(path)]).members.keys() & {"txt", "cls"}
        except ShardError:
            total, known = 0, {"nothing to look at"}
        if not known:  # neither captions nor labels are left, which is said
            with pytest.raises(ShardError, match="set --caption_key"):
                check(path)
            continue
        validation = check(path)
        validation.lines()
        if not total:
            assert validation.counts["broken_shard"] + validation.counts["empty_shard"] == 1
            continue
        assert validation.index is not None
        stats = measure(StatsConfig(str(path), tokenizer=None, max_pixels=MAX_PIXELS), 0)
        stats.as_json(5)
        assert total == stats.samples == len(validation.index)
        draw_contact_sheet(ShowConfig(str(path), count=3, size=16, max_pixels=MAX_PIXELS))
        bad = len(validation.bad_samples())
        assert write_clean_copy(validation, clean) == (int(total > bad), total - bad, {})
        if total > bad:
            assert not check(clean).findings
            sane += 1
        shutil.rmtree(clean)
    assert sane > FUZZ // 10


def test_mutated_folders(samples: list[tuple[str, dict[str, bytes]]], tmp_path: Path) -> None:
    """Every picture is packed or counted, and what was packed is sound."""
    for seed in range(FUZZ // 4):
        rng = np.random.default_rng(seed)
        source, out = tmp_path / f"in{seed}", tmp_path / f"out{seed}"
        source.mkdir()
        for key, members in samples:
            for extension, data in members.items():
                changed = mutate(data, rng) if rng.random() < 0.4 else data
                (source / f"{key}.{extension}").write_bytes(changed)
        config = PackConfig(str(source), str(out), max_pixels=MAX_PIXELS)
        try:
            summary = pack(config, 0)
        except ShardError:
            assert not list(out.glob("*.tar"))
            continue
        assert summary.samples + summary.skipped.total() == len(samples)
        assert not check(out, min_side=1).findings


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_mutated_tables(
    suffix: str, tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]]
) -> None:
    import pyarrow
    from pyarrow import csv, parquet

    for key, members in samples:
        (tmp_path / f"{key}.img").write_bytes(next(iter(members.values())))
    table = pyarrow.table(
        {"path": [f"{key}.img" for key, _ in samples] * 4, "caption": ["a, b"] * 12, "n": [1] * 12}
    )
    source = tmp_path / f"t.{suffix}"
    (csv.write_csv if suffix == "csv" else parquet.write_table)(table, source)
    whole, packed = source.read_bytes(), 0
    for seed in range(FUZZ // 4):
        source.write_bytes(mutate(whole, np.random.default_rng(seed)))
        out = tmp_path / f"out{seed}"
        try:
            summary = pack(PackConfig(str(source), str(out), caption_column="caption"), 0)
        except ShardError:
            continue
        assert summary.samples
        packed += 1
    assert packed or suffix == "parquet"
