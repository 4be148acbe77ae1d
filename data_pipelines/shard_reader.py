"""Members of samples by position, from disks and stores."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from data_pipelines.errors import FieldError
from data_pipelines.shard_index import ShardIndex
from data_pipelines.sources import ReadError, check_length, is_remote, read_range, retried

MAX_MEMBER_BYTES = 256 << 20
OPEN_FILES = 64
PREFETCHED = 32  # samples whose bytes are fetched from stores side by side
GAP_BYTES = 64 << 10  # between members of a sample, which one request reads along
FAILING_SECONDS = 60.0


class ShardReader:
    """Reads members by position; files are opened in the process that reads them.

    Of stores, one request reads the members of a sample, and `prefetch` those of many samples at
    once. A read that fails is repeated as the index's `reading` says; a shard that has just failed
    for good gets one attempt for each sample, so that a dead server does not stop everything.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._reset()

    def _reset(self) -> None:
        self._files: dict[int, int] = {}
        self._fetched: dict[int, tuple[int, bytes] | ReadError] = {}
        self._failed: dict[int, float] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_files": {}, "_fetched": {}, "_failed": {}, "_owner": -1}

    def read(self, sample: int, ext: str, limit: int = MAX_MEMBER_BYTES) -> bytes | None:
        """Contents of member `ext` of sample number `sample`, or None where it has none.

        Raises:
            FieldError: the member is over `limit` bytes, and nothing of it is read; or it cannot be
                read, in several attempts.
        """
        table = self.index.members.get(ext)
        if table is None or table[sample, 0] < 0:
            return None
        offset, length = (int(v) for v in table[sample])
        if length > limit:
            raise FieldError(f"{ext} member over {limit} bytes")
        if self._owner != os.getpid():  # after a fork the parent's files stay the parent's
            self._reset()
        shard = self.index.shard_number(sample)
        if not is_remote(self.index.paths[shard]):
            return self._attempt(shard, offset, length)
        if sample not in self._fetched:
            self._fetched.clear()
            self._fetched[sample] = self._fetch(sample)
        fetched = self._fetched[sample]
        if isinstance(fetched, ReadError):
            raise fetched
        start, data = fetched
        if start <= offset and offset + length <= start + len(data):
            return data[offset - start : offset - start + length]
        return self._attempt(shard, offset, length)

    def prefetch(self, samples: Sequence[int]) -> None:
        """Fetch what stores hold of a few samples side by side; nothing is kept of earlier ones."""
        remote = [s for s in samples if is_remote(self.shard_of(s))]
        self._fetched.clear()
        if len(remote) < 2:
            return
        if self._owner != os.getpid():
            self._reset()
        with ThreadPoolExecutor(len(remote)) as pool:
            self._fetched.update(zip(remote, pool.map(self._fetch, remote), strict=True))

    def shard_of(self, sample: int) -> str:
        """Path of the shard that holds sample number `sample`."""
        return self.index.paths[self.index.shard_number(sample)]

    def _fetch(self, sample: int) -> tuple[int, bytes] | ReadError:
        """Offset and bytes of a stretch with the members of a sample; nothing where they lie far
        apart or are large, for then each is read on its own."""
        places = [table[sample].tolist() for table in self.index.members.values()]
        places = [(start, length) for start, length in places if start >= 0]
        first = min(start for start, _ in places)
        last = max(start + length for start, length in places)
        wanted = sum(length for _, length in places)
        if last - first > min(wanted + GAP_BYTES, MAX_MEMBER_BYTES):
            return 0, b""
        try:
            return first, self._attempt(self.index.shard_number(sample), first, last - first)
        except ReadError as error:
            return error

    def _attempt(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of a shard, with as many attempts as it deserves."""
        reading, path = self.index.reading, self.index.paths[shard]
        if time.monotonic() - self._failed.get(shard, -FAILING_SECONDS) < FAILING_SECONDS:
            reading = replace(reading, attempts=1)
        try:
            if is_remote(path):
                return read_range(path, offset, length, reading)
            return retried(lambda: self._read_local(shard, offset, length), reading)
        except ReadError:
            self._failed[shard] = time.monotonic()
            raise

    def _read_local(self, shard: int, offset: int, length: int) -> bytes:
        try:
            return check_length(os.pread(self._descriptor(shard), length, offset), length)
        except OSError:
            if shard in self._files:  # opened anew at the next attempt, as network disks may need
                os.close(self._files.pop(shard))
            raise

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.index.paths[shard], os.O_RDONLY)
        return self._files[shard]
