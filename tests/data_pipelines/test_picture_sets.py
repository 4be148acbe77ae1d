"""Sets of pictures from folders and shards: what is in them, and when they count as the same."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data_pipelines import picture_sets
from data_pipelines.decode import decode_rgb
from data_pipelines.errors import LoaderError
from data_pipelines.picture_sets import PictureSet, open_picture_set
from data_pipelines.transforms import eval_transform
from tests.conftest import write_shard

KEYS = ["jpg", "png"]


def png(colour: str, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def open_set(source: Path | str, **options: object) -> PictureSet:
    return open_picture_set(str(source), eval_transform(4), image_keys=KEYS, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.PNG").write_bytes(png("red"))
    (root / "b.txt").write_text("\ufeffa red one\n\n  another  \n", encoding="utf-8")
    (root / "a.jpg").write_bytes(b"no picture")
    (root / "deep" / "c.png").write_bytes(png("blue"))
    (root / "large.png").write_bytes(png("white", (100, 100)))
    (root / ".hidden" / "d.png").write_bytes(png("green"))
    (root / "notes.md").write_text("no picture")
    (root / "gone.png").symlink_to(root / "none.png")
    return root


def test_a_loader_that_dies_is_one_error(folder: Path) -> None:
    found: Any = open_set(folder)
    found.transform = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LoaderError, match=r"^a loader process has died \(pid \d+\): it was killed"):
        list(found.batches(2, workers=1))


def test_a_folder_of_pictures(folder: Path) -> None:
    found = open_set(folder, max_pixels=5000)
    assert len(found) == 4
    assert [found.captions(number) for number in range(4)] == [
        [], ["a red one", "another"], [], []
    ]  # fmt: skip
    images, numbers, skipped = zip(*found.batches(2), strict=True)
    assert numbers == ([1], [2])
    assert sum(skipped, Counter()) == {"broken image": 1, "image over 5000 pixels": 1}
    for picture, colour in zip(torch.cat(images), ([255, 0, 0], [0, 0, 255]), strict=True):
        assert picture.shape == (3, 4, 4)
        assert picture[:, 1, 1].tolist() == colour
    assert found.read(2) == (folder / "deep" / "c.png").read_bytes()


def test_shards(tmp_path: Path) -> None:
    samples = {
        "0": {"png": png("red"), "txt": b"red\nscarlet", "json": b'{"title": "r"}'},
        "1": {"png": png("blue")},
        "2": {"txt": b"no picture"},
    }
    write_shard(tmp_path / "a.tar", samples)
    for source in (tmp_path, tmp_path / "*.tar"):
        found = open_set(source)
        assert [found.captions(number) for number in range(3)] == [
            ["red", "scarlet"], [], ["no picture"]
        ]  # fmt: skip
        ((images, numbers, skipped),) = found.batches(8)
        assert numbers == [0, 1]
        assert skipped == {"no image member": 1}
        assert images[1, :, 0, 0].tolist() == [0, 0, 255]
        assert decode_rgb(found.read(0))[:, 0, 0].tolist() == [255, 0, 0]
    assert open_set(tmp_path, caption_key="json:title").captions(0) == ["r"]
    for key in (None, "text"):
        assert open_set(tmp_path, caption_key=key).captions(0) == []


@pytest.mark.parametrize("cheap", [True, False])
def test_sets_are_the_same_when_their_files_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap: bool
) -> None:
    if not cheap:
        monkeypatch.setattr(picture_sets, "CHEAP_BYTES", 0)
    first = open_set(folder).fingerprint()
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    assert open_set(moved).fingerprint() == first
    (moved / "b.txt").write_text("other words")
    assert open_set(moved).fingerprint() == first
    path = moved / "b.PNG"
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if cheap else 1)))
    assert open_set(moved).fingerprint() != first


def test_sources_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without pictures or \.tar shards"):
        open_set(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_set(tmp_path / "none" / "*.tar")
    write_shard(tmp_path / "a.tar", {"0": {"txt": b"words"}})
    with pytest.raises(ValueError, match="member for the picture"):
        open_set(tmp_path)
