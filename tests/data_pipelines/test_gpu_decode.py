"""Batches whose JPEGs are decoded on a device; without a GPU the same code runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.classification import classification_stream
from data_pipelines.config import AugmentationConfig, ClassificationConfig, StreamConfig
from data_pipelines.gpu_decode import GpuPictures
from data_pipelines.shards import ShardError
from data_pipelines.stream import SkipSample, collate
from data_pipelines.training_pictures import TrainingPictures

Encode = Callable[..., bytes]
INCEPTION = AugmentationConfig(recipe="inception")
ROWS, COLUMNS = np.mgrid[:60, :80]
SMOOTH = Image.fromarray(np.stack([COLUMNS * 3, ROWS * 4, ROWS + COLUMNS], -1).astype(np.uint8))


def loaded(load: Any, pictures: list[bytes]) -> list[Any]:
    images = []
    for number, data in enumerate(pictures):
        torch.manual_seed(number)
        images.append(load(data))
    return images


def finished(device: str, pictures: list[bytes]) -> dict[str, Any]:
    on_device = GpuPictures(StreamConfig(), INCEPTION, 24, torch.device(device))
    rows = [
        {"image": image, "label": torch.tensor(number), "key": str(number), "skipped": []}
        for number, image in enumerate(loaded(on_device, pictures))
    ]
    return on_device.finish(collate(rows))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_makes_the_pictures_of_the_loader(encode: Encode, device: str) -> None:
    jpegs = [encode(SMOOTH, "JPEG", quality=q, progressive=q == 80) for q in (95, 90, 80)]
    others = [encode(SMOOTH, "PNG"), encode(SMOOTH.convert("CMYK"), "JPEG")]
    pictures = [
        jpegs[0],
        others[0],
        jpegs[1],
        encode(SMOOTH.convert("L"), "JPEG"),
        others[1],
        jpegs[2],
    ]
    expected = loaded(TrainingPictures(StreamConfig(), INCEPTION, 24), pictures)
    batch = finished(device, pictures)
    assert (batch["image"].dtype, batch["image"].device.type) == (torch.uint8, device)
    difference = (batch["image"].cpu().int() - torch.stack(expected).int()).abs()
    assert difference.max() <= (1 if device == "cpu" else 12)
    assert difference.float().mean() < 1
    assert batch["label"].tolist() == list(range(6))
    assert batch["skipped"] == []


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_turns_out_broken_gives_its_row_away(encode: Encode, device: str) -> None:
    good = encode(SMOOTH, "JPEG")
    cut = good[: len(good) // 2]
    batch = finished(device, [cut, good, cut, good])
    assert batch["skipped"] == ["broken image"] * 2
    assert batch["key"] == ["1", "1", "1", "3"]
    assert batch["label"].tolist() == [1, 1, 1, 3]
    assert torch.equal(batch["image"][0], batch["image"][2])
    with pytest.raises(ShardError, match="none of the pictures of a batch"):
        finished(device, [cut, cut])
    with pytest.raises(SkipSample, match="broken image"):
        finished(device, [b"junk"])


def test_what_it_cannot_do_is_refused() -> None:
    device = torch.device("cpu")
    for config, augmentation in (
        (StreamConfig(), AugmentationConfig(rotate=5)),
        (StreamConfig(exif_orientation=True), AugmentationConfig()),
        (StreamConfig(scaled_decoding=True), AugmentationConfig()),
    ):
        with pytest.raises(ValueError, match="knows crops and flips only"):
            GpuPictures(config, augmentation, 8, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_needs_a_gpu(captioned: str) -> None:
    config = ClassificationConfig(shards=captioned, gpu_decoding=True)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        classification_stream(config, image_size=8, num_classes=20, seed=0, global_batch=4)


@pytest.mark.gpu
def test_a_stream_hands_out_pictures_on_the_gpu(captioned: str) -> None:
    config = ClassificationConfig(shards=captioned, gpu_decoding=True)
    options = {"image_size": 8, "num_classes": 20, "seed": 0, "global_batch": 4}
    stream = classification_stream(config, workers=2, **options)
    batch = next(iter(stream.batches()))
    assert batch["image"].is_cuda
    assert batch["image"].shape == (4, 3, 8, 8)
