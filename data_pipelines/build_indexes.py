"""Building the indexes of shards ahead of the runs that use them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.shard_survey import find_shards
from data_pipelines.shards import ShardIndex, index_shards
from data_pipelines.sidecar import FRESH_SECONDS, sidecar_paths
from data_pipelines.sources import is_remote
from data_pipelines.tool_config import IndexConfig


def build_indexes(config: IndexConfig) -> tuple[ShardIndex, Counter[Path]]:
    """The index of all shards, and how many of their indexes lie in which folder.

    Raises:
        ShardError: no shard matches, or one cannot be used.
    """
    paths = find_shards(config.shards)
    _let_settle(paths)
    index = index_shards(paths, folder=config.index_folder)
    found = [
        next((place for place in sidecar_paths(path, config.index_folder) if place.is_file()), None)
        for path in paths
    ]
    return index, Counter(place.parent for place in found if place is not None)


def _let_settle(paths: Sequence[str]) -> None:
    """Wait a moment for shards that were written just now: their indexes would not be believed."""
    newest = max((os.stat(path).st_mtime for path in paths if not is_remote(path)), default=0.0)
    age = time.time() - newest
    if 0 <= age < FRESH_SECONDS:
        time.sleep(FRESH_SECONDS - age)
