"""uint8 image transforms for training and evaluation, on torchvision's v2 operators."""

from __future__ import annotations

from torch import nn
from torchvision.transforms import InterpolationMode, v2

from data_pipelines.config import AugmentationConfig


def train_transform(image_size: int, config: AugmentationConfig) -> nn.Module:
    """Random crop, flip, affine and colour changes: uint8 (3, H, W) to (3, size, size).

    Draws from torch's default generator. Changes that are off cost nothing.
    """
    steps: list[nn.Module] = []
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    if tuple(config.crop_scale) == (1.0, 1.0):
        steps.append(v2.Resize((image_size, image_size), **bicubic))
    else:
        steps.append(
            v2.RandomResizedCrop(
                image_size, scale=config.crop_scale, ratio=config.crop_ratio, **bicubic
            )
        )
    if config.flip:
        steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.rotate or config.translate or tuple(config.zoom) != (1.0, 1.0):
        steps.append(
            v2.RandomAffine(
                degrees=config.rotate,
                translate=(config.translate, config.translate),
                scale=tuple(config.zoom),
                interpolation=InterpolationMode.BILINEAR,
                fill=config.background,
            )
        )
    if config.brightness or config.contrast or config.saturation or config.hue:
        steps.append(
            v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
        )
    if config.grayscale:
        steps.append(v2.RandomGrayscale(config.grayscale))
    return v2.Compose(steps)


def eval_transform(image_size: int, resize_mode: str = "squash") -> nn.Module:
    """Deterministic resize: uint8 (3, H, W) to (3, size, size), bicubic with antialias.

    `squash` stretches to the square (big_vision's default); `shortest` scales the shorter side
    and crops the centre (open_clip's default).

    Raises:
        ValueError: another resize mode.
    """
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    if resize_mode == "squash":
        return v2.Resize((image_size, image_size), **bicubic)
    if resize_mode == "shortest":
        return v2.Compose([v2.Resize(image_size, **bicubic), v2.CenterCrop(image_size)])
    raise ValueError(f"resize_mode '{resize_mode}' is unknown: choose squash or shortest")
