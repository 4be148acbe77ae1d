"""The processor of folders for transformers makes the pixels of our own evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.transforms import eval_transform
from encoders.export.model import DualEncoder, ExportError
from encoders.export.transformers_folder import image_processor

SIZE = 32
CONFIG: Any = {"vision_cfg": {"timm_model_name": "any"}, "text_cfg": {}}


def encoder(mode: str, interpolation: str = "bicubic") -> DualEncoder:
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    preprocess |= {"interpolation": interpolation, "resize_mode": mode}
    return DualEncoder(None, CONFIG, preprocess, SIZE, None)


def far(model: DualEncoder, height: int, width: int) -> float:
    """The largest difference of a pixel, in deviations."""
    noise = np.random.default_rng(height * width)
    pixels = noise.integers(0, 255, (height, width, 3)).astype(np.uint8)
    settings = model.preprocess
    transform = eval_transform(SIZE, settings["resize_mode"], settings["interpolation"])
    ours = transform(torch.from_numpy(pixels).permute(2, 0, 1)) / 255
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    theirs = image_processor(model)(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    return ((ours - mean) / std - theirs[0]).abs().max().item()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_our_evaluation(interpolation: str) -> None:
    for height, width in ((90, 121), (201, 70), (17, 19), (32, 32)):
        assert far(encoder("squash", interpolation), height, width) < 1e-6
    # The model card tells of pictures that are longer by an odd number.
    for height, width in ((64, 96), (92, 64), (33, 99), (32, 32)):
        assert far(encoder("shortest", interpolation), height, width) < 1e-6


def test_what_no_processor_does_is_refused() -> None:
    with pytest.raises(ExportError, match="no processor of transformers resizes by longest"):
        image_processor(encoder("longest"))
    with pytest.raises(ExportError, match="hamming interpolation"):
        image_processor(encoder("squash", "hamming"))
