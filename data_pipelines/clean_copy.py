"""A copy of shards without the samples that have problems.

Shards get their names when they are whole. While a copy is being made, `unfinished.json` in its
folder names the shards that it may have; a run that finds the file left behind removes those and
makes the copy anew, for it has read everything again anyway.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_pipelines.findings import PICKLES, Validation
from data_pipelines.shard_reader import Bytes
from data_pipelines.shard_writer import ShardWriter, output_folder, write_json
from data_pipelines.shards import FieldError, ShardError, ShardIndex, ShardReader

MARK = "unfinished.json"


def check_folder(out: Path, paths: list[str]) -> None:
    """Raise ShardError where a copy of the shards `paths` would overwrite something."""
    names = Counter(map(os.path.basename, paths))
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ShardError(f"two shards are named '{twice}': clean one folder at a time")
    if any(Path(path).resolve().parent == out.resolve() for path in paths):
        raise ShardError(f"clean '{out}' is the folder of the shards: choose another one")
    if out.is_dir():
        foreign = {path.name for path in out.glob("*.tar")} - set(_unfinished(out))
        if foreign:
            raise ShardError(f"clean '{out}' holds shards already: choose another folder")


def _unfinished(out: Path) -> list[str]:
    """Names of the shards of a copy that was stopped, which is to be made anew."""
    try:
        names = json.loads((out / MARK).read_bytes())
    except (OSError, ValueError):
        return []
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and os.path.basename(name) == name]


class Copy(NamedTuple):
    """Shards and samples of a copy, and why samples without problems are not in it."""

    shards: int
    samples: int
    unread: Counter[str]


def write_clean_copy(validation: Validation, out: Path) -> Copy:
    """Write the samples without problems to shards of the same names.

    Members stand together and in the order of their names, and those that other readers would
    unpickle are left out. A shard without any good sample is not written. Samples that can no
    longer be read, or have a member over the limit of what is read, are counted.

    Raises:
        ShardError: see `check_folder`.
    """
    check_folder(out, validation.paths)
    index = validation.index
    sizes, unread = dict[str, int](), Counter[str]()
    with output_folder(out):
        for name in _unfinished(out):
            (out / name).unlink(missing_ok=True)
        if index is not None:
            write_json(out / MARK, [os.path.basename(path) for path in index.paths])
            bad = validation.bad_samples()
            with tqdm(
                total=len(index) - len(bad), unit="sample", desc="clean", disable=None
            ) as bar:
                for number, path in enumerate(index.paths):
                    first, last = (int(index.starts[n]) for n in (number, number + 1))
                    samples = [sample for sample in range(first, last) if sample not in bad]
                    name = os.path.basename(path)
                    written = _write_shard(index, samples, out / name, unread, bar)
                    if written:
                        sizes[name] = written
        write_json(out / "sizes.json", sizes)
        (out / MARK).unlink(missing_ok=True)
    return Copy(len(sizes), sum(sizes.values()), unread)


def _write_shard(
    index: ShardIndex, samples: list[int], path: Path, unread: Counter[str], bar: tqdm
) -> int:
    if not samples:
        return 0
    reader, written = ShardReader(index), 0
    with ShardWriter(path) as writer:
        for sample in samples:
            bar.update()
            try:
                members = _members(reader, sample)
            except FieldError as error:
                unread[str(error)] += 1
                continue
            writer.add(str(index.keys[sample]), members)
            written += 1
    if not written:
        path.unlink()
    return written


def _members(reader: ShardReader, sample: int) -> dict[str, Bytes]:
    members: dict[str, Bytes] = {}
    for extension in reader.index.members:
        data = None if extension in PICKLES else reader.read(sample, extension)
        if data is not None:
            members[extension] = data
    return members
