"""The benchmark measures what its labels say."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from benchmarks.data_loading import (
    CHUNK,
    Case,
    measure,
    photo_sets,
    scaling_error,
    stream_cases,
    summarise,
    transform_cases,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline and a progressive JPEG of a megapixel, and a small one."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size, options in (
        ("a.jpg", (1200, 900), {}),
        ("b.jpeg", (1000, 1100), {"progressive": True}),
        ("c.jpg", (600, 400), {}),
    ):
        cells = Image.fromarray(noise.integers(0, 256, (6, 8, 3), np.uint8))
        cells.resize(size, Image.Resampling.BICUBIC).save(folder / name, "JPEG", **options)
    return folder


def test_the_sets_are_what_they_are_called(photos: Path) -> None:
    sets = photo_sets(photos)
    assert {name: len(pictures) for name, pictures in sets.items()} == {
        "512 px": 3,
        "1-4 MP baseline": 1,
        "1-4 MP progressive": 1,
    }
    for data in sets["512 px"]:
        assert max(Image.open(io.BytesIO(data)).size) == 512
    assert Image.open(io.BytesIO(sets["1-4 MP progressive"][0])).size == (1000, 1100)
    with pytest.raises(ValueError, match=r"no \.jpg files"):
        photo_sets(photos.parent)


def test_the_cases_make_the_same_pictures(photos: Path) -> None:
    pictures = photo_sets(photos)["512 px"]
    cases: dict[str, Callable[[list[bytes]], Any]] = {c.label: c.load for c in transform_cases()}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    ours, theirs = cases["evaluation"](pictures), cases["open_clip evaluation"](pictures)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - 255 * (other * std + mean)).abs().max() < 4
    for label in ("training", "training, scaled", "inception", "open_clip training"):
        assert [image.shape for image in cases[label](pictures)] == [(3, 224, 224)] * 3
    error = scaling_error(photo_sets(photos)["1-4 MP baseline"])
    assert 0 < error["mean"] < 1


def test_a_chunk_of_a_stream_is_a_batch_of_its_pictures(photos: Path, tmp_path: Path) -> None:
    pictures = photo_sets(photos)["512 px"]
    repeated = list(itertools.islice(itertools.cycle(pictures), CHUNK))
    bare, *streams = stream_cases(repeated, tmp_path)
    alone: Any = bare.load(repeated)
    assert [image.shape for image in alone] == [(3, 224, 224)] * CHUNK
    for case in streams:
        batch: Any = case.load(repeated)
        assert batch["key"] == [f"{number:06d}" for number in range(CHUNK)]
        assert batch["image"].shape == (CHUNK, 3, 224, 224)


def test_rates_and_ratios_are_medians_over_rounds() -> None:
    now = [0.0]

    def case(label: str, seconds: float, against: str | None = None) -> Case:
        def load(chunk: list[bytes]) -> None:
            now[0] += seconds * len(chunk)

        return Case(label, load, against)

    cases = [case("slow", 0.5), case("fast", 0.125, "slow")]
    rows = summarise(cases, measure(cases, [b""] * (2 * CHUNK), 3, lambda: now[0]))
    assert rows[0] == {"case": "slow", "images_per_s": 2.0}
    assert rows[1]["images_per_s"] == 8.0
    assert (rows[1]["against"], rows[1]["ratio"]) == ("slow", 4.0)
