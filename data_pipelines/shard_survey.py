"""What the tools share: finding shards and fields, reading samples in several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipelines.captions import member_of, members_of
from data_pipelines.ordered_map import ordered_map
from data_pipelines.shard_reader import Bytes
from data_pipelines.shards import (
    ShardError,
    ShardIndex,
    ShardReader,
    expand_shards,
)
from data_pipelines.tool_config import ReadConfig
from data_pipelines.waiting import Board

Result = TypeVar("Result")
CHUNK = 64  # samples that one process looks at at a time


def find_shards(pattern: str) -> list[str]:
    """Paths of the shards that `pattern` names; a folder stands for its .tar files.

    Raises:
        ShardError: nothing matches, or a shard is named twice.
    """
    if not pattern:
        raise ShardError("no shards given: name a folder of .tar files or a pattern")
    parts = [
        os.path.join(part, "*.tar") if os.path.isdir(part) else part for part in pattern.split("::")
    ]
    paths = expand_shards("::".join(parts))
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ShardError(f"'{twice}' is named twice: leave one out")
    return paths


@dataclass(frozen=True)
class Fields:
    """Where a set of shards has its pictures, captions and labels; null for what it lacks."""

    images: list[str]
    captions: str | None
    labels: str | None


def find_fields(index: ShardIndex, config: ReadConfig) -> Fields:
    """The fields that `config` names, or those of the usual names that any sample has.

    Raises:
        ShardError: no sample has a named one.
    """
    captions, labels = config.caption_key, config.label_key
    if captions is None and "txt" in index.members:
        captions = "txt"
    if labels is None and "cls" in index.members:
        labels = "cls"
    if config.caption_key is not None:
        index.require("caption", members_of(config.caption_key))
    if config.label_key is not None:
        index.require("label", [member_of(config.label_key)])
    return Fields(config.image_keys, captions, labels)


def read_picture(reader: ShardReader, sample: int, image_keys: Sequence[str]) -> Bytes | None:
    """The encoded picture of a sample, or None where it has none.

    Raises:
        FieldError: too large a member.
    """
    for extension in image_keys:
        data = reader.read(sample, extension)
        if data is not None:
            return data
    return None


class _Noted(Sequence[int]):
    """Samples that are noted on a board as one goes through them."""

    def __init__(self, samples: Sequence[int], board: Board) -> None:
        self.samples, self.board = samples, board

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Any) -> Any:
        return self.samples[place]

    def __iter__(self) -> Iterator[int]:
        for sample in self.samples:
            self.board.start(int(sample))
            yield sample
        self.board.rest()


def survey(
    look: Callable[[Sequence[int]], Result],
    index: ShardIndex,
    samples: Sequence[int],
    workers: int,
) -> Iterator[tuple[int, Result]]:
    """What `look` says of chunks of `samples`, in order, and how many samples each has.

    Raises:
        LoaderError: a worker has died; it says at which sample.
    """
    board = Board(workers)

    def at(pid: int) -> str | None:
        sample = board.at(pid)
        return None if sample is None else index.describe(sample)

    chunks = [
        _Noted(samples[start : start + CHUNK], board) for start in range(0, len(samples), CHUNK)
    ]
    results = ordered_map(look, chunks, workers, at=at)
    yield from zip(map(len, chunks), results, strict=True)


def printable(text: str, limit: int = 200) -> str:
    """Text for a terminal or a picture: control characters escaped, cut at `limit` letters."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text[:limit]
    )
    return shown + ("…" if len(text) > limit else "")
