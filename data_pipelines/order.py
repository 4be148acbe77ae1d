"""Orders of samples, each a pure function of a seed and a serial number.

`SampleOrder` uses every sample once per epoch; `MixedOrder` takes from several sources by weight,
each used once per epoch of its own; `ReplacementOrder` draws every sample anew. None has a state:
any serial number can be asked for at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import ShardError

MIX_SLOTS = 4096  # serial numbers within which the weights of a mixture are kept exactly


class Order(Protocol):
    """What a stream asks of an order."""

    total: int
    """Samples there are."""
    span: int
    """Candidates there are for a serial number."""

    def candidate(self, serial: int, attempt: int) -> int:
        """Number, in shard order, of the sample to try for a serial number: attempt 0 is the one
        that belongs there, later ones replace it if it cannot be used."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the order besides the shards, as plain values."""
        ...


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
        if attempt == 0:
            return serial
        epoch, position = divmod(serial, self.total)
        first = min(position - position % self.window, self.total - self.span)
        place = (position - first + attempt * self._stride) % self.span
        return epoch * self.total + first + place

    def candidate(self, serial: int, attempt: int) -> int:
        """Number of the sample to try for a serial number."""
        return self.sample(self.substitute(serial, attempt))

    def identity(self) -> dict[str, Any]:
        """What decides the order besides the shards."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shuffle_window": self.window,
            "weights": None,
            "with_replacement": None,
        }

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
        shards = permutation(len(self.sizes), self.seed, epoch, 0)
        sizes = self.sizes[shards]
        ends = np.cumsum(sizes)
        first = np.concatenate([[0], np.cumsum(self.sizes)])[:-1][shards]
        start = window * self.window
        positions = np.arange(start, min(start + self.window, self.total))
        block = np.searchsorted(ends, positions, side="right")
        samples = first[block] + positions - (ends - sizes)[block]
        return samples[permutation(len(samples), self.seed, epoch, window + 1)]


class MixedOrder:
    """Samples of several sources in fixed proportions.

    Each block of MIX_SLOTS serial numbers holds as many samples of a source as its weight says,
    rounded, at least one, in places that are drawn for the block. The samples of a source come in
    the order of its own `SampleOrder`: each is used once before any is used again.

    Raises:
        ShardError: the weights do not fit the sources, or a source is empty.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        _check_weights(weights, [order.total for order in orders])
        self.orders, self.weights, self.seed = list(orders), list(weights), seed
        self.total = sum(order.total for order in orders)
        self.span = sum(order.span for order in orders)
        self.firsts = np.cumsum([0, *(order.total for order in orders)]).tolist()
        self.slots = _slots(weights)
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_cache": {}}

    def candidate(self, serial: int, attempt: int) -> int:
        source, place = self.locate(serial)
        while attempt >= self.orders[source].span:  # all of it are unusable: on to the next
            attempt -= self.orders[source].span
            source = (source + 1) % len(self.orders)
        return self.firsts[source] + self.orders[source].candidate(place, attempt)

    def locate(self, serial: int) -> tuple[int, int]:
        """Source of a serial number, and the serial number within that source."""
        block, place = divmod(serial, MIX_SLOTS)
        if block not in self._cache:
            if len(self._cache) >= 2:
                self._cache.pop(next(iter(self._cache)))
            self._cache[block] = self._draw(block)
        sources, ranks = self._cache[block]
        source = int(sources[place])
        return source, block * int(self.slots[source]) + int(ranks[place])

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place in a block, and how many of the same source stand before it."""
        sources = np.repeat(np.arange(len(self.slots)), self.slots)
        sources = sources[permutation(MIX_SLOTS, self.seed, -1, block)]
        ranks = np.empty(MIX_SLOTS, np.int64)
        for source, count in enumerate(self.slots):
            ranks[sources == source] = np.arange(count)
        return sources, ranks

    def identity(self) -> dict[str, Any]:
        weights = [[order.total, w] for order, w in zip(self.orders, self.weights, strict=True)]
        return self.orders[0].identity() | {"seed": self.seed, "weights": weights}


class ReplacementOrder:
    """Every serial number draws a source by weight, and one of its samples.

    Args:
        sizes: samples of each source.
        weights: of each source; without them every sample is as likely as any other.

    Raises:
        ShardError: the weights do not fit the sources, or a source is empty.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        weights = list(weights or sizes)
        _check_weights(weights, sizes)
        self.sizes, self.weights, self.seed = list(sizes), weights, seed
        self.total = sum(sizes)
        self.span = self.total
        self.firsts = np.cumsum([0, *sizes]).tolist()
        self.limits = np.cumsum(weights) / math.fsum(weights)

    def candidate(self, serial: int, attempt: int) -> int:
        number = hash_of(self.seed, -2, serial, attempt)
        share, place = (number >> 75) / 2**53, number & (2**64 - 1)
        source = int(np.searchsorted(self.limits[:-1], share, side="right"))
        return self.firsts[source] + place % self.sizes[source]

    def identity(self) -> dict[str, Any]:
        weights = [[size, w] for size, w in zip(self.sizes, self.weights, strict=True)]
        return {"seed": self.seed, "weights": weights, "with_replacement": True}


def build_order(
    sizes: np.ndarray,
    sources: Sequence[int],
    *,
    seed: int,
    shuffle: bool,
    window: int,
    weights: Sequence[float] = (),
    with_replacement: bool = False,
) -> Order:
    """The order that settings ask for.

    Args:
        sizes: samples of each shard.
        sources: numbers of shards of each source; empty for one source.
        seed: see `SampleOrder`.
        shuffle: see `SampleOrder`.
        window: see `SampleOrder`.
        weights: of each source, or empty.

    Raises:
        ShardError: the weights do not fit the sources, or a weighted source is empty.
    """
    ends = np.cumsum(sources)[:-1] if len(sources) else []
    parts = np.split(sizes, ends)
    if with_replacement:
        if not weights:
            parts = [sizes]
        return ReplacementOrder([int(part.sum()) for part in parts], weights, seed)
    if not weights:
        return SampleOrder(sizes, seed, shuffle, window)
    if len(weights) != len(parts):
        raise ShardError(_count_message(weights, len(parts)))
    orders = [
        SampleOrder(part, hash_of(seed, -3, number), shuffle, window)
        for number, part in enumerate(parts)
    ]
    return MixedOrder(orders, weights, seed)


def _check_weights(weights: Sequence[float], sizes: Sequence[int]) -> None:
    if len(weights) != len(sizes):
        raise ShardError(_count_message(weights, len(sizes)))
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ShardError(f"data.weights must be positive numbers, got {list(weights)}")
    if not all(sizes):
        number = list(sizes).index(0) + 1
        raise ShardError(f"source {number} of data.shards has a weight, but no sample")


def _count_message(weights: Sequence[float], sources: int) -> str:
    return (
        f"data.weights has {len(weights)} numbers, but data.shards has {sources} sources: give one"
        " for each that '::' joins"
    )


def _slots(weights: Sequence[float]) -> np.ndarray:
    """Places of each source in a block: proportional to the weights, at least one each."""
    if min(weights) / math.fsum(weights) < 0.5 / MIX_SLOTS:
        raise ShardError(
            f"data.weights: {min(weights)} is less than one in {2 * MIX_SLOTS} of all: raise it, or"
            " leave that source out"
        )
    exact = np.array(weights, float) * (MIX_SLOTS / math.fsum(weights))
    slots = np.maximum(1, np.floor(exact)).astype(np.int64)
    rest = exact - slots
    while (missing := MIX_SLOTS - int(slots.sum())) != 0:
        source = int(np.argmax(rest) if missing > 0 else np.argmin(np.where(slots > 1, rest, 9)))
        slots[source] += 1 if missing > 0 else -1
        rest[source] -= 1 if missing > 0 else -1
    return slots


def permutation(count: int, *key: int) -> np.ndarray:
    """Numbers below `count`, (count,) int64, in an order that the key decides for ever."""
    # numpy promises that the raw output of a bit generator never changes, unlike `permutation`.
    bits = np.random.Philox(key=hash_of(*key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def hash_of(*numbers: int) -> int:
    """A number below 2**128 that the numbers decide for ever."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:16], "big")
