"""A copy of shards without the samples that have problems."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_pipelines.findings import PICKLES, Validation
from data_pipelines.shard_reader import Bytes
from data_pipelines.shard_writer import ShardWriter, output_folder, write_json
from data_pipelines.shards import FieldError, ShardError, ShardIndex, ShardReader


def check_folder(out: Path, paths: list[str]) -> None:
    """Raise ShardError where a copy of the shards `paths` would overwrite something."""
    names = Counter(map(os.path.basename, paths))
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ShardError(f"two shards are named '{twice}': clean one folder at a time")
    if any(Path(path).resolve().parent == out.resolve() for path in paths):
        raise ShardError(f"clean '{out}' is the folder of the shards: choose another one")
    if out.is_dir() and any(out.glob("*.tar")):
        raise ShardError(f"clean '{out}' holds shards already: choose another folder")


def write_clean_copy(validation: Validation, out: Path) -> tuple[int, int]:
    """Write the samples without problems to shards of the same names; how many of each there are.

    Members stand together and in the order of their names, and those that other readers would
    unpickle are left out. A shard without any good sample is not written.

    Raises:
        ShardError: see `check_folder`.
    """
    check_folder(out, validation.paths)
    index = validation.index
    sizes: dict[str, int] = {}
    with output_folder(out):
        if index is not None:
            bad = validation.bad_samples()
            with tqdm(
                total=len(index) - len(bad), unit="sample", desc="clean", disable=None
            ) as bar:
                for number, path in enumerate(index.paths):
                    first, last = (int(index.starts[n]) for n in (number, number + 1))
                    samples = [sample for sample in range(first, last) if sample not in bad]
                    written = _write_shard(index, samples, out / os.path.basename(path))
                    if written:
                        sizes[os.path.basename(path)] = written
                    bar.update(len(samples))
        write_json(out / "sizes.json", sizes)
    return len(sizes), sum(sizes.values())


def _write_shard(index: ShardIndex, samples: list[int], path: Path) -> int:
    if not samples:
        return 0
    reader, written = ShardReader(index), 0
    with ShardWriter(path) as writer:
        for sample in samples:
            try:
                members = _members(reader, sample)
            except FieldError:  # a member over the limit of what is read
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
