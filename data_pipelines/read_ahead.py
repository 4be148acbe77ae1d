"""What is stored of a few samples, read before the first of them is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from data_pipelines.shard_reader import ShardReader
from data_pipelines.shards import FieldError
from data_pipelines.stream import SkipSample

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Records of samples, read together where their bytes were fetched together.

    Decoding a picture drives all other code out of the processor's caches, so reading a few samples
    and then decoding them takes less time than doing both in turn (docs/results.md, "Decoding and
    the stream").

    Args:
        read: gives the record of a sample, without drawing numbers, or raises FieldError or
            SkipSample.
        reader: what `read` reads with; None where nothing can be fetched ahead.
    """

    def __init__(self, read: Callable[[int], T], reader: ShardReader | None) -> None:
        self._read, self._reader = read, reader
        self._records: dict[int, T] = {}

    def fetch(self, samples: Sequence[int]) -> None:
        """Read a few samples; what is left of earlier ones is dropped."""
        self._records.clear()
        for sample in self._reader.prefetch(samples) if self._reader is not None else ():
            with suppress(FieldError, SkipSample):  # raised when the sample's turn comes
                self._records[sample] = self._read(sample)

    def take(self, sample: int) -> T:
        """The record of a sample, read now where it was not before.

        Raises:
            FieldError, SkipSample: it cannot be read.
        """
        record = self._records.pop(sample, None)
        return self._read(sample) if record is None else record
