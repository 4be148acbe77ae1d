"""Tiny real shards and pictures for the data pipeline tests."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from tests.data_pipelines.http_server import ShardServer

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]


@pytest.fixture
def make_shard(tmp_path: Path) -> MakeShard:
    """Write samples, (key, {extension: bytes}), to a named tar below tmp_path."""

    def write(name: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with TarWriter(str(path), encoder=False) as writer:
            for key, members in samples:
                writer.write({"__key__": key} | members)
        return path

    return write


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Bytes of a Pillow image in a format."""

    def write(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return write


@pytest.fixture(scope="session")
def picture(encode: Callable[..., bytes]) -> Callable[[int], bytes]:
    """A PNG of 20 x 16 noisy pixels, another for each number."""

    def draw(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 3), np.uint8)
        return encode(Image.fromarray(pixels), "PNG")

    return draw


@pytest.fixture(scope="session")
def tokenize() -> Callable[[list[str]], Tensor]:
    """Code points, padded with zeros: texts to int64 (B, 32)."""

    def codes(texts: list[str]) -> Tensor:
        rows = [[ord(letter) for letter in text[:32].ljust(32, "\0")] for text in texts]
        return torch.tensor(rows)

    return codes


@pytest.fixture
def captioned(make_shard: MakeShard, picture: Callable[[int], bytes]) -> str:
    """Pattern of three shards with 7, 1 and 12 good samples, each with three captions."""
    sizes, number = (7, 1, 12), 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            caption = "\n".join(f"{word} {number}" for word in ("one", "two", "three"))
            members = {"png": picture(number), "txt": caption.encode(), "cls": b"%d" % number}
            samples.append((f"k{number:02d}", members))
            number += 1
        made = make_shard(f"captioned/{shard:04d}.tar", samples)
    return str(made.parent / "{0000..0002}.tar")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    """Serves the files below tmp_path; their sidecars go there, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ShardServer(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()
