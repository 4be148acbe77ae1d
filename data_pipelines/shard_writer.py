"""Writing shards: the same samples give the same bytes; a shard is there whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipelines.shards import ShardError
from data_pipelines.turns import take_lock

PART = ".part"


class ShardWriter:
    """Writes one tar beside its place, as a context manager; a clean end puts it there.

    Dates, owners and modes are constants, so the bytes depend on nothing but keys and contents.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, part_of(path)
        self.samples = 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        self._file = self.part.open("wb")
        # GNU format: names of any length, and every reader of tar knows it.
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes | bytearray]) -> None:
        """Append a sample, its members in the order of their extensions."""
        assert self._tar is not None
        for extension in sorted(members):
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(members[extension])
            self._tar.addfile(entry, io.BytesIO(members[extension]))
        self.samples += 1

    def size_with(self, members: Mapping[str, bytes]) -> int:
        """Bytes of the tar if `members` were added, names within 100 bytes."""
        assert self._tar is not None
        end = self._tar.offset + sum(map(member_size, members.values())) + 2 * tarfile.BLOCKSIZE
        return -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._tar is not None
        try:
            if kind is None:
                self._tar.close()
                put_in_place(self._file, self.part, self.path)
        finally:
            self._file.close()
            self.part.unlink(missing_ok=True)


def member_size(data: bytes) -> int:
    """Bytes that a member takes in a tar."""
    return tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE))


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name; no shard pattern finds it."""
    return path.with_name(f".{path.name}{PART}")


def put_in_place(file: io.BufferedWriter, part: Path, path: Path) -> None:
    """Flush `file`, written as `part`, and rename it to `path`."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON by `write_atomic`."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    part = part_of(path)
    try:
        with part.open("wb") as file:
            file.write(data)
            put_in_place(file, part, path)
    finally:
        part.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def output_folder(out: Path) -> Iterator[int]:
    """Make the folder, keep other writers out of it, and remove what one left half-done.

    Yields the descriptor that holds the lock. Child processes that were forked must close it, or
    the lock would outlive a kill of this process.

    Raises:
        ShardError: another process writes there, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ShardError(f"'{out}' is a file: name a folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not take_lock(descriptor):
            raise ShardError(f"another process is writing to '{out}': wait for it to end")
        _remove_parts(out)
        try:
            yield descriptor
        finally:
            # An interrupt may come after a file was made and before its writer could remove it.
            _remove_parts(out)
    finally:
        os.close(descriptor)


def _remove_parts(out: Path) -> None:
    for left in out.glob(f".*{PART}"):
        left.unlink(missing_ok=True)
