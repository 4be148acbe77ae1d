"""Which bytes of a store are fetched where embeddings take the place of what a tower would read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.cached_embeddings import Side, embeddings_path, write_embeddings
from data_pipelines.config import AugmentationConfig, ImageTextConfig
from data_pipelines.image_text import image_text_stream
from data_pipelines.shards import ShardReader, index_shards
from tests.data_pipelines.http_server import ShardServer

COUNT, NOISE = 12, 100_000


@pytest.fixture
def url(
    server: ShardServer, make_shard: Callable[..., Path], picture: Callable[[int], bytes]
) -> str:
    """Samples with a large picture, a caption and a large record."""
    samples = [
        (f"k{n}", {
            "png": picture(n) + os.urandom(NOISE), "txt": b"caption %d" % n,
            "json": b'{"group": %d, "more": "%s"}' % (n, b"x" * NOISE),
        })
        for n in range(COUNT)
    ]  # fmt: skip
    make_shard("0.tar", samples)
    return f"{server.url}/0.tar"


@pytest.mark.parametrize(
    ("cached", "group_key", "members"),
    [
        (("image", "text"), None, ()),
        (("image", "text"), "json:group", ("json",)),
        (("image",), None, ("txt",)),
        (("text",), None, ("png",)),
        ((), "json:group", ("json", "png", "txt")),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_only_members_that_are_needed_are_fetched(
    server: ShardServer,
    url: str,
    tmp_path: Path,
    tokenize: Any,
    cached: tuple[Side, ...],
    group_key: str | None,
    members: tuple[str, ...],
    workers: int,
) -> None:
    index, folder = index_shards([url]), tmp_path / "embedded"
    folder.mkdir()
    for side in cached:
        path = embeddings_path(folder, index, 0, side)
        write_embeddings(path, torch.rand(COUNT, 4), [1] * COUNT, {}, {"dtype": "float32"})
    config = ImageTextConfig(
        shards=url,
        group_key=group_key,
        augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)),
        cached_image=str(folder) if "image" in cached else None,
        cached_text=str(folder) if "text" in cached else None,
    )
    stream = image_text_stream(
        config, image_size=8, tokenize=tokenize, seed=0, global_batch=6, workers=workers
    )
    before = server.sent["0.tar"], server.requests["0.tar"]
    batches = list(itertools.islice(stream.batches(), 2))  # an epoch
    sent, requests = server.sent["0.tar"] - before[0], server.requests["0.tar"] - before[1]
    assert {key for batch in batches for key in batch["key"]} == {f"k{n}" for n in range(COUNT)}
    assert all(f"{side}_embedding" in batch for batch in batches for side in cached)
    lengths = sum(index.members[ext][:, 1] for ext in members) if members else np.zeros(1, int)
    headers = 4096 * COUNT * max(0, len(members) - 1)  # and padding, between members
    needed = int(lengths.sum())
    if workers and members:  # they read ahead, by an unknown number of batches
        assert needed <= sent <= requests * (int(lengths.max()) + headers // COUNT)
        return
    assert needed <= sent <= needed + headers
    assert requests == (COUNT if members else 0)


def test_none_is_all_members_and_an_empty_list_none(server: ShardServer, url: str) -> None:
    index = index_shards([url])
    for members, fetched in ((None, True), ((), False), (("absent",), False)):
        reader, before = ShardReader(index, members), server.sent["0.tar"]
        reader.prefetch([0, 1])
        assert (server.sent["0.tar"] > before) is fetched
        assert reader.read(1, "txt") == b"caption 1"
    sent = server.sent["0.tar"]
    assert ShardReader(index, ["png"]).read(2, "txt") == b"caption 2"  # not announced: it alone
    assert server.sent["0.tar"] - sent == len(b"caption 2")
