"""Where the members of a tar lie, from its headers alone."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from data_pipelines.errors import ShardError
from data_pipelines.sources import BlockReader, ReadError

MAX_EXTENSIONS = 64
Places = dict[str, tuple[int, int]]  # extension -> offset and length in bytes
Samples = list[tuple[str, Places]]
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


@dataclass(frozen=True)
class ShardPart:
    """The samples of one shard.

    `keys` (n,) strings; `members[ext]` (n, 2) int64, offset and length in bytes, or -1; `size` of
    the shard in bytes; `complete` is false where the shard ends early or is damaged.
    """

    keys: np.ndarray
    members: dict[str, np.ndarray]
    size: int
    complete: bool


def read_headers(path: str, read: Callable[[int, int], bytes], size: int) -> ShardPart:
    """Index a tar of `size` bytes, of which `read(offset, length)` gives any part.

    Within a shard, members belong to one sample by their key, whether or not they stand next to
    each other; a member that its sample already has begins another sample with the same key.
    Directories, links, hidden files and names without a dot are passed over. What stands before a
    damaged place is kept.

    Raises:
        ShardError: the file is compressed or is no tar, or member names have dots in odd places.
    """
    samples, complete = _read_members(path, BlockReader(read, size))
    extensions = list(dict.fromkeys(ext for _, places in samples for ext in places))
    if len(extensions) > MAX_EXTENSIONS:
        raise ShardError(too_many_message(path, set(extensions)))
    # Arrays, because a Python object for each member of a large set would fill the memory.
    keys = np.array([key for key, _ in samples], np.dtypes.StringDType())
    return ShardPart(keys, {ext: _table(samples, ext) for ext in extensions}, size, complete)


def _table(samples: Samples, ext: str) -> np.ndarray:
    places = [places.get(ext, (-1, -1)) for _, places in samples]
    return np.array(places, np.int64).reshape(-1, 2)


def _read_members(path: str, file: BlockReader) -> tuple[Samples, bool]:
    """Key and members of each sample, and false when the shard ends early."""
    samples: Samples = []
    newest: dict[str, Places] = {}
    if not file.size:
        return samples, False
    try:
        # Without the explicit encoding, names would depend on the machine's locale.
        with tarfile.open(
            fileobj=cast("tarfile._Fileobj", file), mode="r:", encoding="utf-8"
        ) as tar:
            for member in tar:
                if member.size < 0:
                    return samples, False
                key, ext = split_name(_printable(member.name))
                if not ext or not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > file.size:
                    if ext not in newest.get(key, {}):  # an incomplete sample is no sample
                        samples = [s for s in samples if s[1] is not newest.get(key)]
                    return samples, False
                if key not in newest or ext in newest[key]:
                    newest[key] = {}
                    samples.append((key, newest[key]))
                newest[key][ext] = (member.offset_data, member.size)
            end = tar.offset
    except ReadError:  # says nothing about the tar
        raise
    # Headers of headers nest; numbers and texts in them may be anything.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        return _broken(path, file, samples, error)
    # Reading also stops quietly at a damaged header; a whole tar ends in zeros, 20 blocks at most.
    file.seek(end)
    rest = file.read(2 * tarfile.RECORDSIZE)
    return samples, len(rest) >= tarfile.BLOCKSIZE and not any(rest)


def _broken(
    path: str, file: BlockReader, samples: Samples, error: Exception
) -> tuple[Samples, bool]:
    file.seek(0)
    head = file.read(6)
    for magic, program in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                f"'{path}' is compressed: unpack it first ({program}); single samples cannot be"
                " read out of it, and pictures do not get smaller by it"
            ) from error
    if not samples:
        raise ShardError(f"'{path}' is not a tar file: {error}") from error
    return samples, False


def _printable(name: str) -> str:
    """A name with bytes that are no UTF-8 written as escapes, so that names stay different."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def too_many_message(path: str, extensions: set[str]) -> str:
    """The error about a shard with so many extensions that its keys must have dots in them."""
    examples = ", ".join(sorted(extensions, key=len)[-3:])
    return (
        f"'{path}' has more than {MAX_EXTENSIONS} kinds of members ({examples}, ...): a name is cut"
        " into key and extension at its first dot, so keys must not contain dots; rename them"
    )


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and lower-case extension at the first dot of the file name.

    The extension is empty for names without a dot and for hidden files, which are no members.
    """
    folder, _, file = name.rpartition("/")
    stem, _, ext = file.partition(".")
    if not stem:
        return name, ""
    return (f"{folder}/{stem}" if folder else stem), ext.lower()
