"""Finding webdataset shards and knowing where every sample in them lies.

A shard is a plain tar file in which the members of one sample share the name up to the first dot
(img2dataset's layout: `000012.jpg`, `000012.txt`, `000012.json`).
The index holds the offset and length of every member, so that any sample can be read on its own.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset.shardlists import expand_urls

from data_pipelines.config import ReadingConfig, StreamConfig
from data_pipelines.errors import FieldError, ShardError
from data_pipelines.shard_index import ShardIndex
from data_pipelines.shard_reader import MAX_MEMBER_BYTES, ShardReader
from data_pipelines.sidecar import TURN_SECONDS, Indexing
from data_pipelines.sources import ReadError, check_protocol, find_remote, is_remote
from data_pipelines.tar_headers import (
    MAX_EXTENSIONS,
    ShardPart,
    split_name,
    too_many_message,
)
from data_pipelines.turns import is_first_process
from data_pipelines.waiting import say

__all__ = [
    "MAX_EXTENSIONS",
    "MAX_MEMBER_BYTES",
    "FieldError",
    "ShardError",
    "ShardIndex",
    "ShardReader",
    "describe_skips",
    "expand_shards",
    "expand_sources",
    "index_shards",
    "open_shards",
    "split_name",
]
PATIENCE = 60.0  # seconds until it is said who is waited for
REMOTE_THREADS = 16  # shards of a store that are indexed at once


def expand_shards(pattern: str) -> list[str]:
    """Shard paths named by `pattern`: brace ranges, `*` globs, several joined by `::`.

    Raises:
        ShardError: nothing matches, a named file is missing, or the pattern is malformed.
    """
    return [path for source in expand_sources(pattern) for path in source]


def expand_sources(pattern: str, reading: ReadingConfig | None = None) -> list[list[str]]:
    """Shard paths of each `::`-joined source of `pattern`; see `expand_shards`.

    Raises:
        ShardError: a source is empty, cannot be read, or matches nothing.
    """
    if not all(pattern.split("::")):
        raise ShardError(
            f"no shards given in '{pattern}': set data.shards, for example"
            " 'data/{0000..0099}.tar'"
        )
    return [_expand(source, reading or ReadingConfig()) for source in pattern.split("::")]


def _expand(source: str, reading: ReadingConfig) -> list[str]:
    if source.startswith("pipe:"):
        raise ShardError(f"only files are read: copy '{source}' to a disk or mount it")
    if is_remote(source):
        check_protocol(source)
    paths: list[str] = []
    for name in _expand_braces(source):
        if is_remote(name):
            paths += _expand_remote(name, reading)
            continue
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            raise ShardError(_missing_message(source, name))
        paths += found
    return paths


def _expand_remote(name: str, reading: ReadingConfig) -> list[str]:
    if "*" not in name:
        return [name]  # indexing tells whether it is there
    try:
        found = find_remote(name, reading)
    except ReadError as error:
        raise ShardError(f"'{name}' {error}") from error
    if not found:
        raise ShardError(f"no shard matches '{name}'; brace ranges need no listing by the server")
    return found


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
    if not tars:
        last = Path(name).name
        return f"no shard matches '{source}': '{folder}' has neither '{last}' nor .tar files"
    return f"no shard matches '{source}': '{folder}' holds {tars} .tar files, but not '{name}'"


def open_shards(config: StreamConfig) -> ShardIndex:
    """The index of the shards that the settings of a stream name.

    Raises:
        ShardError: see `expand_shards` and `index_shards`.
    """
    sources = expand_sources(config.shards, config.reading)
    return index_shards(
        [path for source in sources for path in source],
        folder=config.index_folder,
        reading=config.reading,
        sources=[len(source) for source in sources],
    )


def index_shards(
    paths: Sequence[str],
    *,
    folder: str | None = None,
    reading: ReadingConfig | None = None,
    sources: Sequence[int] = (),
) -> ShardIndex:
    """The index of a list of shards, from their sidecars or from their tar headers; see
    `data_pipelines.sidecar` and `data_pipelines.tar_headers`. Contents are not read, but for what
    lies between the headers of small members in a store.

    Args:
        paths: files and addresses.
        folder: where sidecars are kept; None for beside the shards, or else the user's cache.
        sources: numbers of shards of each source.

    Raises:
        ShardError: a shard cannot be read, is compressed or is no tar file, member names have dots
            in odd places, or all shards are empty.
    """
    reading = reading or ReadingConfig()
    parts = _index_parts(paths, folder, reading)
    starts = np.concatenate([[0], np.cumsum([len(part.keys) for part in parts])]).astype(np.int64)
    if not starts[-1]:
        raise ShardError(f"no sample in any of {len(paths)} shards, the first is '{paths[0]}'")
    extensions = set[str]()
    for path, part in zip(paths, parts, strict=True):
        extensions.update(part.members)
        if len(extensions) > MAX_EXTENSIONS:
            raise ShardError(too_many_message(path, extensions))
    members: dict[str, np.ndarray] = {}
    for ext in sorted(extensions):
        members[ext] = np.full((starts[-1], 2), -1, np.int64)
        for start, part in zip(starts, parts, strict=False):
            if ext in part.members:
                members[ext][start : start + len(part.keys)] = part.members[ext]
    return ShardIndex(
        tuple(paths),
        starts,
        np.concatenate([part.keys for part in parts]),
        members,
        tuple(path for path, part in zip(paths, parts, strict=True) if not part.complete),
        tuple(part.size for part in parts),
        tuple(sources),
        reading,
    )


def _index_parts(
    paths: Sequence[str], folder: str | None, reading: ReadingConfig
) -> list[ShardPart]:
    """Index each shard, those of stores side by side, with a bar on a terminal if it takes time.

    Processes that do so at once share the work: each goes past what another one is at, and comes
    back to it.
    """
    bar = tqdm(
        total=len(paths),
        desc="indexing shards",
        unit="shard",
        delay=2,
        leave=False,
        disable=not (sys.stderr.isatty() and is_first_process()),
    )
    # Disks are read by this thread, which Ctrl-C interrupts.
    pool = ThreadPoolExecutor(REMOTE_THREADS) if any(map(is_remote, paths)) else None
    apply = map if pool is None else pool.map
    parts: dict[int, ShardPart] = {}
    jobs: dict[int, Indexing] = {}

    def attempt(number: int) -> ShardPart | None:
        if number not in jobs:
            jobs[number] = Indexing(paths[number], folder, reading)
        return jobs[number].attempt()

    left, since = list(range(len(paths))), time.monotonic()
    try:
        while left:
            for number, part in zip(left, apply(attempt, left), strict=True):
                if part is not None:
                    parts[number] = part
                    bar.update()
            before, left = len(left), [number for number in left if number not in parts]
            if len(left) < before:
                since = time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                say(_waiting_message(paths[left[0]], len(left)))
                since = time.monotonic()
            if left:
                time.sleep(TURN_SECONDS)
        return [parts[number] for number in range(len(paths))]
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        bar.close()


def _waiting_message(path: str, count: int) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return f"waiting for another process that indexes '{path}'{more}"


def describe_skips(skipped: Counter[str]) -> str:
    """One line such as '3 samples skipped: 2 broken image, 1 no caption'."""
    total = sum(skipped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
    return f"{total} sample{'s' if total != 1 else ''} skipped: {reasons}"
