"""Indexes that are kept: when they are believed, and when they are built again."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from data_pipelines import sidecar
from data_pipelines.config import ReadingConfig
from data_pipelines.shards import ShardError, ShardReader, index_shards
from data_pipelines.sidecar import SUFFIX, default_folder, index_file
from data_pipelines.tar_headers import ShardPart

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
SAMPLES = [("a", {"jpg": b"x" * 700, "txt": b"one"}), ("\u00fc b/c", {"json": b"{}"})]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return default_folder()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards whose headers are read from now on."""
    found: list[str] = []
    real = sidecar.read_headers

    def read(path: str, *args: Any) -> ShardPart:
        found.append(os.path.basename(path))
        return real(path, *args)

    monkeypatch.setattr(sidecar, "read_headers", read)
    return found


def old_shard(make_shard: MakeShard, name: str = "0.tar") -> Path:
    path = make_shard(name, SAMPLES)
    os.utime(path, (time.time() - 60, time.time() - 60))
    return path


def same(one: ShardPart, other: ShardPart) -> bool:
    return (
        one.keys.tolist() == other.keys.tolist()
        and one.members.keys() == other.members.keys()
        and all(np.array_equal(table, other.members[ext]) for ext, table in one.members.items())
        and (one.size, one.complete) == (other.size, other.complete)
    )


def test_headers_are_read_once(make_shard: MakeShard, reads: list[str]) -> None:
    path = old_shard(make_shard)
    first = index_file(str(path))
    assert Path(f"{path}{SUFFIX}").is_file()
    second = index_file(str(path))
    assert reads == ["0.tar"]
    assert same(first, second)
    assert second.keys.tolist() == ["a", "\u00fc b/c"]
    index = index_shards([str(path)])
    assert ShardReader(index).read(0, "jpg") == b"x" * 700
    assert sorted(os.listdir(path.parent)) == ["0.tar", f"0.tar{SUFFIX}"]


def test_a_changed_shard_is_read_again(make_shard: MakeShard, reads: list[str]) -> None:
    path = old_shard(make_shard)
    index_file(str(path))
    make_shard("0.tar", SAMPLES[:1])  # the same size, another time
    assert index_file(str(path)).keys.tolist() == ["a"]
    # That index was made in the same moment as the shard, and is not believed the next time.
    assert index_file(str(path)).keys.tolist() == ["a"]
    assert reads == ["0.tar"] * 3
    path.write_bytes(path.read_bytes() + bytes(10240))
    assert index_file(str(path)).size == path.stat().st_size
    assert len(reads) == 4


def test_a_cut_shard_is_remembered_as_cut(make_shard: MakeShard, reads: list[str]) -> None:
    path = old_shard(make_shard)
    path.write_bytes(path.read_bytes()[:2600])
    os.utime(path, (1, 1))
    for _ in range(2):
        index = index_shards([str(path)])
        assert (len(index), index.truncated) == (1, (str(path),))
    assert reads == ["0.tar"]


def _other_format(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        record = json.loads(file.metadata()["record"])
    save_file(tensors, path, {"record": json.dumps(record | {"format": "0"})})


def _outside(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors["places"][0, 0] = (2**62, 2**62)
    save_file(tensors, path, metadata)


def _pickled(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {path}.owned",)

    path.write_bytes(pickle.dumps(Evil()))


@pytest.mark.parametrize(
    "harm",
    [
        _other_format,
        _outside,
        _pickled,
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: save_file({"places": np.zeros(3)}, path, {"record": "[1]"}),
        lambda path: save_file({"places": np.zeros(3)}, path),
    ],
)
def test_a_bad_sidecar_is_replaced(
    make_shard: MakeShard, reads: list[str], harm: Callable[[Path], object]
) -> None:
    path = old_shard(make_shard)
    first = index_file(str(path))
    harm(Path(f"{path}{SUFFIX}"))
    assert same(index_file(str(path)), first)
    assert same(index_file(str(path)), first)
    assert reads == ["0.tar"] * 2
    assert not list(path.parent.glob("*.owned"))


def test_a_folder_that_cannot_be_written_leaves_it_to_the_cache(
    make_shard: MakeShard, reads: list[str], cache: Path, tmp_path: Path
) -> None:
    path = old_shard(make_shard)
    Path(f"{path}{SUFFIX}").mkdir()  # refuses even the superuser
    index_file(str(path))
    assert same(index_file(str(path)), index_file(str(path)))
    assert [entry.name[:6] for entry in cache.iterdir()] == ["0.tar-"]
    own = tmp_path / "own"
    index_file(str(path), str(own))
    index_file(str(path), str(own))
    assert len(list(own.iterdir())) == 1
    assert reads == ["0.tar"] * 2


def test_without_any_place_everything_still_works(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = old_shard(make_shard)
    (tmp_path / "file").touch()
    assert len(index_file(str(path), str(tmp_path / "file" / "below")).keys) == 2


def test_processes_that_index_at_once_leave_a_whole_sidecar(make_shard: MakeShard) -> None:
    path = old_shard(make_shard)
    code = """
import pathlib, sys
from data_pipelines.sidecar import index_file
for _ in range(60):
    assert len(index_file(sys.argv[1]).keys) == 2
    pathlib.Path(sys.argv[1] + sys.argv[2]).unlink(missing_ok=True)
index_file(sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(path), SUFFIX]
    runs = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(os.listdir(path.parent)) == ["0.tar", f"0.tar{SUFFIX}"]


def test_names_that_are_no_text_stay_apart(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("\xe4.txt", "\xf6.txt", "../../up.txt", "/root.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
    os.utime(path, (1, 1))
    for _ in range(2):
        assert index_file(str(path)).keys.tolist() == ["\\xe4", "\\xf6", "../../up", "root"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"shard '.*gone.tar' cannot be read \(not found\)"):
        index_file(str(tmp_path / "gone.tar"), reading=ReadingConfig(attempts=2, backoff=0))
