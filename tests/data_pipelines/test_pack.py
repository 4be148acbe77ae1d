"""Packing folders: what is in the shards, the same bytes always, and what cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_pipelines.pack as pack_module
from data_pipelines.classification import classification_stream
from data_pipelines.config import ClassificationConfig
from data_pipelines.decode import decode_rgb
from data_pipelines.emoji.prepare import SOURCE
from data_pipelines.ordered_map import ordered_map
from data_pipelines.pack import pack
from data_pipelines.pack_pictures import pack_picture
from data_pipelines.shard_writer import output_folder, part_of
from data_pipelines.shards import ShardError, ShardReader, index_shards
from data_pipelines.tool_config import PackConfig

PICTURES = 40


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions and records beside them, as files."""
    folder = tmp_path_factory.mktemp("emoji")
    with tarfile.open(SOURCE / "fluent-3d.tar.gz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            (folder / member.name).write_bytes(content.read())
            if len(list(folder.iterdir())) == 3 * PICTURES:
                break
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path, key: str) -> dict[str, bytes]:
    """All members of the sample with this key, by extension, from any shard of a folder."""
    reader = ShardReader(index_shards(sorted(map(str, folder.glob("*.tar")))))
    (sample,) = [n for n, name in enumerate(reader.index.keys) if name == key]
    found = {ext: reader.read(sample, ext) for ext in reader.index.members}
    return {ext: data for ext, data in found.items() if data is not None}


def test_a_process_is_at_nothing_once_it_has_read_its_chunk(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else its death would be put down to a sample that is not to blame."""
    during, after = list[str | None](), list[str | None]()

    def noting(function: Any, inputs: Any, workers: int, start: Any, at: Any) -> Iterator[Any]:
        for chunk in ordered_map(function, inputs, workers, start, at):
            after.append(at(os.getpid()))
            yield chunk

    def note(data: bytes, config: PackConfig) -> Any:
        during.append(packers[0]._at(os.getpid()))
        return pack_picture(data, config)

    packers: list[Any] = []
    build = pack_module._Packer.__init__

    def keep(packer: Any, *arguments: Any) -> None:
        packers.append(packer)
        build(packer, *arguments)

    monkeypatch.setattr(pack_module._Packer, "__init__", keep)
    monkeypatch.setattr(pack_module, "pack_picture", note)
    monkeypatch.setattr(pack_module, "ordered_map", noting)
    pack(PackConfig(str(emoji), str(tmp_path / "out")), workers=0)
    assert during == [f"'{path.name}'" for path in sorted(emoji.glob("*.webp"))]
    assert after == [None] * 3


def test_folder_of_captioned_pictures(emoji: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = pack(PackConfig(str(emoji), str(out), max_samples=15), workers=0)
    assert (summary.shards, summary.samples, summary.kept) == (3, PICTURES, 0)
    assert not summary.skipped
    assert json.loads((out / "sizes.json").read_text()) == {
        "00000.tar": 15, "00001.tar": 15, "00002.tar": 10,
    }  # fmt: skip
    pictures = sorted(emoji.glob("*.webp"))
    for number, path in enumerate(pictures):
        found = members(out, f"{number:09d}")
        assert found["webp"] == path.read_bytes()
        assert (
            found["txt"].decode().splitlines()
            == path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        )
        record = json.loads(found["json"])
        assert record["source"] == path.name
        assert (record["width"], record["height"]) == (64, 64)
        assert record["concept"] == json.loads(path.with_suffix(".json").read_bytes())["concept"]


@pytest.mark.parametrize("shuffle", [None, 3])
def test_bytes_depend_on_nothing_but_source_and_settings(
    emoji: Path, tmp_path: Path, shuffle: int | None
) -> None:
    """Another place, other dates, another order of files in the folder, other processes."""
    config = PackConfig(
        str(emoji), str(tmp_path / "a"), max_samples=9, shuffle=shuffle, shorter_side=40
    )
    pack(config, workers=0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(emoji.iterdir(), reverse=True):
        shutil.copyfile(path, copy / path.name)
        os.utime(copy / path.name, (1e9, 1e9))
    other = PackConfig(
        str(copy), str(tmp_path / "b"), max_samples=9, shuffle=shuffle, shorter_side=40
    )
    pack(other, workers=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_shuffle_is_a_permutation_that_stays(emoji: Path, tmp_path: Path) -> None:
    pack(PackConfig(str(emoji), str(tmp_path / "a"), shuffle=7), workers=0)
    names = [
        json.loads(members(tmp_path / "a", f"{place:09d}")["json"])["source"]
        for place in range(PICTURES)
    ]
    pictures = sorted(path.name for path in emoji.glob("*.webp"))
    assert sorted(names) == pictures
    assert names == [pictures[n] for n in np.random.RandomState(7).permutation(PICTURES)]


def test_limits_of_shards(emoji: Path, tmp_path: Path) -> None:
    limit = 60_000
    pack(PackConfig(str(emoji), str(tmp_path), max_samples=1000, max_bytes=limit), workers=0)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert len(sizes) > 2
    assert max(sizes) <= limit
    assert min(sizes[:-1]) > limit - 20_480  # one more sample would not have fitted
    one_each = tmp_path / "tiny"
    assert pack(PackConfig(str(emoji), str(one_each), max_bytes=1), 0).shards == PICTURES


def test_class_folders_train(emoji: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(emoji.glob("*.webp"))):
        folder = tmp_path / "source" / ("odd", "even ones")[number % 2 == 0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    out = tmp_path / "out"
    pack(PackConfig(str(tmp_path / "source"), str(out)), workers=0)
    names = (out / "classnames.txt").read_text(encoding="utf-8").splitlines()
    assert names == ["even ones", "odd"]
    assert members(out, "000000000")["cls"] == b"0"
    assert members(out, f"{PICTURES - 1:09d}")["cls"] == b"1"
    config = ClassificationConfig(str(out / "*.tar"), classnames=str(out / "classnames.txt"))
    stream = classification_stream(
        config, image_size=32, num_classes=2, seed=0, global_batch=PICTURES
    )
    batch = next(stream.batches())
    assert batch["image"].shape == (PICTURES, 3, 32, 32)
    assert sorted(batch["label"].tolist()) == [0] * 20 + [1] * 20


@pytest.fixture
def bad_folder(tmp_path: Path, emoji: Path, encode: Callable[..., bytes]) -> Path:
    """One good picture, and one of everything that can be wrong with one."""
    folder = tmp_path / "bad"
    folder.mkdir()
    good = next(iter(sorted(emoji.glob("*.webp")))).read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    jpeg = encode(Image.fromarray(noise), "JPEG")
    wide = encode(Image.new("L", (2001, 2000)), "PNG")
    contents = {
        "good": good, "cut": jpeg[: len(jpeg) // 2], "zero": b"", "text": b"no picture",
        "large": wide, "uncaptioned": good, "blank": good, "badjson": good, "listjson": good,
        "deepjson": good,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.webp").write_bytes(content)
        if name != "uncaptioned":
            (folder / f"{name}.txt").write_text(" \n\n" if name == "blank" else "a caption")
    (folder / "badjson.json").write_bytes(b'{"a": ')
    (folder / "listjson.json").write_bytes(b"[]")
    (folder / "deepjson.json").write_bytes(b'{"a":' * 3000 + b"1" + b"}" * 3000)
    (folder / "gone.webp").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.webp")
    (folder / "folder.webp").mkdir()
    return folder


def test_what_cannot_be_read_is_counted_with_its_reason(bad_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = pack(PackConfig(str(bad_folder), str(out), max_pixels=4_000_000), workers=0)
    assert summary.samples == 1
    record = json.loads((out / "00000_stats.json").read_text())
    assert record["skipped"] == {
        "cut.webp": "broken image",
        "zero.webp": "broken image",
        "text.webp": "broken image",
        "large.webp": "image over 4000000 pixels",
        "uncaptioned.webp": "no caption",
        "blank.webp": "no caption",
        "badjson.webp": "broken json",
        "listjson.webp": "json is no object",
        "deepjson.webp": "broken json",
        "gone.webp": "file missing",
        "pipe.webp": "no regular file",
    }
    assert record["count"] == record["successes"] + record["failed"] == 12
    assert summary.skipped.total() == 11


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    (tmp_path / "in" / "a.txt").write_text("caption")
    with pytest.raises(ShardError, match=r"no sample of .* can be used: 1 broken image"):
        pack(PackConfig(str(tmp_path / "in"), str(tmp_path / "out")), workers=0)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_damaged_shard_is_written_again_and_the_others_are_kept(
    emoji: Path, tmp_path: Path
) -> None:
    config = PackConfig(str(emoji), str(tmp_path), max_samples=8)
    pack(config, workers=0)
    whole = files(tmp_path)
    (tmp_path / "00001.tar").unlink()
    data = bytearray(whole["00003.tar"])
    data[700] ^= 1
    (tmp_path / "00003.tar").write_bytes(data)
    (tmp_path / ".00004.tar.part").write_bytes(b"half")  # what a kill leaves
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in ("00000.tar", "00002.tar")}
    time.sleep(0.01)
    assert pack(config, workers=0).kept == 3
    assert files(tmp_path) == whole
    assert kept == {name: (tmp_path / name).stat().st_mtime_ns for name in kept}


def test_a_folder_of_something_else_is_refused(emoji: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(PackConfig(str(emoji), str(out), max_samples=8), workers=0)
    before = files(out)
    with pytest.raises(ShardError, match=r"max_samples 8 \(now 9\)"):
        pack(PackConfig(str(emoji), str(out), max_samples=9), workers=0)
    copy = tmp_path / "copy"
    shutil.copytree(emoji, copy)
    next(iter(sorted(copy.glob("*.webp")))).unlink()
    with pytest.raises(ShardError, match="another source"):
        pack(PackConfig(str(copy), str(out), max_samples=8), workers=0)
    assert files(out) == before
    (out / "pack.json").unlink()
    with pytest.raises(ShardError, match="holds other shards"):
        pack(PackConfig(str(emoji), str(out), max_samples=8), workers=0)


def test_pictures_are_shrunken_upright_and_of_a_format_that_is_read(
    tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    # Left half red, right half blue, 80 x 40; with orientation 6 it stands, red above.
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40, 0] = pixels[:, 40:, 2] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(image, "JPEG", exif=exif, quality=95)
    contents = {
        "a.jpg": turned, "b.gif": encode(image, "GIF"), "c.png": encode(image, "JPEG"),
        "d.png": encode(image.resize((16, 8)), "PNG"),
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("caption")
    pack(PackConfig(str(folder), str(out), shorter_side=20), workers=0)
    upright = decode_rgb(members(out, "000000000")["jpg"])
    assert upright.shape == (3, 40, 20)
    assert upright[0, :15].min() > 200
    assert upright[2, 25:].min() > 200
    gif = decode_rgb(members(out, "000000001")["png"])
    assert gif.shape == (3, 20, 40)
    assert set(members(out, "000000002")) == {"jpg", "json", "txt"}  # by content, not by name
    assert members(out, "000000003")["png"] == contents["d.png"]  # small ones are copied
    pack(PackConfig(str(folder), str(tmp_path / "raw")), workers=0)
    assert members(tmp_path / "raw", "000000000")["jpg"] == turned
    pack(PackConfig(str(folder), str(tmp_path / "webp"), encode="webp", quality=80), workers=0)
    assert decode_rgb(members(tmp_path / "webp", "000000000")["webp"]).shape == (3, 80, 40)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "has no pictures"),
        ({"a.png": b""}, "neither .txt or .json files beside them nor"),
        ({"c.csv": b"path,words\na.png,b\n"}, "is no folder|no column|exist"),
    ],
)
def test_sources_that_cannot_be_packed(
    tmp_path: Path, layout: dict[str, bytes], message: str
) -> None:
    for name, content in layout.items():
        (tmp_path / name).write_bytes(content)
    source = tmp_path / "c.csv" if "c.csv" in layout else tmp_path
    with pytest.raises(ShardError, match=message):
        pack(PackConfig(str(source), str(tmp_path / "out")), workers=0)


def test_an_interrupt_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    part = part_of(tmp_path / "0.tar")

    def begin() -> None:
        with output_folder(tmp_path):
            part.touch()  # by a writer that has not come to the place where it would remove it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert not part.exists()
