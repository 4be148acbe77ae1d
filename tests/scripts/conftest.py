"""What several commands are tested with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from scripts import cache_embeddings
from tests.conftest import write_shard
from tests.scripts.cached_runs import (
    WORDS,
    cache_words,
    save_bert,
    save_trunk,
)


@pytest.fixture
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this process run on the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def world(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 1 to 3 captions a picture and two samples that cannot be used; both towers."""
    root = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0)
    from PIL import Image

    (root / "shards").mkdir()
    for shard in range(3):
        samples = {}
        for number in range(6):
            path = root / "picture.png"
            Image.fromarray(noise.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
            lines = [f"{word} line {shard} {number}" for word in ("first", "second", "")]
            samples[f"{shard}{number}"] = {
                "png": path.read_bytes(),
                "txt": "\n".join(lines[: 1 + number % 3]).encode(),
            }
        if shard == 1:
            samples["12"]["png"] = b"broken"
            samples["14"]["txt"] = b" "
        write_shard(root / "shards" / f"{shard}.tar", samples)
    save_trunk(root / "trunk.safetensors", 1)
    save_bert(root / "bert", 1, WORDS)
    return root


@pytest.fixture(scope="module")
def cached(world: Path) -> Path:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    cache_embeddings.main(cache_words(world, world / "cached"))
    return world / "cached"
