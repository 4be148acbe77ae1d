"""Where every sample of a list of shards lies."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data_pipelines.config import ReadingConfig
from data_pipelines.errors import ShardError


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of a list of shards, in shard order.

    `keys` (N,) are sample keys, strings of any width; `members[ext]` (N, 2) int64 holds offset and
    length in bytes of that member, or -1 where a sample lacks it; `starts` (shards + 1,) are
    cumulative sample counts; `file_bytes` are the sizes of the shards; `truncated` names shards
    that end early or are damaged (the complete samples before that place are kept).
    `sources` are the numbers of shards of each source, empty for a single one; `reading` says how
    members are read.
    """

    paths: tuple[str, ...]
    starts: np.ndarray
    keys: np.ndarray
    members: dict[str, np.ndarray]
    truncated: tuple[str, ...]
    file_bytes: tuple[int, ...]
    sources: tuple[int, ...] = ()
    reading: ReadingConfig = field(default_factory=ReadingConfig)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, (shards,) int64."""
        return np.diff(self.starts)

    def shard_number(self, sample: int) -> int:
        """Number of the shard that holds sample number `sample`."""
        return bisect_right(self._starts, sample) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return self.starts.tolist()  # which is searched in a third of an array's time

    def describe(self, sample: int) -> str:
        """Key and shard of a sample, for messages."""
        return f"sample '{self.keys[sample]}' of '{self.paths[self.shard_number(sample)]}'"

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
