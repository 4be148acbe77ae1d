"""Packing a source into shards that are the same bytes on every machine and after every kill.

The source's samples have an order (its own, or one drawn from a seed), and a sample's key is its
place in that order. Each shard takes the next samples until it is full. Its record,
`00000_stats.json`, says which places it took and its checksum, so that a stopped run can check what
is there and go on behind it. `pack.json` holds what decides the bytes; a folder that was begun
with other settings or another source is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.decode import DecodeError
from data_pipelines.ordered_map import ordered_map
from data_pipelines.pack_pictures import pack_picture
from data_pipelines.pack_sources import Source, open_source
from data_pipelines.shard_writer import (
    ShardWriter,
    file_digest,
    output_folder,
    write_atomic,
    write_json,
)
from data_pipelines.shards import FieldError, ShardError
from data_pipelines.tool_config import PackConfig
from data_pipelines.waiting import Board

FORMAT = 1
CHUNK = 16  # samples that one process reads at a time
# Settings that say how to find or do, not what comes out.
NOT_IN_BYTES = ("source", "out", "kind", "workers", "root")


class Place(NamedTuple):
    """A sample that has been read: its place in the order, its name in the source, and its
    members or the reason why it has none."""

    place: int
    name: str
    found: dict[str, bytes] | str


class PackSummary(NamedTuple):
    """What is in the folder in the end, and how many of the shards were there before."""

    shards: int
    kept: int
    samples: int
    skipped: Counter[str]


def pack(config: PackConfig, workers: int) -> PackSummary:
    """Write the shards of `config` that are not there yet.

    Args:
        config: what to pack, and where to.
        workers: processes that read; 0 reads in this one. Without effect on the bytes.

    Raises:
        ShardError: an unusable source or folder, or no sample can be used.
        ValueError: a setting out of range.
    """
    check_config(config)
    source = open_source(config)
    if not len(source):
        raise ShardError(f"source '{config.source}' is empty")
    out = Path(config.out)
    with output_folder(out) as lock:
        _claim(out, config, source)
        if source.classnames is not None:
            lines = (f"{' '.join(name.split())}\n" for name in source.classnames)
            write_atomic(out / "classnames.txt", "".join(lines).encode(errors="replace"))
        packer = _Packer(config, source, out, workers, lock)
        records = packer.run()
        skipped = Counter[str]()
        for record in records:
            skipped.update(record["skipped"].values())
        if not any(record["successes"] for record in records):
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
            raise ShardError(f"no sample of '{config.source}' can be used: {reasons}")
        write_json(out / "sizes.json", {r["shard"]: r["successes"] for r in records})
    samples = sum(record["successes"] for record in records)
    return PackSummary(len(records), packer.kept, samples, skipped)


def check_config(config: PackConfig) -> None:
    """Raise ValueError for settings that nothing can be packed with."""
    for name in ("source", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name} is not given: pack SOURCE --out FOLDER")
    for name in ("max_samples", "max_bytes", "max_pixels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.shorter_side is not None and config.shorter_side < 1:
        raise ValueError(f"shorter_side must be at least 1, got {config.shorter_side}")
    if not 1 <= config.quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {config.quality}")
    if config.shuffle is not None and not 0 <= config.shuffle < 2**32:
        raise ValueError(f"shuffle is a seed, from 0 to 2^32 - 1, got {config.shuffle}")


def _claim(out: Path, config: PackConfig, source: Source) -> None:
    """Note in the folder what is packed there, or refuse one that holds something else."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_BYTES}
    content = source.fingerprint()
    claim = {"format": FORMAT, "source": content, "samples": len(source), "settings": settings}
    path = out / "pack.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        found = None
    except ValueError as error:
        raise ShardError(f"'{path}' is broken: choose another folder") from error
    if found is None:
        if any(out.glob("*.tar")):
            raise ShardError(f"'{out}' holds other shards already: choose another folder")
        write_json(path, claim)
    elif found != claim:
        raise ShardError(
            f"'{out}' holds shards of {_difference(found, claim)}: choose another folder, or"
            " remove it first"
        )


def _difference(found: Any, claim: Mapping[str, Any]) -> str:
    """What differs between two claims, in a few words."""
    then = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(then, dict) or found.get("format") != FORMAT:
        return "another version"
    now = claim["settings"]
    names = [f"{n} {then.get(n)} (now {now[n]})" for n in now if then.get(n) != now[n]]
    return ", ".join(names) if names else "another source, or its files have changed"


class _Packer:
    """Fills one shard after the other."""

    def __init__(
        self, config: PackConfig, source: Source, out: Path, workers: int, lock: int
    ) -> None:
        self.config, self.source, self.out = config, source, out
        self.workers, self.lock, self.kept = workers, lock, 0
        self.board = Board(workers)
        total = len(source)
        self.order = np.arange(total)
        if config.shuffle is not None:
            # The old generator, because numpy promises that its numbers never change.
            self.order = np.random.RandomState(config.shuffle).permutation(total)
        self.digits = max(9, len(str(total - 1)))
        self.shard_digits = max(5, len(str(math.ceil(total / config.max_samples) - 1)))

    def run(self) -> list[dict[str, Any]]:
        """Records of all shards, in order."""
        records: list[dict[str, Any]] = []
        total, place = len(self.source), 0
        places: Iterator[Place] | None = None
        waiting: Place | None = None
        with tqdm(total=total, unit="sample", desc="pack", disable=None) as bar:
            while place < total:
                shard = f"{len(records):0{self.shard_digits}d}"
                record = self._finished(shard, place)
                if record is not None:
                    self.kept += 1
                    places = waiting = None  # what has been read ahead is already packed
                else:
                    if places is None:
                        places = self._read_from(place)
                    record, waiting = self._write(shard, place, places, waiting, bar)
                records.append(record)
                place = record["end"]
                bar.update(place - bar.n)
        return records

    def _finished(self, shard: str, first: int) -> dict[str, Any] | None:
        """The record of a whole shard that begins at place `first`, if there is one."""
        try:
            record = json.loads((self.out / f"{shard}_stats.json").read_bytes())
            path = self.out / record["shard"]
            if record["first"] != first or not first < record["end"] <= len(self.source):
                return None
            if record["successes"] and record["sha256"] != file_digest(path):
                return None
            return record
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or damaged: written again

    def _read_from(self, first: int) -> Iterator[Place]:
        """All places from `first` on, read by `workers` processes."""
        total = len(self.source)
        chunks = [range(start, min(start + CHUNK, total)) for start in range(first, total, CHUNK)]
        start = partial(_close_in_worker, self.lock)
        for chunk in ordered_map(self._read_chunk, chunks, self.workers, start, self._at):
            yield from chunk

    def _at(self, pid: int) -> str | None:
        """What a process has been reading, for messages."""
        place = self.board.at(pid)
        return None if place is None else f"'{self.source.name(int(self.order[place]))}'"

    def _read_chunk(self, places: range) -> list[Place]:
        try:
            return [self._read(place) for place in places]
        finally:
            self.board.rest()

    def _read(self, place: int) -> Place:
        self.board.start(place)
        number = int(self.order[place])
        name = self.source.name(number)
        try:
            return Place(place, name, self._members(number, name))
        except (FieldError, DecodeError) as error:
            return Place(place, name, str(error))
        except RecursionError:
            return Place(place, name, "broken json")

    def _members(self, number: int, name: str) -> dict[str, bytes]:
        sample = self.source.read(number)
        picture = pack_picture(sample.image, self.config)
        known = {"source": name, "width": picture.width, "height": picture.height}
        record = json.dumps(plain(known | sample.record), ensure_ascii=False)
        members = {picture.extension: picture.data, "json": record.encode(errors="replace")}
        if sample.captions is not None:
            members["txt"] = "\n".join(sample.captions).encode(errors="replace")
        if sample.label is not None:
            members["cls"] = str(sample.label).encode()
        return members

    def _write(
        self, shard: str, first: int, places: Iterator[Place], waiting: Place | None, bar: tqdm
    ) -> tuple[dict[str, Any], Place | None]:
        """Write one shard; also gives the sample that did not fit, which begins the next."""
        path = self.out / f"{shard}.tar"
        skipped: dict[str, str] = {}
        end = first
        with ShardWriter(path) as writer:
            following = waiting or next(places, None)
            while following is not None:
                if isinstance(following.found, str):
                    skipped[following.name] = following.found
                elif self._is_full(writer, following.found):
                    break
                else:
                    writer.add(f"{following.place:0{self.digits}d}", following.found)
                end = following.place + 1
                bar.update(end - bar.n)
                following = next(places, None)
        record = {
            "shard": path.name,
            "count": end - first,
            "successes": writer.samples,
            "failed": len(skipped),
            "first": first,
            "end": end,
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
            "status_dict": dict(Counter(skipped.values())),
            "skipped": skipped,
        }
        if not writer.samples:  # nothing can be used: no shard, only the reasons
            path.unlink()
        write_json(self.out / f"{shard}_stats.json", record)
        return record, following

    def _is_full(self, writer: ShardWriter, members: dict[str, bytes]) -> bool:
        if not writer.samples:
            return False
        if writer.samples >= self.config.max_samples:
            return True
        return writer.size_with(members) > self.config.max_bytes


def plain(value: Any) -> Any:
    """A value without the numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _close_in_worker(lock: int, worker: int) -> None:
    os.close(lock)
