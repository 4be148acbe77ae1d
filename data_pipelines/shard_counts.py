"""What img2dataset and `scripts.shards pack` have noted beside shards, and what it is good for.

`00000_stats.json` beside `00000.tar` says how many samples were written (`successes`). That is
enough to choose samples evenly among all of a set and then to index the few shards that hold them,
and to notice a shard that has lost some. It has neither places nor keys, so training, whose order
and fingerprint rest on those, reads headers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.shards import ShardIndex, index_shards
from data_pipelines.sources import is_remote

MAX_RECORD_BYTES = 64 << 20  # those of pack name every sample that was left out


def recorded_count(path: str) -> int | None:
    """Samples that were written to a shard on a disk, or None where no sensible record says so."""
    if is_remote(path):
        return None
    record = Path(path).with_name(f"{Path(path).stem}_stats.json")
    try:
        if record.stat().st_size > MAX_RECORD_BYTES:
            return None
        count = json.loads(record.read_bytes())["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if type(count) is int and count >= 0 else None


@dataclass(frozen=True)
class Choice:
    """Samples that were chosen from a set of shards.

    `index` is of the shards that hold them, or of all; `samples` are their numbers in it. `counts`
    and `file_bytes` are of every shard; `recorded` where the counts were not read from headers.
    """

    index: ShardIndex
    samples: Sequence[int]
    counts: Sequence[int]
    file_bytes: Sequence[int]
    recorded: bool

    @property
    def total(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)


def choose(
    paths: Sequence[str], folder: str | None, pick: Callable[[int], Sequence[int]]
) -> Choice:
    """The samples that `pick` takes from so many.

    Only the shards that hold them are indexed where all shards have records, and these are right
    about the shards that are indexed.

    Args:
        folder: where indexes are kept, as for `index_shards`.

    Raises:
        ShardError: see `index_shards`.
    """
    counts = [recorded_count(path) for path in paths]
    known = [count for count in counts if count is not None]
    if len(known) == len(paths) and sum(known):
        found = _choose_recorded(paths, known, folder, pick)
        if found is not None:
            return found
    index = index_shards(paths, folder=folder)
    return Choice(index, pick(len(index)), index.sizes.tolist(), index.file_bytes, recorded=False)


def _choose_recorded(
    paths: Sequence[str],
    counts: Sequence[int],
    folder: str | None,
    pick: Callable[[int], Sequence[int]],
) -> Choice | None:
    """The same by records, or None where that saves nothing or they are wrong."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    samples = np.asarray(pick(int(starts[-1])), np.int64)
    shards = np.searchsorted(starts, samples, side="right") - 1
    needed = np.unique(shards)
    if len(needed) == len(paths):
        return None
    index = index_shards([paths[shard] for shard in needed], folder=folder)
    if index.sizes.tolist() != [counts[shard] for shard in needed]:
        return None
    places = index.starts[np.searchsorted(needed, shards)] + samples - starts[shards]
    sizes = [os.stat(path).st_size for path in paths]
    return Choice(index, places.tolist(), counts, sizes, recorded=True)
