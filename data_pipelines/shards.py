"""Finding webdataset shards and knowing where every sample in them lies.

A shard is a plain tar file in which the members of one sample stand next to each other and share
the name up to the first dot (img2dataset's layout: `000012.jpg`, `000012.txt`, `000012.json`).
The index holds the offset and length of every member, so that any sample can be read on its own.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls


class ShardError(ValueError):
    """Shards that cannot be used; the message says which, why, and what to do."""


def expand_shards(pattern: str) -> list[str]:
    """Shard paths named by `pattern`: brace ranges, `*` globs, several joined by `::`.

    Raises:
        ShardError: nothing matches, or a named file is missing.
    """
    if not pattern:
        raise ShardError("no shards given: set data.shards, for example 'data/{0000..0099}.tar'")
    paths: list[str] = []
    for source in pattern.split("::"):
        for name in expand_urls(source):
            found = sorted(glob.glob(name)) if any(c in name for c in "*?[") else [name]
            missing = [path for path in found if not os.path.isfile(path)]
            if not found or missing:
                raise ShardError(_missing_message(source, missing[0] if missing else name))
            paths += found
    return paths


def _missing_message(source: str, name: str) -> str:
    folder = Path(name).parent
    if not folder.is_dir():
        return f"no shard matches '{source}': the folder '{folder}' does not exist"
    tars = len(list(folder.glob("*.tar")))
    return f"no shard matches '{source}': '{folder}' holds {tars} .tar files, but not '{name}'"


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of a list of shards, in shard order.

    `keys` (N,) are sample keys; `members[ext]` (N, 2) int64 holds offset and length in bytes of
    that member, or -1 where a sample lacks it; `starts` (shards + 1,) are cumulative sample
    counts; `truncated` names shards that end early (their complete samples are kept).
    """

    paths: tuple[str, ...]
    starts: np.ndarray
    keys: np.ndarray
    members: dict[str, np.ndarray]
    truncated: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, (shards,) int64."""
        return np.diff(self.starts)

    def fingerprint(self) -> str:
        """Hash of shard names and sample counts: equal means the same order of samples."""
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.sizes, strict=True):
            digest.update(f"{os.path.basename(path)}:{size}\n".encode())
        return digest.hexdigest()[:16]

    def require(self, purpose: str, alternatives: Sequence[str]) -> None:
        """Raise ShardError unless some sample has one of the member extensions `alternatives`."""
        if not any(ext in self.members for ext in alternatives):
            found = ", ".join(sorted(self.members)) or "none"
            raise ShardError(
                f"no sample of '{self.paths[0]}'"
                + (f" and {len(self.paths) - 1} more shards" if len(self.paths) > 1 else "")
                + f" has a member for the {purpose}: looked for {', '.join(alternatives)};"
                f" the shards hold: {found}"
            )


def index_shards(paths: Sequence[str]) -> ShardIndex:
    """Read the tar headers of all shards (not their contents).

    Raises:
        ShardError: a shard is compressed or is no tar file, or all of them are empty.
    """
    keys: list[str] = []
    rows: dict[str, dict[int, tuple[int, int]]] = {}
    starts = [0]
    truncated: list[str] = []
    for path in paths:
        complete = _index_one(path, keys, rows)
        if not complete:
            truncated.append(path)
        starts.append(len(keys))
    if not keys:
        raise ShardError(f"the shards hold no sample: '{paths[0]}' and {len(paths) - 1} more")
    members: dict[str, np.ndarray] = {}
    for ext, places in rows.items():
        table = np.full((len(keys), 2), -1, np.int64)
        table[list(places)] = list(places.values())
        members[ext] = table
    return ShardIndex(
        tuple(paths), np.array(starts, np.int64), np.array(keys), members, tuple(truncated)
    )


def _index_one(path: str, keys: list[str], rows: dict[str, dict[int, tuple[int, int]]]) -> bool:
    """Append one shard's samples to `keys` and `rows`; false when the shard ends early."""
    size = os.path.getsize(path)
    if size == 0:
        return False
    last = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                key, ext = split_name(member.name)
                if not ext:
                    continue
                if member.offset_data + member.size > size:
                    if key == last:  # an incomplete sample is no sample
                        _forget(len(keys) - 1, keys, rows)
                    return False
                if key != last:
                    keys.append(key)
                    last = key
                rows.setdefault(ext, {})[len(keys) - 1] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if _is_compressed(path):
            raise ShardError(f"'{path}' is compressed: unpack it with gunzip first") from error
        if last is None:
            raise ShardError(f"'{path}' is not a tar file: {error}") from error
        return False
    # A tar ends with two blocks of zeros; without them the file was cut between two members.
    with open(path, "rb") as file:
        file.seek(max(0, size - 1024))
        return not any(file.read())


def _forget(row: int, keys: list[str], rows: dict[str, dict[int, tuple[int, int]]]) -> None:
    keys.pop()
    for places in rows.values():
        places.pop(row, None)


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(6)
    return head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\x00"


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension at the first dot of the file name."""
    folder, _, file = name.rpartition("/")
    stem, _, ext = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ext.lower()


class ShardReader:
    """Reads members by position; files are opened in the process that reads them."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_files": {}, "_owner": -1}

    def read(self, sample: int, ext: str) -> bytes | None:
        """Contents of member `ext` of sample number `sample`, or None where it has none."""
        table = self.index.members.get(ext)
        if table is None or table[sample, 0] < 0:
            return None
        offset, length = (int(v) for v in table[sample])
        return os.pread(self._descriptor(sample), length, offset)

    def shard_of(self, sample: int) -> str:
        """Path of the shard that holds sample number `sample`."""
        return self.index.paths[self._shard_number(sample)]

    def _shard_number(self, sample: int) -> int:
        return int(np.searchsorted(self.index.starts, sample, side="right")) - 1

    def _descriptor(self, sample: int) -> int:
        if self._owner != os.getpid():  # after a fork the parent's files stay the parent's
            self._files, self._owner = {}, os.getpid()
        shard = self._shard_number(sample)
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.index.paths[shard], os.O_RDONLY)
        return self._files[shard]


def describe_skips(skipped: Counter[str]) -> str:
    """One line such as '3 samples skipped: 2 broken image, 1 no caption'."""
    total = sum(skipped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"{total} sample{'s' if total != 1 else ''} skipped: {reasons}"
