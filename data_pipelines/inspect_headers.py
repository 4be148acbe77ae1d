"""What is wrong with a shard as a tar file, and with the names and kinds of its members."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from data_pipelines.config import ReadingConfig
from data_pipelines.errors import ShardError
from data_pipelines.findings import PICKLES, Finding
from data_pipelines.shard_counts import recorded_count
from data_pipelines.shards import index_shards
from data_pipelines.sources import BlockReader, is_remote, read_range, stamp_of
from data_pipelines.tar_headers import split_name


def inspect_shard(path: str, folder: str) -> tuple[bool, list[Finding]]:
    """Whether a shard has samples to look at, and what its headers show.

    Args:
        path: a file or an address.
        folder: where its index is kept. Not beside the shard: an older index would hide damage
            that does not change the date of the file.
    """
    try:
        index = index_shards([path], folder=folder)
    except ShardError as error:
        if is_remote(path):  # a server that has just failed is not asked again
            return False, [Finding("broken_shard", path, detail=str(error))]
        findings, members = _inspect_members(path)
        empty = members == 0 and not _is_empty_file(path)
        kind = "empty_shard" if empty else "broken_shard"
        return False, [*findings, Finding(kind, path, detail="" if empty else str(error))]
    except Exception as error:  # parsers of tar headers raise nearly anything on broken files
        detail = f"{type(error).__name__}: {error}"
        return False, [Finding("broken_shard", path, detail=detail)]
    findings, _ = _inspect_members(path)
    if index.truncated:
        findings.append(Finding("truncated_shard", path, detail=f"{len(index)} samples are whole"))
    elif (recorded := recorded_count(path)) not in (None, len(index)):
        detail = f"{len(index)} samples, {recorded} were written"
        findings.append(Finding("miscounted_shard", path, detail=detail))
    return True, findings


def _is_empty_file(path: str) -> bool:
    with open(path, "rb") as file:
        return not file.read(1)


def _inspect_members(path: str) -> tuple[list[Finding], int | None]:
    """What is odd about members, and how many there are; None where the tar cannot be read."""
    findings: list[Finding] = []
    seen, last, count = set[str](), "", 0
    try:
        with _open_tar(path) as tar:
            for member in tar:
                count += 1
                key, extension = split_name(member.name)
                if not _is_text(member.name):
                    findings.append(Finding("unsafe_name", path, member.name, "no UTF-8"))
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or not extension:
                    kind = "a hidden file or without extension" if member.isreg() else "no file"
                    findings.append(Finding("unread_member", path, member.name, kind))
                    continue
                if extension in PICKLES:
                    findings.append(Finding("pickle_member", path, key, extension))
                if key != last and key in seen:
                    findings.append(Finding("scattered_members", path, key))
                seen.add(key)
                last = key
    except Exception:  # as above; index_shards says what is wrong
        return findings, None
    return findings, count


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _open_tar(path: str) -> Iterator[tarfile.TarFile]:
    """A tar to walk through, on a disk or in a store."""
    if not is_remote(path):
        with tarfile.open(path, "r:") as tar:
            yield tar
        return
    reading = ReadingConfig()
    size = stamp_of(path, reading).size
    file = BlockReader(lambda at, length: read_range(path, at, length, reading), size)
    with tarfile.open(fileobj=cast(Any, file), mode="r:") as tar:
        yield tar
