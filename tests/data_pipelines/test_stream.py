"""The order of samples, and the batches that loader processes make of it."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.shards import ShardError, ShardIndex
from data_pipelines.stream import (
    ATTEMPTS,
    SampleOrder,
    SkipSample,
    Stream,
    StreamDataset,
    collate,
)

SIZES = np.array([7, 1, 0, 12])
TOTAL = 20
GOLDEN_SMALL = [8, 9, 10, 13, 12, 11, 0, 5, 7, 15, 6, 14, 3, 1, 2, 4]
GOLDEN_SMALL += [9, 5, 8, 7, 10, 6, 14, 11, 13, 15, 0, 12, 3, 1, 4, 2]
GOLDEN_LARGE = [660644, 927592, 377953, 358099, 850763, 744378, 833371]


def order_of(sizes: Any, seed: int = 0, shuffle: bool = True, window: int = 200) -> SampleOrder:
    return SampleOrder(np.asarray(sizes), seed, shuffle, window)


def walk(order: SampleOrder, epoch: int) -> list[int]:
    return [order.sample(epoch * order.total + place) for place in range(order.total)]


def random_load(sample: int) -> dict[str, Any]:
    """A sample without files that draws a random number, as augmentation does."""
    return {"sample": torch.tensor(sample), "draw": torch.rand(2), "key": f"k{sample}"}


def stream_of(load: Any = random_load, sizes: Any = SIZES, **options: Any) -> Stream:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    paths = tuple(f"{number}.tar" for number in range(len(sizes)))
    index = ShardIndex(paths, starts, np.array([""] * int(starts[-1])), {}, (), (0,) * len(paths))
    defaults = {"seed": 3, "shuffle": True, "window": 8, "global_batch": 6}
    return Stream(index, load, **{**defaults, "rank": 0, "world": 1, "workers": 0} | options)


def take(stream: Stream, steps: int, start: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(stream.batches(start), steps))


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
            assert same(value, other[name]), name


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    seed=st.integers(-(2**40), 2**70),
    window=st.integers(1, 90),
    epoch=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    walked = walk(order_of(sizes, seed, window=window), epoch)
    assert sorted(walked) == list(range(sum(sizes)))
    jumped = order_of(sizes, seed, window=window)
    for place in reversed(range(len(walked))):
        assert jumped.sample(epoch * len(walked) + place) == walked[place]


def test_windows_shuffle_neighbouring_shards() -> None:
    order = order_of([10] * 30, window=20)
    for start in range(0, 300, 20):
        shards = Counter(order.sample(place) // 10 for place in range(start, start + 20))
        assert sorted(shards.values()) == [10, 10]
    assert walk(order, 0) != sorted(walk(order, 0))


def test_epochs_and_seeds_differ() -> None:
    orders = [walk(order_of(SIZES, seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


def test_without_shuffling_samples_come_in_shard_order() -> None:
    order = order_of(SIZES, shuffle=False)
    assert [order.sample(serial) for serial in range(2 * TOTAL)] == list(range(TOTAL)) * 2


def test_the_order_never_changes() -> None:
    # Pinned: a run must be resumable after an upgrade of Python or numpy.
    order = order_of([5, 3, 0, 8], seed=7, window=6)
    assert [order.sample(serial) for serial in range(32)] == GOLDEN_SMALL
    large = order_of([1000] * 1000, seed=2**63, window=200_000)
    places = (0, 1, 199_999, 200_000, 999_999, 10**6, 10**12 + 5)
    assert [large.sample(place) for place in places] == GOLDEN_LARGE


def test_position_costs_one_window() -> None:
    order = order_of([10_000] * 40_000)  # 400 million samples
    start = time.perf_counter()
    order.sample(123_456_789_012)
    assert time.perf_counter() - start < 1
    assert len(pickle.dumps(order)) < 10 * 40_000


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_window must be at least 1, got 0"):
        order_of(SIZES, window=0)


@given(total=st.integers(1, 9000), window=st.integers(1, 9000), place=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_substitutes_are_different_samples_of_the_epoch(
    total: int, window: int, place: int
) -> None:
    order = order_of([total], window=window)
    serial = 5 * total + place % total
    tried = [order.substitute(serial, attempt) for attempt in range(order.span)]
    assert tried[0] == serial
    assert len(set(tried)) == len(tried) == min(total, max(window, 4096))
    assert all(value // total == 5 for value in tried)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_per_epoch(world: int, workers: int) -> None:
    ranks = [take(stream_of(rank=r, world=world, workers=workers), 10) for r in range(world)]
    joined = [
        {
            "sample": torch.cat([batch["sample"] for batch in step]),
            "draw": torch.cat([batch["draw"] for batch in step]),
        }
        for step in zip(*ranks, strict=True)
    ]
    serial = torch.cat([batch["sample"] for batch in joined]).tolist()
    for epoch in range(3):  # 10 steps of 6 samples are 3 epochs of 20
        assert sorted(serial[epoch * TOTAL : (epoch + 1) * TOTAL]) == list(range(TOTAL))
    whole = [{name: batch[name] for name in ("sample", "draw")} for batch in take(stream_of(), 10)]
    assert_same(joined, whole)
    draws = torch.cat([batch["draw"] for batch in whole])
    assert len(draws.unique(dim=0)) == len(draws)  # randomness is not repeated


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_the_sequence(workers: int) -> None:
    whole = take(stream_of(), 8)
    for step in (1, 3, 5):
        assert_same(take(stream_of(workers=workers), 8 - step, start=step), whole[step:])
    assert_same(take(stream_of(), 2, start=10**9), take(stream_of(workers=workers), 2, 10**9))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_training_process_keeps_its_random_state(workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(stream_of(workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = take(stream_of(workers=workers), 2)
    assert_same(again, take(stream_of(), 2))


def test_the_random_state_survives_an_error() -> None:
    def fail(sample: int) -> dict[str, Any]:
        torch.rand(1)
        raise RuntimeError("broken loader")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken loader"):
        StreamDataset(order_of(SIZES), fail, seed=0)[0]
    assert torch.equal(torch.get_rng_state(), before)


def picky_load(sample: int) -> dict[str, Any]:
    if sample % 4 == 1:
        raise SkipSample("every fourth" if sample < 10 else "a late one")
    return random_load(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_samples_are_replaced_and_counted(workers: int) -> None:
    batches = take(stream_of(picky_load, workers=workers), 10)
    assert_same(batches, take(stream_of(picky_load), 10))
    assert {len(batch["sample"]) for batch in batches} == {6}
    seen = Counter(torch.cat([batch["sample"] for batch in batches]).tolist())
    assert all(seen[sample] >= 3 for sample in range(TOTAL) if sample % 4 != 1)
    assert not any(seen[sample] for sample in range(TOTAL) if sample % 4 == 1)
    skipped = Counter(reason for batch in batches for reason in batch["skipped"])
    assert skipped.keys() == {"every fourth", "a late one"}
    assert skipped.total() >= 3 * 5  # more where a substitute was unusable, too


def test_substitutes_do_not_crowd() -> None:
    bad = 100

    def load(sample: int) -> dict[str, Any]:
        if sample < bad:
            raise SkipSample("bad")
        return {"sample": torch.tensor(sample)}

    stream = stream_of(load, sizes=[1000], window=1000, global_batch=50)
    batches = take(stream, 20)
    seen = Counter(torch.cat([batch["sample"] for batch in batches]).tolist())
    assert seen.keys() == set(range(bad, 1000))
    assert max(seen.values()) <= 4
    assert all(len(batch["sample"].unique()) >= 48 for batch in batches)


@pytest.mark.parametrize("total", [2, 3, 6, 10])
def test_one_good_sample_is_found(total: int) -> None:
    def load(sample: int) -> dict[str, Any]:
        if sample != 1:
            raise SkipSample("bad")
        return {"sample": torch.tensor(sample)}

    stream = stream_of(load, sizes=[total], global_batch=1)
    assert [batch["sample"].item() for batch in take(stream, total)] == [1] * total


def bad_load(sample: int) -> dict[str, Any]:
    raise SkipSample("broken image" if sample % 2 else "no caption")


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_good_sample_stops_the_run(workers: int) -> None:
    message = r"^20 samples in a row cannot be used: (no caption|broken image) \(10\), .* \(10\);"
    with pytest.raises(ShardError, match=message):
        take(stream_of(bad_load, workers=workers), 1)
    assert not multiprocessing.active_children()


def test_attempts_are_limited() -> None:
    with pytest.raises(ShardError, match=f"^{ATTEMPTS} samples in a row"):
        take(stream_of(bad_load, sizes=[5000]), 1)


def test_batches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ShardError, match=r"train.batch_size 21 is larger than the data set of 20"):
        stream_of(global_batch=21)
    with pytest.raises(ValueError, match=r"8 cannot be divided among 3 .* choose a multiple of 3"):
        stream_of(global_batch=8, world=3)
    assert len(stream_of(global_batch=20)) == 20


def test_the_identity_names_what_decides_the_order() -> None:
    base = stream_of().identity()
    assert base == stream_of(rank=1, world=2, workers=2).identity()
    for change in (
        {"seed": 4},
        {"shuffle": False},
        {"window": 9},
        {"global_batch": 5},
        {"sizes": [7, 13]},
    ):
        assert stream_of(**change).identity() != base


def test_collate() -> None:
    batch = collate(
        [
            {"x": torch.tensor(1), "key": "a", "skipped": ["r"]},
            {"x": torch.tensor(2), "key": "b", "skipped": []},
            {"x": torch.tensor(3), "key": "c", "skipped": ["s", "r"]},
        ]
    )
    assert batch["x"].tolist() == [1, 2, 3]
    assert batch["key"] == ["a", "b", "c"]
    assert batch["skipped"] == ["r", "s", "r"]


def test_rows_of_a_batch_are_collated_without_a_copy_and_others_with_one() -> None:
    batch = torch.arange(4 * 5 * 5 * 3, dtype=torch.uint8).view(4, 5, 5, 3).permute(0, 3, 1, 2)
    rows = list(batch.unbind())
    whole = collate([{"image": row} for row in rows])["image"]
    assert torch.equal(whole, batch)
    assert whole.data_ptr() == batch.data_ptr()
    for some in (rows[::-1], rows[:3], rows[1:], [rows[0], *rows[2:], rows[1]]):
        stacked = collate([{"image": row} for row in some])["image"]
        assert torch.equal(stacked, torch.stack(some))
        assert stacked.data_ptr() != some[0].data_ptr()
        assert stacked.permute(0, 2, 3, 1).is_contiguous()
