"""Shards behind a real HTTP server, and what happens when it fails."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.config import AugmentationConfig, ImageTextConfig, ReadingConfig
from data_pipelines.image_text import image_text_stream
from data_pipelines.shards import (
    FieldError,
    ShardError,
    ShardReader,
    expand_shards,
    index_shards,
)
from data_pipelines.sidecar import default_folder
from tests.data_pipelines.http_server import ShardServer

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
QUICK = ReadingConfig(attempts=3, backoff=0.002, timeout=20)
STALLED = replace(QUICK, timeout=0.15)  # too short, at times, on a busy machine
FAULTS = [404, 500, "reset", "cut", "stall"]


def small(make_shard: MakeShard, count: int = 3) -> Path:
    return make_shard("0.tar", [(f"k{n}", {"txt": b"text %d" % n}) for n in range(count)])


def config_of(server: ShardServer, captioned: str, **options: Any) -> ImageTextConfig:
    pattern = captioned.replace(str(server.folder), server.url)
    augmentation = AugmentationConfig(crop_scale=(1.0, 1.0))
    return ImageTextConfig(shards=pattern, augmentation=augmentation, reading=QUICK, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_served_stream_is_the_stream_of_the_files(
    server: ShardServer, captioned: str, tokenize: Any, workers: int
) -> None:
    options: dict[str, Any] = {"image_size": 8, "tokenize": tokenize, "seed": 1, "global_batch": 6}
    remote = config_of(server, captioned)
    remote.reading = replace(STALLED, attempts=2 * len(FAULTS) + 1)
    # Each fault once while headers are read, and once in the middle of the epoch.
    server.faults = {"captioned/0002.tar": [*FAULTS, None, None, *FAULTS]}
    served = image_text_stream(remote, workers=workers, **options)
    local = image_text_stream(replace(remote, shards=captioned), **options)
    assert served.identity() == local.identity()
    pairs = zip(served.batches(1), itertools.islice(local.batches(1), 6), strict=False)
    for one, other in pairs:
        assert one["key"] == other["key"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["text"], other["text"])
        assert one["skipped"] == []
    assert not server.faults["captioned/0002.tar"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (404, "HTTP 404"),
        (500, "HTTP 500"),
        ("reset", "connection lost"),
        ("cut", "connection lost"),
        ("stall", "timed out"),
    ],
)
def test_what_stays_unreadable_is_counted(
    server: ShardServer, captioned: str, tokenize: Any, fault: Any, reason: str
) -> None:
    config = config_of(server, captioned)
    if fault == "stall":
        config.reading = STALLED
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=1, global_batch=10)
    before = server.requests["captioned/0000.tar"]
    server.forever["captioned/0000.tar"] = fault
    batches = list(itertools.islice(stream.batches(), 2))
    skipped = Counter(why for batch in batches for why in batch["skipped"])
    assert skipped.keys() == {f"cannot be read ({reason})"}
    assert skipped.total() >= 7
    keys = [key for batch in batches for key in batch["key"]]
    assert len(keys) == 20
    assert set(keys) == {f"k{number:02d}" for number in range(7, 20)}
    # Three attempts in the first reads, which go side by side, then one each.
    assert 7 + 2 <= server.requests["captioned/0000.tar"] - before <= 3 * 7 + skipped.total()


def test_a_skipped_sample_leaves_what_was_fetched_for_the_others(
    server: ShardServer, make_shard: MakeShard, picture: Callable[[int], bytes], tokenize: Any
) -> None:
    samples = [
        (f"k{n:02d}", {"png": picture(n), "txt": b"" if n % 5 == 1 else b"text"}) for n in range(40)
    ]
    make_shard("0.tar", samples)
    stream = image_text_stream(
        config_of(server, f"{server.url}/0.tar"),
        image_size=8, tokenize=tokenize, seed=1, global_batch=20,
    )  # fmt: skip
    before = server.requests["0.tar"]
    batch = next(stream.batches())
    assert len(batch["skipped"]) >= 2
    # One for each sample of the batch, and for what took the place of others, if it was not there.
    assert 20 <= server.requests["0.tar"] - before <= 20 + len(batch["skipped"])


def test_large_members_are_jumped_over(server: ShardServer, make_shard: MakeShard) -> None:
    noise = os.urandom(1 << 20)
    path = make_shard("big.tar", [(f"k{n}", {"jpg": noise, "txt": b"t"}) for n in range(8)])
    url = f"{server.url}/big.tar"
    index = index_shards([url], reading=QUICK)
    assert server.sent["big.tar"] < path.stat().st_size / 4
    assert index.members["jpg"].tolist() == index_shards([str(path)]).members["jpg"].tolist()
    sent = server.sent["big.tar"]
    assert ShardReader(index).read(3, "jpg") == noise
    assert server.sent["big.tar"] - sent <= len(noise) + 4 * 512
    # The second start needs nothing of the shard, a changed one does.
    requests = server.requests["big.tar"]
    assert index_shards([url], reading=QUICK).fingerprint() == index.fingerprint()
    assert server.requests["big.tar"] == requests
    assert len(list(default_folder().iterdir())) == 1
    os.utime(path, ns=(1, 1))
    index_shards([url], reading=QUICK)
    assert server.requests["big.tar"] > requests


def test_small_members_are_streamed_in_large_blocks(
    server: ShardServer, make_shard: MakeShard
) -> None:
    samples = [(f"k{n:04d}", {"jpg": os.urandom(9_000), "txt": b"t"}) for n in range(400)]
    path = make_shard("many.tar", samples)
    assert len(index_shards([f"{server.url}/many.tar"], reading=QUICK)) == 400
    assert server.requests["many.tar"] <= 10
    assert server.sent["many.tar"] <= path.stat().st_size * 1.1


def test_a_shard_that_cannot_be_indexed_is_named(
    server: ShardServer, make_shard: MakeShard
) -> None:
    small(make_shard)
    with pytest.raises(ShardError, match=r"shard 'http://.*/1.tar' cannot be read \(HTTP 404\)"):
        index_shards([f"{server.url}/{n}.tar" for n in range(2)], reading=QUICK)
    make_shard("2.tar", [("a", {"txt": b"x"})])
    for fault, reason in ((500, "HTTP 500"), ("cut", "connection lost")):
        server.forever["2.tar"] = fault  # half of a tar is no tar that ends early
        with pytest.raises(ShardError, match=rf"shard 'http://.*/2.tar' cannot be read .{reason}"):
            index_shards([f"{server.url}/2.tar"], reading=QUICK)
    server.forever.clear()
    assert len(index_shards([f"{server.url}/2.tar"], reading=QUICK)) == 1


def test_a_server_without_ranges_is_told(server: ShardServer, make_shard: MakeShard) -> None:
    index = index_shards([str(small(make_shard))])
    server.ranges = False
    remote = replace(index, paths=(f"{server.url}/0.tar",), reading=QUICK)
    with pytest.raises(FieldError, match=r"^cannot be read \(the server sends no byte ranges\)$"):
        ShardReader(remote).read(0, "txt")


def test_addresses_are_expanded_and_listed(server: ShardServer) -> None:
    for name in ("0.tar", "1.tar", "notes.txt"):
        (server.folder / name).touch()
    expected = [f"{server.url}/0.tar", f"{server.url}/1.tar"]
    assert expand_shards(f"{server.url}/{{0..1}}.tar") == expected
    assert expand_shards(f"{server.url}/*.tar") == expected
    with pytest.raises(ShardError, match=r"no shard matches 'http.*/\*\.zip'; brace ranges"):
        expand_shards(f"{server.url}/*.zip")


@pytest.mark.parametrize("name", ["s3://bucket/{0..1}.tar", "gs://bucket/0.tar"])
def test_missing_packages_are_named(name: str) -> None:
    with pytest.raises(ShardError, match=r"needs the package (s3fs|gcsfs): pip install"):
        expand_shards(name)
