"""Mixtures, sampling with replacement, and exactly-once under changing worlds and workers."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import StreamConfig
from data_pipelines.order import (
    MIX_SLOTS,
    MixedOrder,
    Order,
    ReplacementOrder,
    SampleOrder,
    build_order,
)
from data_pipelines.shards import ShardError, ShardIndex
from data_pipelines.stream import Stream

GOLDEN_MIX = [11, 10, 13, 14, 2, 4, 12, 9, 9, 14]
GOLDEN_DRAWS = [12, 13, 11, 12, 10, 10, 10, 6, 9, 14]


def load(sample: int) -> dict[str, Any]:
    return {"sample": torch.tensor(sample), "draw": torch.rand(1)}


def stream_of(sizes: list[int], sources: tuple[int, ...] = (), **options: Any) -> Stream:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    paths = tuple(f"{number}.tar" for number in range(len(sizes)))
    keys = np.array([""] * int(starts[-1]), np.dtypes.StringDType())
    index = ShardIndex(paths, starts, keys, {}, (), (0,) * len(paths), sources)
    defaults = {"seed": 0, "shuffle": True, "window": 8, "rank": 0, "world": 1, "workers": 0}
    return Stream(index, load, **defaults | options)


def global_batches(sizes: list[int], world: int, start: int, stop: int, **options: Any) -> Any:
    """Samples and draws of each global batch, gathered from the processes."""
    ranks = [stream_of(sizes, rank=r, world=world, **options) for r in range(world)]
    steps = zip(*(stream.batches(start) for stream in ranks), strict=True)
    for step in itertools.islice(steps, stop - start):
        yield [
            (int(sample), float(draw))
            for batch in step
            for sample, draw in zip(batch["sample"], batch["draw"][:, 0], strict=True)
        ]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(lambda s: sum(s) >= 12),
    seed=st.integers(0, 2**64),
    window=st.integers(1, 60),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    mode=st.sampled_from(["plain", "mixed", "replacement"]),
)
@settings(max_examples=30, deadline=None)
def test_any_series_of_stops_and_worlds_gives_the_unbroken_sequence(
    sizes: list[int], seed: int, window: int, worlds: list[int], steps: list[int], mode: str
) -> None:
    config = StreamConfig(with_replacement=mode == "replacement")
    options: dict[str, Any] = {"seed": seed, "window": window, "global_batch": 12}
    if mode == "mixed":
        config.weights = [1.0, 2.0]
        sizes = [max(1, size) for size in [*sizes, 3]]
        options["sources"] = (len(sizes) - 1, 1)
    options["config"] = config
    position, broken = 0, []
    for world, count in zip(worlds, steps, strict=False):
        broken += list(global_batches(sizes, world, position, position + count, **options))
        position += count
    assert broken == list(global_batches(sizes, 1, 0, position, **options))
    if mode == "plain":
        total = sum(sizes)
        seen = [sample for batch in broken for sample, _ in batch]
        for epoch in range(len(seen) // total):
            assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_worker_counts_may_change_with_the_world() -> None:
    """More workers than shards, in real loader processes."""
    options: dict[str, Any] = {"seed": 5, "global_batch": 6}
    plan = [(1, 3, 0, 3), (3, 1, 3, 5), (2, 2, 5, 7)]
    broken = [
        batch
        for world, workers, start, stop in plan
        for batch in global_batches([20, 1], world, start, stop, workers=workers, **options)
    ]
    assert broken == list(global_batches([20, 1], 1, 0, 7, **options))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 2**64),
)
@settings(max_examples=6, deadline=None)
def test_mixtures_keep_weights_and_use_each_source_evenly(
    sizes: list[int], weights: list[float], seed: int
) -> None:
    weights = weights[: len(sizes)]
    order = build_order(
        np.array(sizes), [1] * len(sizes), seed=seed, shuffle=True, window=7, weights=weights
    )
    samples = [order.candidate(serial, 0) for serial in range(2 * MIX_SLOTS)]
    ends = np.cumsum(sizes)
    shares = Counter(np.searchsorted(ends, samples[:MIX_SLOTS], side="right").tolist())
    for source, weight in enumerate(weights):
        exact = MIX_SLOTS * weight / sum(weights)
        assert abs(shares[source] - exact) <= max(1, len(sizes) - 1), (shares, weights)
    counts = Counter(samples)
    for end, size in zip(ends, sizes, strict=True):
        visits = [counts[sample] for sample in range(end - size, end)]
        assert max(visits) - min(visits) <= 1


def test_replacement_follows_the_weights() -> None:
    order = ReplacementOrder([100, 10, 1000], [1.0, 2.0, 1.0], seed=4)
    draws = np.array([order.candidate(serial, 0) for serial in range(20_000)])
    shares = np.histogram(draws, [0, 100, 110, 1110])[0] / len(draws)
    assert np.abs(shares - [0.25, 0.5, 0.25]).max() < 0.015
    even = build_order(
        np.array([3, 1]), [1, 1], seed=0, shuffle=True, window=1, with_replacement=True
    )
    counts = np.bincount([even.candidate(serial, 0) for serial in range(8000)])
    assert np.abs(counts / 2000 - 1).max() < 0.1
    assert {even.candidate(7, attempt) for attempt in range(40)} == {0, 1, 2, 3}


def small_orders() -> list[Order]:
    sizes = np.array([5, 4, 6])
    options: dict[str, Any] = {"seed": 7, "shuffle": True, "window": 6, "weights": [1.0, 3.0]}
    return [
        build_order(sizes, [2, 1], **options),
        build_order(sizes, [2, 1], with_replacement=True, **options),
    ]


def test_the_orders_never_change() -> None:
    # Pinned: a run must be resumable after an upgrade of Python or numpy.
    mixed, drawn = small_orders()
    assert [mixed.candidate(serial, 0) for serial in range(10)] == GOLDEN_MIX
    assert [drawn.candidate(serial, 0) for serial in range(10)] == GOLDEN_DRAWS


def test_any_place_is_reached_at_once() -> None:
    for order in small_orders():
        copy = pickle.loads(pickle.dumps(order))
        assert 0 <= copy.candidate(10**15, 0) < 15
        assert copy.candidate(10**15, 0) == order.candidate(10**15, 0)
        assert len(pickle.dumps(order)) < 4096


def test_a_source_without_a_good_sample_is_replaced_by_the_next() -> None:
    mixed = small_orders()[0]
    assert isinstance(mixed, MixedOrder)
    serial = next(serial for serial in range(99) if mixed.locate(serial)[0] == 1)
    candidates = [mixed.candidate(serial, attempt) for attempt in range(mixed.span)]
    assert sorted(candidates) == list(range(15))
    assert sorted(candidates[:6]) == [9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([2, 1], [1.0], "data.weights has 1 numbers, but data.shards has 2 sources"),
        ([2, 1], [1.0, 0.0], "must be positive"),
        ([2, 1], [1.0, float("nan")], "must be positive"),
        ([1, 1, 1], [1.0, 1.0, 1.0], "source 3 of data.shards has a weight, but no sample"),
        ([1, 2], [1.0, 1e9], "less than one in 8192"),
    ],
)
@pytest.mark.parametrize("replacement", [False, True])
def test_weights_that_cannot_be_are_explained(
    sources: list[int], weights: list[float], message: str, replacement: bool
) -> None:
    possible = replacement and "8192" in message  # any share can be drawn
    with nullcontext() if possible else pytest.raises(ShardError, match=message):
        build_order(
            np.array([3, 3, 0]),
            sources,
            seed=0,
            shuffle=True,
            window=4,
            weights=weights,
            with_replacement=replacement,
        )


def test_another_mixture_is_another_stream() -> None:
    def identity(**options: Any) -> dict[str, Any]:
        return stream_of([9, 9], (1, 1), global_batch=6, config=StreamConfig(**options)).identity()

    settings = [{}, {"weights": [1.0, 1.0]}, {"weights": [1.0, 2.0]}, {"with_replacement": True}]
    identities = [identity(**options) for options in settings]
    for one, other in itertools.permutations(identities, 2):
        # As a resume compares them: the new stream's names, with what the old one had.
        assert any(value != other.get(name) for name, value in one.items())
    assert isinstance(stream_of([9], global_batch=3).dataset.order, SampleOrder)
