"""The training stream: an order of samples that is a pure function of (seed, epoch, shard sizes).

The stream is addressed by one integer, the serial number t of a sample since the start of
training: epoch t // N, position t % N. Global batch g holds the serial numbers
[g * B, (g + 1) * B), and process r takes its r-th contiguous part, so the global batches are the
same for every number of processes and loader workers. Resuming is starting at another g: nothing
is replayed. Every sample is used exactly once per epoch; a batch may span two epochs.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.cached_embeddings import CachedEmbeddings, Side
from data_pipelines.sample_index import SampleIndex
from data_pipelines.shards import ShardError

Batch = dict[str, Any]
ATTEMPTS = 64


class SkipSample(ValueError):
    """Raised by a sample loader for a sample that cannot be used; the message is the reason."""


class SampleOrder:
    """Permutation of the samples of each epoch, computed window by window.

    Shards are permuted first; then the samples of each window of `window` consecutive samples are
    permuted among themselves. With a window of at least N this is a full shuffle. Memory and the
    cost of jumping to any position are those of one window.
    """

    def __init__(self, sizes: np.ndarray, seed: int, shuffle: bool, window: int) -> None:
        if window < 1:
            raise ValueError(f"shuffle_window must be at least 1, got {window}")
        self.sizes, self.seed, self.shuffle, self.window = sizes, seed, shuffle, window
        self.total = int(sizes.sum())
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        # Substitutes come from a span as long as the window, so that its permutation is at hand;
        # of few or short windows, from more. Strides without a common factor with the span visit
        # all of it, and near 0.38 of it their successive places lie far apart.
        self.span = min(self.total, max(window, 4096))
        self._stride = max(1, round(0.382 * self.span))
        while math.gcd(self._stride, self.span) > 1:
            self._stride += 1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_cache": {}}

    def substitute(self, serial: int, attempt: int) -> int:
        """Serial number to try instead of `serial`: the same epoch, different for each attempt.

        Attempt 0 is `serial` itself; attempts below `span` are all different.
        """
        epoch, position = divmod(serial, self.total)
        first = min(position - position % self.window, self.total - self.span)
        place = (position - first + attempt * self._stride) % self.span
        return epoch * self.total + first + place

    def sample(self, serial: int) -> int:
        """Number of the sample, in shard order, that has the serial number `serial`."""
        epoch, position = divmod(serial, self.total)
        if not self.shuffle:
            return position
        window, place = divmod(position, self.window)
        if (epoch, window) not in self._cache:
            if len(self._cache) >= 2:  # a batch touches two windows at most
                self._cache.pop(next(iter(self._cache)))
            self._cache[epoch, window] = self._permute(epoch, window)
        return int(self._cache[epoch, window][place])

    def _permute(self, epoch: int, window: int) -> np.ndarray:
        shards = _permutation(len(self.sizes), self.seed, epoch, 0)
        sizes = self.sizes[shards]
        ends = np.cumsum(sizes)
        first = np.concatenate([[0], np.cumsum(self.sizes)])[:-1][shards]
        start = window * self.window
        positions = np.arange(start, min(start + self.window, self.total))
        block = np.searchsorted(ends, positions, side="right")
        samples = first[block] + positions - (ends - sizes)[block]
        return samples[_permutation(len(samples), self.seed, epoch, window + 1)]


def _permutation(count: int, *key: int) -> np.ndarray:
    # numpy promises that the raw output of a bit generator never changes, unlike `permutation`.
    bits = np.random.Philox(key=_hash(*key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def _hash(*numbers: int) -> int:
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:16], "big")


class StreamDataset(Dataset[dict[str, Any]]):
    """Samples by serial number, decoded and augmented with a generator keyed by (seed, serial).

    `load(sample)` returns the fields of one sample, drawing randomness from torch's default
    generator, or raises SkipSample. A sample that is skipped is replaced by one from elsewhere in
    the epoch's order (`SampleOrder.substitute`); the reason travels with the batch in `skipped`.
    """

    def __init__(
        self, order: SampleOrder, load: Callable[[int], dict[str, Any]], seed: int
    ) -> None:
        self.order, self.load, self.seed = order, load, seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        skipped: list[str] = []
        outside = torch.get_rng_state()  # without workers this is the training process
        try:
            for attempt in range(min(ATTEMPTS, self.order.span)):
                sample = self.order.sample(self.order.substitute(index, attempt))
                torch.default_generator.manual_seed(_hash(self.seed, index) >> 65)
                try:
                    return self.load(sample) | {"skipped": skipped}
                except SkipSample as reason:
                    skipped.append(str(reason))
        finally:
            torch.set_rng_state(outside)
        reasons = Counter(skipped).most_common(3)
        raise ShardError(
            f"{len(skipped)} samples in a row cannot be used: "
            + ", ".join(f"{reason} ({count})" for reason, count in reasons)
        )


class StepSampler(Sampler[list[int]]):
    """Serial numbers of this process's part of each global batch, from step `start` for ever."""

    def __init__(self, global_batch: int, rank: int, world: int, start: int) -> None:
        self.global_batch, self.rank, self.world, self.start = global_batch, rank, world, start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch // self.world
        step = self.start
        while True:
            first = step * self.global_batch + self.rank * share
            yield list(range(first, first + share))
            step += 1


class Stream:
    """An endless sequence of training batches for one process.

    Args:
        index: what the samples are counted in: shards, or a table.
        load: see StreamDataset.
        seed, shuffle, window: the order.
        global_batch: samples per step over all processes.
        rank, world: this process and how many there are.
        workers: loader processes; 0 decodes in the training process.
        cached: embeddings that are streamed in place of what a tower would read, by side.
        finish: what this process does with each batch before it is handed out.

    Raises:
        ShardError: the batch is larger than the data set.
        ValueError: the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        index: SampleIndex,
        load: Callable[[int], dict[str, Any]],
        *,
        seed: int,
        shuffle: bool,
        window: int,
        global_batch: int,
        rank: int,
        world: int,
        workers: int,
        cached: Mapping[Side, CachedEmbeddings] | None = None,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if global_batch % world:
            raise ValueError(
                f"train.batch_size {global_batch} cannot be divided among {world} processes:"
                f" choose a multiple of {world}"
            )
        if global_batch > len(index):
            raise ShardError(
                f"train.batch_size {global_batch} is larger than the data set of {len(index)}"
                " samples: choose a smaller batch or more shards"
            )
        self.index, self.global_batch = index, global_batch
        self.rank, self.world, self.workers = rank, world, workers
        self.cached, self.finish = dict(cached or {}), finish
        self.dataset = StreamDataset(SampleOrder(index.sizes, seed, shuffle, window), load, seed)

    def __len__(self) -> int:
        return len(self.index)

    def identity(self) -> dict[str, Any]:
        """What must be unchanged for a resumed run to continue the same sequence."""
        order = self.dataset.order
        return {
            "shards": self.index.fingerprint(),
            "samples": len(self.index),
            "batch_size": self.global_batch,
            "seed": order.seed,
            "shuffle": order.shuffle,
            "shuffle_window": order.window,
            **{f"cached_{side}": cache.digest() for side, cache in self.cached.items()},
        }

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on; the stream never ends, the caller stops.

        Raises:
            ShardError: many samples in a row cannot be used.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=StepSampler(self.global_batch, self.rank, self.world, start_step),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_one_thread if self.workers else None,
            # A loader draws one number; not from the generator that training uses.
            generator=torch.Generator(),
        )
        try:
            yield from loader if self.finish is None else map(self.finish, loader)
        except ShardError as error:
            raise without_stack(error) from None


def without_stack(error: ShardError) -> ShardError:
    """The error of a loader as its reader should see it.

    Loader processes put their stack in front of the message, and torch's own frames keep the
    loader in a reference cycle with the error, which delays the end by seconds.
    """
    error.__traceback__ = None
    return ShardError(str(error).rpartition("ShardError: ")[2].strip())


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack tensors, keep everything else as lists, and merge the lists of skips."""
    batch: Batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        batch[name] = _stack(values) if isinstance(values[0], torch.Tensor) else values
    if "skipped" in batch:
        batch["skipped"] = [reason for reasons in batch["skipped"] for reason in reasons]
    return batch


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    """Stack; pictures keep their channels side by side in memory (channels last).

    Taking them apart on the way would cost as much as a twentieth of decoding a small picture.
    """
    if values[0].ndim == 3 and values[0].stride(0) == 1:
        return torch.stack([value.permute(1, 2, 0) for value in values]).permute(0, 3, 1, 2)
    return torch.stack(values)
