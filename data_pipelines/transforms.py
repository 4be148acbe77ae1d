"""uint8 image transforms for training and evaluation, on torchvision's v2 operators."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data_pipelines.config import AugmentationConfig

# Up to this size affine changes, bilinear and without antialias, are made at twice the size: they
# blur by about a pixel, which small pictures cannot spare and large ones do not notice.
SMALL = 64
_LARGEST = {
    "flip": 1.0,
    "rotate": 180.0,
    "translate": 1.0,
    "background": 255,
    "brightness": math.inf,
    "contrast": math.inf,
    "saturation": math.inf,
    "channel_mixing": 0.3,
    "hue": 0.5,
    "grayscale": 1.0,
}
_LARGEST_OF_RANGE = {"crop_scale": 1.0, "crop_ratio": math.inf, "zoom": math.inf}


def changes_at_random(config: AugmentationConfig) -> list[str]:
    """Names of the settings that make `train_transform` more than a resize."""
    off = AugmentationConfig(crop_scale=(1.0, 1.0))
    alone = ("crop_ratio", "background")  # without effect on their own
    names = [item.name for item in fields(config) if item.name not in alone]
    return [name for name in names if np.not_equal(getattr(config, name), getattr(off, name)).any()]


def train_transform(image_size: int, config: AugmentationConfig) -> nn.Module:
    """Random crop, flip, affine and colour changes: uint8 (3, H, W) to (3, size, size).

    Draws from torch's default generator. Changes that are off cost nothing.

    Raises:
        ValueError: a setting outside its range.
    """
    _check(config)
    steps: list[nn.Module] = []
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    affine = config.rotate or config.translate or tuple(config.zoom) != (1.0, 1.0)
    doubled = affine and image_size <= SMALL
    first_size = 2 * image_size if doubled else image_size
    if tuple(config.crop_scale) == (1.0, 1.0):
        steps.append(v2.Resize((first_size, first_size), **bicubic))
    else:
        steps.append(
            v2.RandomResizedCrop(
                first_size, scale=config.crop_scale, ratio=config.crop_ratio, **bicubic
            )
        )
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if affine:
        steps.append(
            v2.RandomAffine(
                degrees=[-config.rotate, config.rotate],
                translate=(config.translate, config.translate),
                scale=tuple(config.zoom),
                interpolation=InterpolationMode.BILINEAR,
                fill=config.background,
            )
        )
    if doubled:
        steps.append(v2.Resize((image_size, image_size), **bicubic))
    linear = (config.brightness, config.contrast, config.saturation, config.channel_mixing)
    if any(linear):
        steps.append(_RandomColorMatrix(*linear))
    if config.hue:
        steps.append(v2.ColorJitter(hue=config.hue))
    if config.grayscale:
        steps.append(v2.RandomGrayscale(config.grayscale))
    return v2.Compose(steps)


class _RandomColorMatrix(nn.Module):
    """Brightness, contrast, saturation and channel mixing as one linear map of the colours.

    The factors mean what torchvision's ColorJitter makes of them, in the order above; nothing is
    cut off in between, and small pictures take a few operators in place of dozens.
    """

    LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

    def __init__(
        self, brightness: float, contrast: float, saturation: float, channel_mixing: float
    ) -> None:
        super().__init__()
        spread = np.array([brightness, contrast, saturation], dtype=np.float32)
        self.lowest = np.maximum(1 - spread, 0)
        self.width = 1 + spread - self.lowest
        self.channel_mixing = channel_mixing

    def forward(self, image: Tensor) -> Tensor:
        # numpy: on matrices of nine numbers an operator of torch costs several times as much.
        brightness, contrast, saturation = self.lowest + self.width * torch.rand(3).numpy()
        matrix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * self.LUMA
        if self.channel_mixing:
            shares = self.channel_mixing * torch.randn(3, 3).numpy() * (1 - np.eye(3, dtype="f4"))
            # What other channels give, the own one gives up: greys stay grey.
            matrix = matrix + shares @ matrix - shares.sum(1, keepdims=True) * matrix
        colors = image.flatten(1).numpy().astype(np.float32)
        mean = self.LUMA @ colors.mean(1)
        colors = (brightness * contrast * matrix) @ colors + brightness * (1 - contrast) * mean
        colors = np.clip(np.rint(colors, out=colors), 0, 255, out=colors).astype(np.uint8)
        return torch.from_numpy(colors).view_as(image)


def _check(config: AugmentationConfig) -> None:
    for name, largest in _LARGEST.items():
        if not 0 <= getattr(config, name) <= largest:
            raise ValueError(
                f"data.augmentation.{name} is {getattr(config, name)}:"
                f" choose a number from 0 to {largest}"
            )
    for name, largest in _LARGEST_OF_RANGE.items():
        low, high = getattr(config, name)
        if not 0 < low <= high <= largest:
            raise ValueError(
                f"data.augmentation.{name} is [{low}, {high}]:"
                f" choose smallest and largest, both above 0 and up to {largest}"
            )


def eval_transform(
    image_size: int, resize_mode: str = "squash", interpolation: str = "bicubic"
) -> nn.Module:
    """Deterministic resize with antialias: uint8 (3, H, W) to (3, size, size).

    `squash` stretches to the square (big_vision's default); `shortest` scales the shorter side
    and crops the centre (open_clip's default).

    Raises:
        ValueError: another resize mode, or an interpolation other than bicubic and bilinear.
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation '{interpolation}' is unknown: choose bicubic or bilinear")
    options = {"interpolation": InterpolationMode(interpolation), "antialias": True}
    if resize_mode == "squash":
        return v2.Resize((image_size, image_size), **options)
    if resize_mode == "shortest":
        return v2.Compose(
            [_TrimEnds(), v2.Resize(image_size, **options), v2.CenterCrop(image_size)]
        )
    raise ValueError(
        f"resize_mode '{resize_mode}' is not supported: choose squash or shortest as resize_mode of"
        " the evaluation set"
    )


class _TrimEnds(nn.Module):
    """Cut the ends off pictures that are over 16 times as long as wide.

    Scaling the shorter side of a picture of 1 x 10000 pixels would otherwise fill the memory with
    what the centre crop drops.
    """

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        longest = 16 * min(height, width)
        return F.center_crop(image, [min(height, longest), min(width, longest)])
