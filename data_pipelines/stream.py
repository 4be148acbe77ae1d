"""The training stream: an order of samples that is a pure function of (seed, epoch, shard sizes).

The stream is addressed by one integer, the serial number t of a sample since the start of
training: epoch t // N, position t % N. Global batch g holds the serial numbers
[g * B, (g + 1) * B), and process r takes its r-th contiguous part, so the global batches are the
same for every number of processes and loader workers. Resuming is starting at another g: nothing
is replayed. Every sample is used exactly once per epoch; a batch may span two epochs. Mixtures of
sources and sampling with replacement are orders of their own (`data_pipelines.order`).
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipelines.cached_embeddings import CachedEmbeddings, Side
from data_pipelines.config import StreamConfig
from data_pipelines.errors import ShardError
from data_pipelines.loaders import iterate
from data_pipelines.order import Order, SampleOrder, build_order, hash_of
from data_pipelines.sample_index import SampleIndex
from data_pipelines.shard_index import ShardIndex
from data_pipelines.shard_reader import PREFETCHED
from data_pipelines.shards import describe_skips
from data_pipelines.waiting import Board, Watch, say

Batch = dict[str, Any]
ATTEMPTS = 64
RESUME = "; --resume auto goes on from the last checkpoint"
SETTLED = 100  # samples after which the share of skipped ones says something

__all__ = ["ATTEMPTS", "SampleOrder", "SkipSample", "Stream", "StreamDataset", "collate"]


class SkipSample(ValueError):
    """Raised by a sample loader for a sample that cannot be used; the message is the reason."""


class StreamDataset(Dataset[dict[str, Any]]):
    """Samples by serial number, decoded and augmented with a generator keyed by (seed, serial).

    `load(sample)` returns the fields of one sample, drawing randomness from torch's default
    generator, or raises SkipSample. A sample that is skipped is replaced by another candidate of
    the order; the reason travels with the batch in `skipped`.

    Args:
        order: which sample belongs to a serial number, and what replaces it.
        load: see above.
        seed: see above.
        stop_with: the shards, if an unusable sample ends the stream; for the message.
        read_ahead: reads what `load` needs of a few samples, before the first of them is loaded.
        start_batch: is told how many samples a batch has, before its first.
        board: is told what this process is at.
    """

    def __init__(
        self,
        order: Order,
        load: Callable[[int], dict[str, Any]],
        seed: int,
        *,
        stop_with: SampleIndex | None = None,
        read_ahead: Callable[[Sequence[int]], None] | None = None,
        start_batch: Callable[[int], None] | None = None,
        board: Board | None = None,
    ) -> None:
        self.order, self.load, self.seed = order, load, seed
        self.stop_with, self.read_ahead, self.start_batch = stop_with, read_ahead, start_batch
        self.board = board or Board(workers=0)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The samples of a batch; they are read a few at a time."""
        outside = torch.get_rng_state()  # without workers this is the training process
        try:
            samples: list[dict[str, Any]] = []
            if self.start_batch is not None:
                self.start_batch(len(indices))
            for start in range(0, len(indices), PREFETCHED):
                some = indices[start : start + PREFETCHED]
                numbers = [self.order.candidate(index, 0) for index in some]
                seeds = [hash_of(self.seed, index) >> 65 for index in some]
                if self.read_ahead is not None:
                    self.board.start(numbers[0])
                    self.read_ahead(numbers)
                samples += map(self._load, some, numbers, seeds)
            return samples
        finally:
            torch.set_rng_state(outside)
            self.board.rest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def _load(self, index: int, sample: int, seed: int) -> dict[str, Any]:
        """The sample of a serial number, or what takes its place."""
        skipped: list[str] = []
        for attempt in range(min(ATTEMPTS, self.order.span)):
            if attempt:
                sample = self.order.candidate(index, attempt)
            self.board.start(sample)
            torch.default_generator.manual_seed(seed)
            try:
                return self.load(sample) | {"skipped": skipped}
            except SkipSample as reason:
                if self.stop_with is not None:
                    raise ShardError(
                        f"{self.stop_with.describe(sample)} cannot be used: {reason};"
                        " data.on_bad_sample skip would count it and go on"
                    ) from reason
                skipped.append(str(reason))
        reasons = Counter(skipped).most_common(3)
        raise ShardError(
            f"{len(skipped)} samples in a row cannot be used: "
            + ", ".join(f"{reason} ({count})" for reason, count in reasons)
            + "; data.on_bad_sample stop names the first"
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
        seed: of the order, and of what is drawn for each sample.
        shuffle: whether the order is another in each epoch.
        window: samples that are shuffled together.
        global_batch: samples per step over all processes.
        rank: this process.
        world: how many processes there are.
        workers: loader processes; 0 decodes in the training process.
        cached: embeddings that are streamed in place of what a tower would read, by side.
        config: weights of sources, and what to do about bad samples and long waits.
        finish: what this process does with each batch before it is handed out.

    Raises:
        ShardError: the batch is larger than the data set, or weights do not fit the sources.
        ValueError: the batch cannot be divided among the processes, or a setting out of range.
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
        config: StreamConfig | None = None,
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
        self.config = config = config or StreamConfig()
        _check_config(config)
        order = build_order(
            index.sizes,
            index.sources if isinstance(index, ShardIndex) else (),
            seed=seed,
            shuffle=shuffle,
            window=window,
            weights=config.weights,
            with_replacement=config.with_replacement,
        )
        self.dataset = StreamDataset(
            order,
            load,
            seed,
            stop_with=index if config.on_bad_sample == "stop" else None,
            read_ahead=getattr(load, "read_ahead", None),
            start_batch=getattr(load, "start_batch", None),
            board=Board(workers),
        )

    def __len__(self) -> int:
        return len(self.index)

    def identity(self) -> dict[str, Any]:
        """What must be unchanged for a resumed run to continue the same sequence."""
        return {
            "shards": self.index.fingerprint(),
            "samples": len(self.index),
            "batch_size": self.global_batch,
            **self.dataset.order.identity(),
            **{f"cached_{side}": cache.digest() for side, cache in self.cached.items()},
        }

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on; the stream never ends, the caller stops.

        Raises:
            ShardError: many samples in a row, or too large a share of all, cannot be used; or one,
                where the settings say so.
            LoaderError: a loader process has died.
        """
        loader = DataLoader(
            self.dataset,
            batch_sampler=StepSampler(self.global_batch, self.rank, self.world, start_step),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_prepare_worker if self.workers else None,
            # A loader draws one number; not from the generator that training uses.
            generator=torch.Generator(),
        )
        try:
            batches = self._checked(iterate(loader, self._at, RESUME))
            yield from batches if self.finish is None else map(self.finish, batches)
        except ShardError as error:
            raise without_stack(error) from None

    def _at(self, pid: int) -> str | None:
        """What a loader process has been at, for messages."""
        sample = self.dataset.board.at(pid)
        return None if sample is None else self.index.describe(sample)

    def _checked(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with a word about long waits and a limit to what is skipped."""
        index, board = self.index, self.dataset.board
        seen, skipped = 0, Counter[str]()
        with Watch(self.config.report_wait, lambda waited: board.describe(index, waited)) as watch:
            while True:
                with watch.waiting():
                    batch = next(batches)
                seen += self.global_batch // self.world
                if self.rank == 0:
                    _say_new(batch["skipped"], skipped)
                skipped.update(batch["skipped"])
                check_skipped(seen, skipped, self.config.max_skipped)
                yield batch


def _check_config(config: StreamConfig) -> None:
    """Raise ValueError for numbers that nothing can be done with."""
    limits = {
        "max_pixels": (config.max_pixels, config.max_pixels >= 1, "at least 1"),
        "max_skipped": (config.max_skipped, 0 <= config.max_skipped <= 1, "from 0 to 1"),
        "report_wait": (config.report_wait, config.report_wait > 0, "above 0"),
        "reading.attempts": (config.reading.attempts, config.reading.attempts >= 1, "at least 1"),
        "reading.backoff": (config.reading.backoff, config.reading.backoff >= 0, "0 or more"),
        "reading.timeout": (config.reading.timeout, config.reading.timeout > 0, "above 0"),
    }
    for name, (value, fits, range_) in limits.items():
        if not fits:
            raise ValueError(f"data.{name} must be {range_}, got {value}")


def _say_new(reasons: Iterable[str], known: Container[str]) -> None:
    """A line for every reason that is met for the first time."""
    for reason in dict.fromkeys(reasons):
        if reason not in known:
            say(f"warning: a sample is skipped: {reason} (said once; metrics.jsonl counts them)")


def check_skipped(seen: int, skipped: Counter[str], limit: float) -> None:
    """Raise ShardError where more than the share `limit` of at least SETTLED samples that were
    tried, seen or skipped, were skipped."""
    tried = seen + skipped.total()
    if tried >= SETTLED and skipped.total() > limit * tried:
        raise ShardError(
            f"of {tried} samples, {describe_skips(skipped)}; that is more than data.max_skipped"
            f" {limit:g} allows: mend the shards, or raise it"
        )


def without_stack(error: ShardError) -> ShardError:
    """The error of a loader as its reader should see it.

    Loader processes put their stack in front of the message, and torch's own frames keep the
    loader in a reference cycle with the error, which delays the end by seconds.
    """
    error.__traceback__ = None
    return ShardError(str(error).rpartition("ShardError: ")[2].strip())


def _prepare_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Schedulers and terminals signal every process; a training process that saves its state on a
    # signal must not lose its loaders to it. They end with their parent.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


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
    """Stack; pictures keep their channels side by side in memory (channels last), and are not
    copied where they are the rows of a batch already.

    Taking them apart on the way would cost as much as a twentieth of decoding a small picture.
    """
    if values[0].ndim == 3 and values[0].stride(0) == 1:
        if _are_rows(values):
            return values[0].as_strided(
                (len(values), *values[0].shape), (values[0].numel(), *values[0].stride())
            )
        return torch.stack([value.permute(1, 2, 0) for value in values]).permute(0, 3, 1, 2)
    return torch.stack(values)


def _are_rows(values: list[torch.Tensor]) -> bool:
    """Whether tensors follow upon each other in memory, from its start to its end."""
    first = values[0]
    size = first.numel() * first.element_size()
    storage = first.untyped_storage()
    if storage.nbytes() != size * len(values) or not first.permute(1, 2, 0).is_contiguous():
        return False
    shape, strides, start = first.shape, first.stride(), storage.data_ptr()
    return all(
        value.data_ptr() == start + row * size
        and value.shape == shape
        and value.stride() == strides
        for row, value in enumerate(values)
    )
