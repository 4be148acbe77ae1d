"""The training-free baselines: by hand on tiny pictures, and the published figures on emoji."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.emoji.prepare import prepare
from eval.yardstick import pixel_nearest_neighbour, word_bridge


class Split(NamedTuple):
    images: Tensor
    labels: Tensor
    records: list[dict[str, Any]]

    @property
    def words(self) -> list[str]:
        return [" ".join([r["name"], *r["keywords"]]) for r in self.records]


def read(folder: Path) -> Split:
    images: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                if member.name.endswith(".webp"):
                    images.append(np.asarray(Image.open(content).convert("RGB")))
                elif member.name.endswith(".json"):
                    records.append(json.loads(content.read()))
    labels = torch.tensor([record["label"] for record in records])
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels, records)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji")
    prepare(out)
    return out


@pytest.fixture(scope="module")
def train(prepared: Path) -> Split:
    return read(prepared / "train")


@pytest.mark.parametrize(("split", "acc1", "acc5"), [("val", 0.329, 0.526), ("test", 0.278, 0.456)])
def test_pixel_figures(prepared: Path, train: Split, split: str, acc1: float, acc5: float) -> None:
    test = read(prepared / split)
    got = pixel_nearest_neighbour(train.images, train.labels, test.images, test.labels)
    assert got == pytest.approx({"acc1": acc1, "acc5": acc5}, abs=0.002)


@pytest.mark.parametrize("split", ["val-unseen", "test-unseen"])
def test_word_bridge_figures(prepared: Path, train: Split, split: str) -> None:
    test = read(prepared / split)
    order = test.labels.argsort()
    choices = [test.words[i] for i in order]
    got = word_bridge(train.images, train.words, test.images, test.labels, choices)
    assert got == pytest.approx(0.120, abs=0.002)


def noise(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def slow_ranks(train: Tensor, labels: list[int], test: Tensor) -> list[list[int]]:
    """Classes of each test picture from nearest to farthest, one picture at a time in numpy."""

    def unit(image: Tensor) -> np.ndarray:
        x = image.numpy().astype(np.float64).reshape(3, 16, 2, 16, 2).mean((2, 4)).ravel()
        return (x - x.mean()) / np.linalg.norm(x - x.mean())

    ranks = []
    for picture in test:
        order = sorted(range(len(train)), key=lambda i: -float(unit(picture) @ unit(train[i])))
        ranks.append(list(dict.fromkeys(labels[i] for i in order)))
    return ranks


def test_pixel_neighbours_equal_a_slow_loop() -> None:
    train, test = noise(12, 0), noise(9, 1)
    labels = [0, 1, 2, 3, 4, 5, 0, 0, 0, 2, 2, 5]
    targets = [0, 1, 2, 3, 4, 5, 2, 3, 0]
    ranks = slow_ranks(train, labels, test)
    got = pixel_nearest_neighbour(
        train, torch.tensor(labels), test, torch.tensor(targets), topk=(1, 2, 3, 6)
    )
    for k in (1, 2, 3, 6):
        right = sum(target in rank[:k] for target, rank in zip(targets, ranks, strict=True))
        assert got[f"acc{k}"] == pytest.approx(right / len(targets))
    assert got["acc6"] == 1.0


def test_a_class_without_training_pictures_is_wrong() -> None:
    images = noise(4, 2)
    got = pixel_nearest_neighbour(
        images[:2], torch.tensor([0, 3]), images, torch.tensor([0, 3, 1, 7]), topk=(1, 100)
    )
    assert got == {"acc1": 0.5, "acc100": 0.5}


def test_word_bridge_follows_the_rare_word() -> None:
    images = noise(3, 3)
    words = ["red apple fruit", "red car vehicle", "green tree plant"]
    choices = ["red bus vehicle", "red cherry fruit", "palm plant"]
    # Each test picture is a training picture, so its only voter is itself.
    targets = torch.tensor([1, 0, 2])
    assert word_bridge(images, words, images, targets, choices, neighbours=1) == 1.0
    assert word_bridge(images, words, images, targets.roll(1), choices, neighbours=1) == 0.0


def test_user_errors_name_the_remedy() -> None:
    images, labels = noise(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="one label per picture"):
        pixel_nearest_neighbour(images, labels[:1], images, labels)
    with pytest.raises(ValueError, match="int64"):
        pixel_nearest_neighbour(images, labels.float(), images, labels)
    with pytest.raises(ValueError, match="multiples of 16"):
        pixel_nearest_neighbour(images[..., :30], labels, images, labels)
    with pytest.raises(ValueError, match="give uint8"):
        pixel_nearest_neighbour(images.float(), labels, images, labels)
    with pytest.raises(ValueError, match="at least 1"):
        pixel_nearest_neighbour(images, labels, images, labels, topk=(0,))
    with pytest.raises(ValueError, match="one text per picture"):
        word_bridge(images, ["a"], images, labels, ["a", "b"], 1)
    with pytest.raises(ValueError, match="labels must index choices"):
        word_bridge(images, ["a", "b"], images, labels, ["a"], 1)
    with pytest.raises(ValueError, match="between 1 and 2"):
        word_bridge(images, ["a", "b"], images, labels, ["a", "b"])
