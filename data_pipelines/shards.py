"""Finding webdataset shards and knowing where every sample in them lies.

A shard is a plain tar file in which the members of one sample share the name up to the first dot
(img2dataset's layout: `000012.jpg`, `000012.txt`, `000012.json`).
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
from functools import cached_property
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

MAX_EXTENSIONS = 64
MAX_MEMBER_BYTES = 256 << 20
Places = dict[str, tuple[int, int]]  # extension -> offset and length in bytes


class ShardError(ValueError):
    """Shards that cannot be used; the message says which, why, and what to do."""


class FieldError(ValueError):
    """A member that cannot be used; the message is the reason, in a few words."""


def expand_shards(pattern: str) -> list[str]:
    """Shard paths named by `pattern`: brace ranges, `*` globs, several joined by `::`.

    Raises:
        ShardError: nothing matches, a named file is missing, or the pattern is malformed.
    """
    if not all(pattern.split("::")):
        raise ShardError(
            f"no shards given in '{pattern}': set data.shards, for example"
            " 'data/{0000..0099}.tar'"
        )
    paths: list[str] = []
    for source in pattern.split("::"):
        if "://" in source or source.startswith("pipe:"):
            raise ShardError(f"only files are read: copy '{source}' to a disk or mount it")
        for name in _expand_braces(source):
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            found = [path for path in found if os.path.isfile(path)]
            if not found:
                raise ShardError(_missing_message(source, name))
            paths += found
    return paths


def _expand_braces(source: str) -> list[str]:
    try:
        return list(expand_urls(source))
    except (ValueError, AssertionError) as error:  # unbalanced braces, unknown ${variable}
        raise ShardError(f"shard pattern '{source}' is malformed: {error}") from error


def _missing_message(source: str, name: str) -> str:
    folder = Path(name).parent
    if not folder.is_dir():
        return f"no shard matches '{source}': the folder '{folder}' does not exist"
    tars = len(list(folder.glob("*.tar")))
    return f"no shard matches '{source}': '{folder}' holds {tars} .tar files, but not '{name}'"


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of a list of shards, in shard order.

    `keys` (N,) are sample keys, strings of any width; `members[ext]` (N, 2) int64 holds offset and
    length in bytes of that member, or -1 where a sample lacks it; `starts` (shards + 1,) are
    cumulative sample counts; `file_bytes` are the sizes of the shards; `truncated` names shards
    that end early or are damaged (the complete samples before that place are kept).
    """

    paths: tuple[str, ...]
    starts: np.ndarray
    keys: np.ndarray
    members: dict[str, np.ndarray]
    truncated: tuple[str, ...]
    file_bytes: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, (shards,) int64."""
        return np.diff(self.starts)

    def fingerprint(self) -> str:
        """Hash of the shards' names, sizes and sample keys, the same wherever the shards lie."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for number, (path, size) in enumerate(zip(self.paths, self.file_bytes, strict=True)):
            keys = self.keys[self.starts[number] : self.starts[number + 1]]
            digest.update(f"{os.path.basename(path)}:{size}:{len(keys)}\n".encode())
            digest.update("\n".join(keys).encode())
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

    Within a shard, members belong to one sample by their key, whether or not they stand next to
    each other; a member that its sample already has begins another sample with the same key.
    Directories, links, hidden files and names without a dot are passed over.

    Raises:
        ShardError: a shard is compressed or is no tar file, member names have dots in odd places,
            or all shards are empty.
    """
    starts, extensions = [0], set[str]()
    keys: list[np.ndarray] = []
    tables: list[dict[str, np.ndarray]] = []
    truncated: list[str] = []
    for path in paths:
        samples, complete = _read_headers(path)
        if not complete:
            truncated.append(path)
        extensions.update(*(places for _, places in samples))
        if len(extensions) > MAX_EXTENSIONS:
            raise ShardError(_too_many_message(path, extensions))
        # Arrays, because a Python object for each member of a large set would fill the memory.
        keys.append(np.array([key for key, _ in samples], np.dtypes.StringDType()))
        present = dict.fromkeys(ext for _, places in samples for ext in places)
        tables.append({ext: _table(samples, ext) for ext in present})
        starts.append(starts[-1] + len(samples))
    if not starts[-1]:
        raise ShardError(f"no sample in any of {len(paths)} shards, the first is '{paths[0]}'")
    members: dict[str, np.ndarray] = {}
    for ext in sorted(extensions):
        members[ext] = np.full((starts[-1], 2), -1, np.int64)
        for start, table in zip(starts, tables, strict=False):
            if ext in table:
                members[ext][start : start + len(table[ext])] = table[ext]
    return ShardIndex(
        tuple(paths),
        np.array(starts, np.int64),
        np.concatenate(keys),
        members,
        tuple(truncated),
        tuple(map(os.path.getsize, paths)),
    )


def _table(samples: list[tuple[str, Places]], ext: str) -> np.ndarray:
    places = [places.get(ext, (-1, -1)) for _, places in samples]
    return np.array(places, np.int64).reshape(-1, 2)


def _read_headers(path: str) -> tuple[list[tuple[str, Places]], bool]:
    """Key and members of each sample of a shard, and false when the shard ends early."""
    samples: list[tuple[str, Places]] = []
    newest: dict[str, Places] = {}
    size = os.path.getsize(path)
    if not size:
        return samples, False
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:
                    return samples, False
                key, ext = split_name(member.name)
                if not ext or not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    if ext not in newest.get(key, {}):  # an incomplete sample is no sample
                        samples = [s for s in samples if s[1] is not newest.get(key)]
                    return samples, False
                if key not in newest or ext in newest[key]:
                    newest[key] = {}
                    samples.append((key, newest[key]))
                newest[key][ext] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        if _is_compressed(path):
            raise ShardError(f"'{path}' is compressed: unpack it first (gunzip)") from error
        if not samples:
            raise ShardError(f"'{path}' is not a tar file: {error}") from error
        return samples, False
    # Reading also stops quietly at a damaged header; a whole tar ends in zeros, 20 blocks at most.
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(2 * tarfile.RECORDSIZE)
    return samples, len(rest) >= tarfile.BLOCKSIZE and not any(rest)


def _too_many_message(path: str, extensions: set[str]) -> str:
    examples = ", ".join(sorted(extensions, key=len)[-3:])
    return (
        f"'{path}' has more than {MAX_EXTENSIONS} kinds of members ({examples}, ...): a name is cut"
        " into key and extension at its first dot, so keys must not contain dots; rename them"
    )


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(6)
    return head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension at the first dot of the file name.

    The extension is empty for names without a dot and for hidden files, which are no members.
    """
    folder, _, file = name.rpartition("/")
    stem, _, ext = file.partition(".")
    if not stem:
        return name, ""
    return (f"{folder}/{stem}" if folder else stem), ext.lower()


class ShardReader:
    """Reads members by position; files are opened in the process that reads them."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_files": {}, "_owner": -1}

    def read(self, sample: int, ext: str, limit: int = MAX_MEMBER_BYTES) -> bytes | None:
        """Contents of member `ext` of sample number `sample`, or None where it has none.

        Raises:
            FieldError: the member is over `limit` bytes; nothing of it is read.
        """
        table = self.index.members.get(ext)
        if table is None or table[sample, 0] < 0:
            return None
        offset, length = (int(v) for v in table[sample])
        if length > limit:
            raise FieldError(f"{ext} member over {limit} bytes")
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
