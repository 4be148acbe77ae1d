"""Every kind of problem is found where it is, and a cleaned copy has none."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.classification import ClassNumbers
from data_pipelines.clean_copy import write_clean_copy
from data_pipelines.config import ReadingConfig
from data_pipelines.findings import KINDS, Validation
from data_pipelines.near_duplicates import brightness_steps, repeats_of_hashes
from data_pipelines.shard_stats import measure
from data_pipelines.shard_survey import Fields
from data_pipelines.shards import ShardError, ShardReader, index_shards
from data_pipelines.tool_config import StatsConfig, ValidateConfig
from data_pipelines.validate import SampleChecker, is_safe, validate

Picture = Callable[[int], bytes]


def write_tar(path: Path, entries: list[tuple[str, bytes | None]]) -> Path:
    """A tar with these members in this order; None makes a link."""
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def found(validation: Validation) -> set[tuple[str, str, str]]:
    """(kind, shard's name, key) of every finding."""
    return {(f.kind, Path(f.shard).name, f.key) for f in validation.findings}


def check(folder: Path, workers: int = 0, **settings: Any) -> Validation:
    return validate(ValidateConfig(str(folder), **settings), workers)


@pytest.fixture
def bad_shards(tmp_path: Path, picture: Picture, encode: Callable[..., bytes]) -> Path:
    """A folder of shards with one of each problem; `good` is the only sample without any."""
    folder = tmp_path / "shards"
    folder.mkdir()
    jpeg = encode(Image.fromarray(np.full((40, 40, 3), 90, np.uint8)), "JPEG")
    wide = encode(Image.new("L", (3000, 300)), "PNG")
    samples: dict[str, dict[str, bytes]] = {
        "good": {"png": picture(0), "txt": b"one", "cls": b"1"},
        "cut": {"jpg": jpeg[: len(jpeg) // 2], "txt": b"two", "cls": b"1"},
        "noise": {"jpg": b"no picture", "txt": b"two", "cls": b"1"},
        "wide": {"png": wide, "txt": b"three", "cls": b"1"},
        "line": {"png": encode(Image.new("RGB", (1, 90)), "PNG"), "txt": b"4", "cls": b"1"},
        "blank": {"png": picture(1), "txt": b" \n\t\n", "cls": b"1"},
        "latin": {"png": picture(2), "txt": b"caf\xe9", "cls": b"1"},
        "mute": {"png": picture(3), "cls": b"1"},
        "blind": {"txt": b"five", "cls": b"1"},
        "unlabelled": {"png": picture(4), "txt": b"six"},
        "named": {"png": picture(5), "txt": b"seven", "cls": b"cat"},
        "again": {"png": picture(6), "txt": b"eight", "cls": b"1"},
        "twin": {"png": picture(0), "txt": b"nine", "cls": b"1"},
        "../../climber": {"png": picture(7), "txt": b"ten", "cls": b"1"},
        "coded": {"png": picture(8), "txt": b"eleven", "cls": b"1", "pickle": b"\x80\x04."},
    }
    entries: list[tuple[str, bytes | None]] = [
        (f"{key}.{ext}", data) for key, parts in samples.items() for ext, data in parts.items()
    ]
    entries += [(f"again.{ext}", data) for ext, data in samples["again"].items()]
    entries += [("link.png", None), ("README", b"x"), ("._good.png", b"x")]
    entries += [("split.png", picture(9)), ("other.png", picture(10)), ("other.txt", b"twelve")]
    entries += [("other.cls", b"1"), ("split.txt", b"thirteen"), ("split.cls", b"1")]
    whole = write_tar(folder / "a.tar", entries).read_bytes()
    second = write_tar(
        tmp_path / "b.tar", [("b1.png", picture(11)), ("b1.txt", b"x"), ("b1.cls", b"2")]
    ).read_bytes()
    (folder / "cut.tar").write_bytes(second[:4000] + b"\xff" * 900)
    (folder / "empty.tar").write_bytes(write_tar(tmp_path / "none.tar", []).read_bytes())
    (folder / "gz.tar").write_bytes(gzip.compress(whole))
    (folder / "nothing.tar").write_bytes(b"")
    (folder / "text.tar").write_bytes(b"this is no tar file" * 60)
    return folder


EXPECTED = {
    ("broken_image", "a.tar", "cut"),
    ("broken_image", "a.tar", "noise"),
    ("huge_image", "a.tar", "wide"),
    ("tiny_image", "a.tar", "line"),
    ("empty_caption", "a.tar", "blank"),
    ("broken_caption", "a.tar", "latin"),
    ("missing_member", "a.tar", "mute"),
    ("missing_member", "a.tar", "blind"),
    ("missing_member", "a.tar", "unlabelled"),
    ("broken_label", "a.tar", "named"),
    ("duplicate_key", "a.tar", "again"),
    ("duplicate_image", "a.tar", "again"),
    ("scattered_members", "a.tar", "again"),
    ("duplicate_image", "a.tar", "twin"),
    ("unsafe_name", "a.tar", "../../climber"),
    ("pickle_member", "a.tar", "coded"),
    ("unread_member", "a.tar", "link.png"),
    ("unread_member", "a.tar", "README"),
    ("unread_member", "a.tar", "._good.png"),
    ("scattered_members", "a.tar", "split"),
    ("truncated_shard", "cut.tar", ""),
    ("empty_shard", "empty.tar", ""),
    ("broken_shard", "gz.tar", ""),
    ("broken_shard", "nothing.tar", ""),
    ("broken_shard", "text.tar", ""),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_is_found_and_nothing_else(bad_shards: Path, workers: int) -> None:
    validation = check(bad_shards, workers, max_pixels=800_000)
    assert found(validation) == EXPECTED
    assert {kind for kind, _, _ in EXPECTED} | {
        "near_duplicate",
        "unreadable",
        "miscounted_shard",
    } == set(KINDS)


def test_cleaned_copy_has_no_problems(bad_shards: Path, tmp_path: Path, picture: Picture) -> None:
    out = tmp_path / "clean"
    validation = check(bad_shards, max_pixels=800_000)
    assert write_clean_copy(validation, out) == (2, 6, {})
    assert json.loads((out / "sizes.json").read_text()) == {"a.tar": 5, "cut.tar": 1}
    assert check(out, max_pixels=800_000).findings == []
    reader = ShardReader(index_shards([str(out / "a.tar")]))
    assert list(reader.index.keys) == ["good", "again", "coded", "split", "other"]
    assert set(reader.index.members) == {"png", "txt", "cls"}
    assert reader.read(3, "png") == picture(9)
    assert reader.read(3, "txt") == b"thirteen"
    with pytest.raises(ShardError, match="holds shards already"):
        write_clean_copy(validation, out)
    with pytest.raises(ShardError, match="the folder of the shards"):
        write_clean_copy(validation, bad_shards)


def test_ignored_problems_are_kept(bad_shards: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ignore": ["duplicate_image", "duplicate_key", "tiny_image"]}
    validation = check(bad_shards, max_pixels=800_000, **settings)
    assert found(validation) == {entry for entry in EXPECTED if entry[0] not in settings["ignore"]}
    assert write_clean_copy(validation, tmp_path / "clean") == (2, 9, {})
    with pytest.raises(ValueError, match="no problem 'twins'"):
        check(bad_shards, ignore=["twins"])


def test_report_is_readable_and_json(bad_shards: Path) -> None:
    validation = check(bad_shards, max_pixels=800_000)
    report = json.loads(json.dumps(validation.as_json()))
    assert report["shards"] == 6
    assert report["problems"]["missing_member"] == 3
    assert len(report["findings"]) == len(EXPECTED)
    lines = "\n".join(validation.lines())
    assert "3000 x 300" in lines
    assert "1 x 90" in lines
    assert "as good in" in lines


def test_an_index_does_not_hide_damage(tmp_path: Path, picture: Picture) -> None:
    """A header that is damaged in place, size and date as before."""
    path = write_tar(tmp_path / "0.tar", [("a.png", picture(0)), ("a.txt", b"x"), ("b.txt", b"y")])
    os.utime(path, (1e9, 1e9))
    index_shards([str(path)])
    assert (tmp_path / "0.tar.index.safetensors").is_file()
    data = bytearray(path.read_bytes())
    data[data.index(b"b.txt") + 150] ^= 1  # its checksum
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    assert ("truncated_shard", "0.tar", "") in found(check(tmp_path))


def test_bytes_that_cannot_be_read(tmp_path: Path, picture: Picture) -> None:
    """A shard that shrinks after its headers were read."""
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"x"), ("a.png", picture(0))])
    index = index_shards([str(path)], reading=ReadingConfig(attempts=1))
    os.truncate(path, 2000)
    fields = Fields(["png"], "txt", None)
    checker = SampleChecker(index, fields, ValidateConfig(), ClassNumbers([]))
    assert [finding.kind for finding in checker.check([0]).findings] == ["unreadable"]


def test_names_that_are_no_text(tmp_path: Path, picture: Picture) -> None:
    members = [("caf\udce9.png", picture(0)), ("caf\udce9.txt", b"x"), ("b.txt", b"y")]
    validation = check(write_tar(tmp_path / "0.tar", [*members, ("b.png", picture(1))]))
    assert {kind for kind, _, _ in found(validation)} == {"unsafe_name"}
    validation.lines()
    json.dumps(validation.as_json()).encode()
    write_clean_copy(validation, tmp_path / "clean")
    assert check(tmp_path / "clean").findings == []


def test_duplicates_across_shards(tmp_path: Path, picture: Picture) -> None:
    write_tar(
        tmp_path / "0.tar",
        [("a.png", picture(0)), ("a.txt", b"x"), ("b.png", picture(1)), ("b.txt", b"y")],
    )
    write_tar(
        tmp_path / "1.tar",
        [("a.png", picture(2)), ("a.txt", b"x"), ("c.png", picture(1)), ("c.txt", b"y")],
    )
    assert found(check(tmp_path)) == {
        ("duplicate_key", "1.tar", "a"), ("duplicate_image", "1.tar", "c"),
    }  # fmt: skip


def test_near_duplicates(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    """The same smooth picture at another size and quality is found, others are not."""
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((96, 96), 3)
        for _ in range(6)
    ]
    contents = [encode(image, "PNG") for image in images]
    contents += [encode(images[2].resize((64, 64)), "JPEG", quality=80), b"broken", b"also broken"]
    entries: list[tuple[str, bytes | None]] = []
    for number, content in enumerate(contents):
        entries += [(f"{number}.png", content), (f"{number}.txt", b"caption")]
    write_tar(tmp_path / "0.tar", entries)
    validation = check(tmp_path, near_duplicates=5, ignore=["broken_image"])
    assert found(validation) == {("near_duplicate", "0.tar", "6")}
    assert "as 2 in" in validation.findings[0].detail


def test_labels_that_are_names(tmp_path: Path, picture: Callable[[int], bytes]) -> None:
    labels = [b"cat", b" dog\n", b"1", b"cow"]
    entries: list[tuple[str, bytes | None]]
    entries = [(f"{n}.cls", label) for n, label in enumerate(labels)]
    entries += [(f"{n}.png", picture(n)) for n in range(4)]
    write_tar(tmp_path / "0.tar", sorted(entries))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    options: dict[str, Any] = {"ignore": ["tiny_image"]}
    named = check(tmp_path, **options, classnames=str(tmp_path / "names.txt"))
    assert found(named) == {("broken_label", "0.tar", "3")}
    unnamed = found(check(tmp_path, **options))
    assert unnamed == {("broken_label", "0.tar", key) for key in "013"}
    config = StatsConfig(str(tmp_path), classnames=str(tmp_path / "names.txt"))
    tally = measure(config, 0).tally
    assert tally.labels == {0: 1, 1: 2}
    assert tally.unreadable == {"label is no integer": 1}


def test_near_pairs_equal_those_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 40).tolist()
    hashes = [
        value ^ sum(1 << int(b) for b in rng.choice(63, n, False))
        for value in base
        for n in range(6)
    ]
    rng.shuffle(hashes)
    for distance in range(8):
        kept: list[int] = []
        expected = []
        for row, value in enumerate(hashes):
            near = [k for k in kept if (hashes[k] ^ value).bit_count() <= distance]
            if near:
                expected.append((row, near[0]))
            else:
                kept.append(row)
        assert repeats_of_hashes(hashes, distance) == expected


def test_brightness_steps() -> None:
    ramp = np.repeat(np.arange(0, 234, 26, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    assert brightness_steps(Image.fromarray(ramp)) == 2**64 - 1
    assert brightness_steps(Image.fromarray(ramp[:, ::-1].copy())) == 0


@pytest.mark.parametrize(
    ("name", "safe"),
    [("a/b", True), ("a..b", True), ("/a", False), ("a/../b", False), ("..\\a", False),
     ("c:\\a", False), ("a\x1b[2J", False), ("日本", True)],
)  # fmt: skip
def test_names_that_leave_the_folder(name: str, safe: bool) -> None:
    assert is_safe(name) == safe


def test_shards_without_captions_or_labels_ask_for_a_field(
    tmp_path: Path, picture: Picture
) -> None:
    write_tar(tmp_path / "0.tar", [("a.png", picture(0)), ("a.json", b'{"caption": ["", "b"]}')])
    with pytest.raises(ShardError, match="set --caption_key"):
        check(tmp_path)
    assert check(tmp_path, caption_key="json:caption").findings == []
    assert found(check(tmp_path, caption_key="json:text")) == {("broken_caption", "0.tar", "a")}
