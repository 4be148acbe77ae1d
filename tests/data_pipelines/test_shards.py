"""Finding shards, indexing them, and reading members by position."""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import shard_reader
from data_pipelines.config import ReadingConfig
from data_pipelines.shards import (
    MAX_EXTENSIONS,
    MAX_MEMBER_BYTES,
    FieldError,
    ShardError,
    ShardIndex,
    ShardReader,
    describe_skips,
    expand_shards,
    index_shards,
    split_name,
)

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
THREE = [(key, {"jpg": key.encode() * 300, "txt": b"about " + key.encode()}) for key in "abc"]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def contents(index: ShardIndex) -> list[tuple[str, dict[str, bytes]]]:
    reader, found = ShardReader(index), []
    for sample, key in enumerate(index.keys):
        members = {ext: reader.read(sample, ext) for ext in index.members}
        found.append((str(key), {e: data for e, data in members.items() if data is not None}))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/00.tar", "a/01.tar", "a/02.tar", "b/[x].tar", "b/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "folder.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/01.tar", ["a/01.tar"]),
        ("a/{00..02}.tar", ["a/00.tar", "a/01.tar", "a/02.tar"]),
        ("a/{02,00}.tar", ["a/02.tar", "a/00.tar"]),
        ("a/*.tar", ["a/00.tar", "a/01.tar", "a/02.tar"]),
        ("a/0[12].tar", ["a/01.tar", "a/02.tar"]),
        ("b/[x].tar", ["b/[x].tar"]),
        ("b/[x].tar::{R}/a/{00..01}.tar", ["b/[x].tar", "a/00.tar", "a/01.tar"]),
    ],
)
def test_patterns_name_files(folder: Path, pattern: str, names: list[str]) -> None:
    root = str(folder)
    found = expand_shards(f"{root}/{pattern.replace('{R}', root)}")
    assert found == [f"{root}/{name}" for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "no shards given.* set data.shards"),
        ("{R}/a/00.tar::", "no shards given"),
        ("{R}/no/*.tar", "'{R}/no/.*.tar': the folder '{R}/no' does not exist"),
        ("{R}/a/{01..04}.tar", "'{R}/a/{01..04}.tar': '{R}/a' holds 4 .tar.*not '{R}/a/03.tar'"),
        ("{R}/b/*.tar.gz", "'{R}/b/.*': '{R}/b' holds 1 .tar files, but not"),
        ("{R}/a/folder.tar", "but not '{R}/a/folder.tar'"),
        ("{R}/a/{00..02.tar", "'{R}/a/{00..02.tar' is malformed"),
        ("ftp://host/{00..02}.tar", "'ftp://host/.*' cannot be read: only files and .*s3://"),
        ("pipe:cat {R}/a/00.tar", "only files are read"),
    ],
)
def test_wrong_patterns_are_explained(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(ShardError) as caught:
        expand_shards(pattern.replace("{R}", str(folder)))
    expected = message.replace("{R}", re.escape(str(folder))).replace("{0", r"\{0")
    assert re.search(expected, str(caught.value))


def test_offsets_give_the_bytes(make_shard: MakeShard) -> None:
    other = [("sub.dir/d", {"png": b"", "JSON": b"{}", "seg.png": b"1" * 513})]
    paths = [str(make_shard("0.tar", THREE)), str(make_shard("1.tar", []))]
    paths.append(str(make_shard("2.tar", other)))
    index = index_shards(paths)
    assert contents(index) == [
        *THREE,
        ("sub.dir/d", {"json": b"{}", "png": b"", "seg.png": b"1" * 513}),
    ]
    assert len(index) == 4
    assert index.sizes.tolist() == [3, 0, 1]
    assert index.truncated == ()
    assert [ShardReader(index).shard_of(n) for n in range(4)] == [*paths[:1] * 3, paths[2]]


def test_the_same_key_in_two_shards_is_two_samples(make_shard: MakeShard) -> None:
    index = index_shards([str(make_shard("0.tar", THREE)), str(make_shard("1.tar", THREE))])
    assert contents(index) == THREE * 2


def test_members_need_not_be_adjacent(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "b.txt", "a.txt", "c.jpg", "c.jpg", "c.txt"]
    path = write_tar(tmp_path / "x.tar", [(n, b"%d" % i) for i, n in enumerate(names)])
    assert contents(index_shards([str(path)])) == [
        ("a", {"jpg": b"0", "txt": b"3"}),
        ("b", {"jpg": b"1", "txt": b"2"}),
        ("c", {"jpg": b"4"}),
        ("c", {"jpg": b"5", "txt": b"6"}),
    ]


def test_what_is_no_member_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (
            tarfile.DIRTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.GNUTYPE_SPARSE,
        ):
            entry = tarfile.TarInfo("a.jpg")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        for name in ("._a.jpg", "sub/.DS_Store", "README", "a.jpg"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"ok"))
    index = index_shards([str(path)])
    assert contents(index) == [("a", {"jpg": b"ok"})]
    assert index.truncated == ()


def test_split_name() -> None:
    assert split_name("x.y/00.Seg.PNG") == ("x.y/00", "seg.png")
    assert split_name("./00.jpg") == ("./00", "jpg")
    assert split_name("x.y/00")[1] == split_name("x/.jpg")[1] == ""


def test_dots_in_keys_are_refused(tmp_path: Path) -> None:
    members = [(f"v1.{number}.jpg", b"x") for number in range(MAX_EXTENSIONS + 1)]
    path = str(write_tar(tmp_path / "x.tar", members))
    with pytest.raises(ShardError, match=r"x\.tar.* keys must not contain dots; rename"):
        index_shards([path])
    write_tar(tmp_path / "x.tar", members[1:])
    assert len(index_shards([path]).members) == MAX_EXTENSIONS


def test_a_cut_shard_keeps_its_complete_samples(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{k}.{ext}", data) for k, members in THREE for ext, data in members.items()])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [(m.name[0], m.offset + 512, m.offset_data + m.size) for m in tar]
    last = ends[-1][1] + 512
    assert len(whole) > last + 512
    for cut in range(0, len(whole), 61):
        path.write_bytes(whole[:cut])
        broken = {key for key, header, end in ends if header <= cut < end}
        started = {key for key, header, end in ends if end <= cut}
        expected = [key for key in "abc" if key in started - broken]
        if not expected:
            with pytest.raises(ShardError, match=r"no sample|not a tar file"):
                index_shards([str(path)])
            continue
        index = index_shards([str(path)])
        assert [key for key, _ in contents(index)] == expected, cut
        assert all(members.items() <= dict(THREE)[k].items() for k, members in contents(index))
        assert index.truncated == ((str(path),) if cut < last + 512 else ()), cut


def test_a_cut_repetition_spares_the_first_of_its_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("a.jpg", b"3" * 9)])
    path.write_bytes(path.read_bytes()[: 5 * 512 + 4])
    assert contents(index_shards([str(path)])) == [("a", {"jpg": b"1", "txt": b"2"})]


def test_damage_in_the_middle_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"?" * 20 + whole[1044:])
    index = index_shards([str(path)])
    assert (contents(index), index.truncated) == ([("a", {"jpg": b"1"})], (str(path),))
    path.write_bytes(whole + whole)  # most tar programs read only the first of the two
    assert index_shards([str(path)]).truncated == (str(path),)


def test_a_negative_size_ends_the_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo("b.jpg")
    header.size = -1024
    data[1024:1536] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    index = index_shards([str(path)])
    assert (contents(index), index.truncated) == ([("a", {"jpg": b"1"})], (str(path),))


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardError, match=r"x\.tar' is compressed: unpack it"):
        index_shards([str(path)])


@pytest.mark.parametrize("content", [b"hello", b"\xff" * 5000])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"x\.tar' is not a tar file"):
        index_shards([str(path)])


def test_an_empty_file_is_reported(make_shard: MakeShard, tmp_path: Path) -> None:
    (tmp_path / "1.tar").touch()
    paths = [str(make_shard("0.tar", THREE)), str(tmp_path / "1.tar")]
    assert index_shards(paths).truncated == (paths[1],)
    with pytest.raises(ShardError, match=r"no sample in any of 1 shards.*1\.tar"):
        index_shards(paths[1:])


def test_missing_members_are_named(make_shard: MakeShard) -> None:
    index = index_shards([str(make_shard(f"{n}.tar", THREE)) for n in range(3)])
    index.require("picture", ["webp", "jpg"])
    with pytest.raises(ShardError) as caught:
        index.require("picture", ["webp", "png"])
    message = r"0\.tar' and 2 more shards has a member for the picture: looked for webp, png;"
    assert re.search(message + r" the shards hold: jpg, txt$", str(caught.value))


def test_the_fingerprint_follows_names_sizes_and_keys(make_shard: MakeShard) -> None:
    def fingerprint(name: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> str:
        return index_shards([str(make_shard(name, samples))]).fingerprint()

    one = fingerprint("one/0.tar", THREE[:2])
    assert one == fingerprint("two/0.tar", THREE[:2])
    others = {
        fingerprint("one/0.tar", THREE),
        fingerprint("one/1.tar", THREE[:2]),
        fingerprint("one/0.tar", THREE[1:]),  # other keys, the same size
        fingerprint("one/0.tar", [("a", {"jpg": b"x" * 20_000}), ("b", {"jpg": b""})]),
    }
    assert len({one} | others) == 5


def test_a_member_over_the_limit_is_not_read(make_shard: MakeShard) -> None:
    index = index_shards([str(make_shard("0.tar", THREE))])
    reader = ShardReader(index)
    assert reader.read(0, "jpg", limit=300) == b"a" * 300
    with pytest.raises(FieldError, match=r"^jpg member over 299 bytes$"):
        reader.read(0, "jpg", limit=299)
    index.members["jpg"][1, 1] = MAX_MEMBER_BYTES + 1
    with pytest.raises(FieldError, match=f"^jpg member over {MAX_MEMBER_BYTES} bytes$"):
        reader.read(1, "jpg")


def test_few_files_are_open_at_once(make_shard: MakeShard) -> None:
    paths = [str(make_shard(f"{n:03d}.tar", [(f"{n}", {"txt": b"%d" % n})])) for n in range(70)]
    reader = ShardReader(index_shards(paths))
    before = len(os.listdir("/dev/fd"))
    for _ in range(2):
        assert [reader.read(n, "txt") for n in range(70)] == [b"%d" % n for n in range(70)]
    assert len(os.listdir("/dev/fd")) - before == 64
    for descriptor in reader._files.values():
        os.close(descriptor)


def test_a_reader_travels_without_its_files(make_shard: MakeShard) -> None:
    reader = ShardReader(index_shards([str(make_shard("0.tar", THREE))]))
    assert reader.read(1, "txt") == b"about b"
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._files == {}
    assert copy.read(2, "txt") == b"about c"
    assert copy.read(2, "json") is None


def test_fetching_ahead_changes_nothing_that_is_read(tmp_path: Path) -> None:
    """Members apart, absent, empty and large, asked for in any order, of this and of other samples;
    within a budget of bytes."""
    rng = np.random.default_rng(0)
    entries: list[tuple[str, bytes]] = []
    for number in range(40):
        members = [("jpg", rng.bytes(int(rng.integers(0, 3000)))), ("txt", rng.bytes(9))]
        members += [("npy", rng.bytes(200_000))] if number % 7 == 0 else []
        members += [("cls", b"")] if number % 5 else []
        entries += [(f"{number}.{ext}", data) for ext, data in members]
    late = entries[40:44]  # far from the rest of their samples
    path = write_tar(tmp_path / "0.tar", [e for e in entries if e not in late] + late)
    index = index_shards([str(path)])
    expected = {tuple(name.split(".")): data for name, data in entries}
    for members in (None, (), ("jpg", "txt", "absent"), ("npy", "jpg")):
        reader = ShardReader(index, members)
        for start in range(0, 40, 8):
            chunk = [int(n) for n in rng.permutation(40)[:8]] if start else list(range(8))
            reader.prefetch(chunk)
            for sample in [*chunk, 39, chunk[0]]:
                for ext in rng.permutation(["txt", "jpg", "npy", "cls"]):
                    wanted = expected.get((str(index.keys[sample]), str(ext)))
                    assert reader.read(sample, str(ext)) == wanted
    large = next(n for n in range(40) if len(expected[str(index.keys[n]), "jpg"]) > 10)
    reader.prefetch([large])
    with pytest.raises(FieldError, match="jpg member over 10 bytes"):
        reader.read(large, "jpg", 10)


def test_what_is_fetched_ahead_is_bounded(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [(f"{n}", {"jpg": bytes([n]) * 1000, "txt": b"t"}) for n in range(20)]
    reading = ReadingConfig(attempts=1)
    index = index_shards([str(make_shard("0.tar", samples))], reading=reading)
    monkeypatch.setattr(shard_reader, "PREFETCHED_BYTES", 10_000)
    reader = ShardReader(index, ("jpg", "txt"))
    reader.prefetch(range(20))
    os.truncate(index.paths[0], 0)  # what is held can still be read, the rest not
    held = 0
    for sample in range(20):
        with suppress(FieldError):
            assert reader.read(sample, "jpg") == bytes([sample]) * 1000
            held += 1
    assert 2 <= held <= 10


def test_describe_skips() -> None:
    assert describe_skips(Counter(["x"])) == "1 sample skipped: 1 x"
    assert describe_skips(Counter("xyy")) == "3 samples skipped: 2 y, 1 x"
