"""Shards that are broken or made to harm: real bytes, through the index and the stream."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shard_fuzz import fuzz
from data_pipelines.config import AugmentationConfig, ImageTextConfig
from data_pipelines.image_text import image_text_stream
from data_pipelines.shards import ShardError, index_shards


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = len(data), kind
    tar.addfile(entry, io.BytesIO(data))


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def epoch(path: Path, tokenize: Any, **options: Any) -> tuple[list[str], Counter[str]]:
    """Keys of one epoch, and reasons of skips."""
    config = ImageTextConfig(
        shards=str(path),
        shuffle=False,
        max_skipped=1.0,
        augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)),
        **options,
    )
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=0, global_batch=1)
    batches = list(itertools.islice(stream.batches(), len(stream)))
    skipped = Counter(reason for batch in batches for reason in batch["skipped"])
    return [batch["key"][0] for batch in batches if not batch["skipped"]], skipped


@pytest.mark.parametrize("cut", [2, 5, 9, 15, 40, 200])
def test_a_cut_gzip_is_refused_with_a_remedy(tmp_path: Path, picture: Any, cut: int) -> None:
    plain = write(tmp_path / "x.tar", [("a.png", picture(1)), ("a.txt", b"words")])
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(plain.read_bytes())[:cut])
    with pytest.raises(ShardError, match=r"x\.tar\.gz' is compressed: unpack it first \(gunzip\)"):
        index_shards([str(path)])


def test_harmful_members_stay_bytes(tmp_path: Path, picture: Any, tokenize: Any) -> None:
    mark = tmp_path / "owned"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {mark}",)

    evil = pickle.dumps(Evil())
    names = ("pyd", "pickle", "pkl", "pth", "pt", "npy", "cbor", "mp", "ten")
    members = [("../../up.png", picture(1)), ("../../up.txt", b"words")]
    members += [(f"../../up.{ext}", evil) for ext in names]
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    keys, skipped = epoch(write(folder / "x.tar", members), tokenize)
    assert (keys, skipped) == (["../../up"], Counter())
    assert sorted(os.listdir(tmp_path)) == ["deep"]
    assert not mark.exists()
    epoch(folder / "x.tar", tokenize, caption_key="pickle")  # even where such a member is asked for
    assert not mark.exists()


def test_every_broken_sample_has_a_reason(tmp_path: Path, picture: Any, tokenize: Any) -> None:
    good = picture(1)
    samples = {
        "good": (good, b'{"c": "words", "n": NaN, "i": Infinity}'),
        "nan": (good, b'{"c": NaN}'),
        "cut": (good, b'{"c": "wor'),
        "deep": (good, b"[" * 100_000),
        "bytes": (good, b'{"c": "w\xff\xfe"}'),
        "empty": (good, b'{"c": "  "}'),
        "nothing": (good, b""),
        "blank": (b"", b'{"c": "words"}'),
        "text": (b"no picture", b'{"c": "words"}'),
        "half": (good[:80], b'{"c": "words"}'),
    }
    members = [
        (f"{key}.{ext}", data)
        for key, pair in samples.items()
        for ext, data in zip(("png", "json"), pair, strict=True)
    ]
    members += [("nojson.png", good), ("noimage.json", b'{"c": "words"}')]
    # All pictures last: members of a sample need not be neighbours.
    members.sort(key=lambda member: member[0].endswith("png"))
    keys, skipped = epoch(write(tmp_path / "x.tar", members), tokenize, caption_key="json:c")
    assert sorted(keys) == ["bytes", "good"]
    assert skipped.keys() == {
        "no caption", "broken json member", "broken image", "no json member", "no image member",
    }  # fmt: skip
    assert skipped.total() >= len(samples) - 2 + 2


def test_duplicate_keys_are_samples_of_their_own(
    tmp_path: Path, picture: Any, tokenize: Any
) -> None:
    members = [("a.png", picture(1)), ("a.txt", b"one"), ("a.png", picture(2)), ("a.txt", b"two")]
    assert epoch(write(tmp_path / "x.tar", members), tokenize) == (["a", "a"], Counter())


def nested(path: Path, kind: bytes, times: int) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a.txt", b"x")
        for _ in range(times):
            add(tar, "././@LongLink", b"name\0", kind)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_headers_that_nest_for_ever_end_the_shard(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    nested(path, kind, 3000)
    index = index_shards([str(path)])
    assert index.keys.tolist() == ["a"]
    assert index.truncated == (str(path),)


def test_headers_of_absurd_sizes_cost_nothing(tmp_path: Path) -> None:
    """A long name of eight gigabytes in a file that has them, as a hole."""
    path = write(tmp_path / "x.tar", [("a.txt", b"x")])
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate(9 << 30)
    index = index_shards([str(path)])
    assert (index.keys.tolist(), index.truncated) == (["a"], (str(path),))


@pytest.mark.parametrize(
    "record", [b"99 size=-1024\n", b"20 size=99999999999\n", b"x=1\n", b"\xff"]
)
def test_extended_headers_may_hold_anything(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "a.txt", b"x")
        add(tar, "pax", record, tarfile.XHDTYPE)
        add(tar, "b.txt", b"x")
    assert "a" in index_shards([str(path)]).keys.tolist()


def test_mutated_shards_are_accounted_for(tmp_path: Path) -> None:
    outcomes, _ = fuzz(150, seed=1, folder=tmp_path)
    assert outcomes.total() == 150
    assert min(outcomes["whole"], outcomes["cut"], outcomes["refused"]) > 0
