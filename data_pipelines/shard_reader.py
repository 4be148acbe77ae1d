"""Members of samples by position, from disks and stores."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from data_pipelines.errors import FieldError
from data_pipelines.shard_index import ShardIndex
from data_pipelines.sources import ReadError, is_remote, read_range, retried

MAX_MEMBER_BYTES = 256 << 20
OPEN_FILES = 64
PREFETCHED = 32  # samples whose bytes are fetched at a time
PREFETCHED_BYTES = 32 << 20
GAP_BYTES = 64 << 10  # between members of a sample, which one request reads along
Bytes = bytes | bytearray
Fetched = tuple[int, Bytes] | ReadError  # offset in the shard and what is there
FAILING_SECONDS = 60.0


class ShardReader:
    """Reads members by position; files are opened in the process that reads them.

    One read takes the members of a sample that lie side by side, `prefetch` those of many samples:
    of stores at once, of disks one after the other, which is quicker than in between other work. A
    read that fails is repeated as the index's `reading` says; a shard that has just failed for good
    gets one attempt for each sample, so that a dead server does not stop everything.

    Args:
        index: where the members lie.
        members: extensions of those that will be asked for of every sample, which may be none;
            None for all that there are.
    """

    def __init__(self, index: ShardIndex, members: Sequence[str] | None = None) -> None:
        self.index = index
        wanted = index.members if members is None else members
        self.members = tuple(dict.fromkeys(ext for ext in wanted if ext in index.members))
        self._reset()

    def _reset(self) -> None:
        self._files: dict[int, int] = {}
        self._fetched: dict[int, Fetched] = {}  # by `prefetch`
        self._alone: dict[int, Fetched] = {}  # the last one that was not
        self._failed: dict[int, float] = {}
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        nothing = {"_files": {}, "_fetched": {}, "_alone": {}, "_failed": {}, "_owner": -1}
        return self.__dict__ | nothing

    def read(self, sample: int, ext: str, limit: int = MAX_MEMBER_BYTES) -> Bytes | None:
        """Contents of member `ext` of sample number `sample`, or None where it has none.

        Raises:
            FieldError: the member is over `limit` bytes, and nothing of it is read; or it cannot be
                read, in several attempts.
        """
        table = self.index.members.get(ext)
        if table is None:
            return None
        offset, length = table[sample].tolist()
        if offset < 0:
            return None
        if length > limit:
            raise FieldError(f"{ext} member over {limit} bytes")
        self._own()
        fetched = self._fetched.get(sample, self._alone.get(sample))
        shard = self.index.shard_number(sample)
        if fetched is None and ext in self.members and is_remote(self.index.paths[shard]):
            fetched = self._fetch(sample, shard)
            self._alone = {sample: fetched}
        if isinstance(fetched, ReadError):
            raise fetched
        if fetched is not None:
            start, data = fetched
            if start <= offset and offset + length <= start + len(data):
                return data[offset - start : offset - start + length]
        return self._attempt(shard, offset, length)

    def prefetch(self, samples: Sequence[int]) -> list[int]:
        """Fetch what there is of a few samples, PREFETCHED_BYTES at most and the rest when it is
        asked for; returns those that are there. They are kept until the next call, whatever else
        is read."""
        self._own()
        self._fetched, self._alone = {}, {}
        left, remote = PREFETCHED_BYTES, list[tuple[int, int]]()
        for sample in samples:
            start, length = self._stretch(sample)
            if not length:
                continue
            left -= length
            if left < 0:
                break
            shard = self.index.shard_number(sample)
            if is_remote(self.index.paths[shard]):
                remote.append((sample, shard))
            else:
                # What fails is tried anew, and reported, when it is asked for.
                with suppress(OSError):
                    self._fetched[sample] = start, self._read_local(shard, start, length)
        if len(remote) > 1:
            with ThreadPoolExecutor(len(remote)) as pool:
                for sample, data in pool.map(lambda at: (at[0], self._fetch(*at)), remote):
                    self._fetched[sample] = data
        return list(self._fetched)

    def ahead(self, samples: Sequence[int]) -> Iterator[int]:
        """The samples in their order, each after it was fetched together with a few others."""
        for start in range(0, len(samples), PREFETCHED):
            self.prefetch(samples[start : start + PREFETCHED])
            yield from samples[start : start + PREFETCHED]

    def shard_of(self, sample: int) -> str:
        """Path of the shard that holds sample number `sample`."""
        return self.index.paths[self.index.shard_number(sample)]

    def _own(self) -> None:
        if self._owner != os.getpid():  # after a fork the parent's files stay the parent's
            self._reset()

    def _stretch(self, sample: int) -> tuple[int, int]:
        """Offset and length of a stretch with the members of a sample; of no length where they lie
        far apart or are large, for then each is read on its own."""
        first, last, wanted = 1 << 62, 0, 0
        for ext in self.members:
            offset, length = self.index.members[ext][sample].tolist()
            if offset >= 0:
                first, last = min(first, offset), max(last, offset + length)
                wanted += length
        if last - first > min(wanted + GAP_BYTES, MAX_MEMBER_BYTES):
            return 0, 0
        return (first, last - first) if last else (0, 0)

    def _fetch(self, sample: int, shard: int) -> Fetched:
        start, length = self._stretch(sample)
        try:
            return start, self._attempt(shard, start, length)
        except ReadError as error:
            return error

    def _attempt(self, shard: int, offset: int, length: int) -> Bytes:
        """Bytes of a shard, with as many attempts as it deserves."""
        reading, path = self.index.reading, self.index.paths[shard]
        failed = self._failed.get(shard)
        if failed is not None and time.monotonic() - failed < FAILING_SECONDS:
            reading = replace(reading, attempts=1)
        try:
            if is_remote(path):
                return read_range(path, offset, length, reading)
            return retried(lambda: self._read_local(shard, offset, length), reading)
        except ReadError:
            self._failed[shard] = time.monotonic()
            raise

    def _read_local(self, shard: int, offset: int, length: int) -> bytearray:
        data = bytearray(length)  # which torch takes as it is
        try:
            if os.preadv(self._descriptor(shard), [data], offset) < length:
                raise OSError("shard ends early")
        except OSError:
            if shard in self._files:  # opened anew at the next attempt, as network disks may need
                os.close(self._files.pop(shard))
            raise
        return data

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.index.paths[shard], os.O_RDONLY)
        return self._files[shard]
