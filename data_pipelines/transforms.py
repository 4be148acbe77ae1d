"""uint8 image transforms for training and evaluation, on torchvision's operators.

Pictures are (3, H, W) with the channels side by side in memory, as `decode` returns them, and stay
so: resizing uint8 in that layout takes a half to a third of the time.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from data_pipelines.config import AugmentationConfig

# Up to this size affine changes, bilinear and without antialias, are made at twice the size: they
# blur by about a pixel, which small pictures cannot spare and large ones do not notice.
SMALL = 64
SHRINKS = (8, 4, 2)  # what libjpeg can do at no cost, the most first
_CROP_ATTEMPTS = 10
# What `interpolate` ends in with antialias; what it does before takes a hundredth of the time of a
# small picture.
_RESIZE = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
}
_LARGEST = {
    "flip": 1.0,
    "policy_operations": 14,
    "policy_magnitude": 30,
    "erase": 1.0,
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
# Settings without effect on their own.
_ALONE = {
    "recipe", "crop_ratio", "background", "interpolation", "policy_operations", "policy_magnitude",
}  # fmt: skip


class Recipe(NamedTuple):
    """How a picture is cropped; see AugmentationConfig."""

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    interpolation: str


RECIPES = {
    "clip": Recipe((0.9, 1.0), (0.75, 1.3333), 0.0, "bicubic"),
    "inception": Recipe((0.05, 1.0), (0.75, 1.3333), 0.5, "bilinear"),
    "resize": Recipe((1.0, 1.0), (0.75, 1.3333), 0.0, "bicubic"),
}


def recipe_of(config: AugmentationConfig) -> Recipe:
    """The recipe that the settings name, with what they put in the place of its parts."""
    own = {name: getattr(config, name) for name in Recipe._fields}
    changes = {name: value for name, value in own.items() if value is not None}
    return RECIPES[config.recipe]._replace(**changes)


def changes_at_random(config: AugmentationConfig) -> list[str]:
    """Names of the settings that make `train_transform` more than a resize."""
    off = _values(AugmentationConfig(recipe="resize"))
    return [
        name
        for name, value in _values(config).items()
        if name not in _ALONE and np.not_equal(value, off[name]).any()
    ]


def _values(config: AugmentationConfig) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in fields(config)} | recipe_of(
        config
    )._asdict()


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def shrunk(self, factor: int) -> Box:
        """The box in a picture that is `factor` times smaller, sides rounded outwards."""
        top, left = self.top // factor, self.left // factor
        bottom = -(-(self.top + self.height) // factor)
        right = -(-(self.left + self.width) // factor)
        return Box(top, left, bottom - top, right - left)


class TrainTransform(nn.Module):
    """Random crop, flip, affine and colour changes: uint8 (3, H, W) to (3, size, size).

    Draws from torch's default generator. Changes that are off cost nothing. The crop can be drawn
    before the picture is decoded (`draw_box`), so that a decoder knows how much of it is needed.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(self, image_size: int, config: AugmentationConfig) -> None:
        super().__init__()
        _check(config)
        recipe = recipe_of(config)
        affine = config.rotate or config.translate or tuple(config.zoom) != (1.0, 1.0)
        doubled = bool(affine) and image_size <= SMALL
        self.first_size = 2 * image_size if doubled else image_size
        self.crop_scale, self.crop_ratio = tuple(recipe.crop_scale), tuple(recipe.crop_ratio)
        self.flip, self.interpolation = recipe.flip, recipe.interpolation
        steps: list[nn.Module] = []
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
            steps.append(Squash(image_size, self.interpolation))
        steps += _colour_steps(config)
        self.steps = nn.Sequential(*steps) if steps else None

    def draw_box(self, height: int, width: int) -> Box:
        """Where to crop a picture of this size: torchvision's RandomResizedCrop rule.

        Ten attempts at an area and a ratio that fit, then the largest crop of a ratio in range
        from the centre. In one draw, because torch's operators on single numbers cost as much as
        a tenth of decoding a small picture.
        """
        (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
        if (low, high) == (1.0, 1.0):
            return Box(0, 0, height, width)
        *pairs, y, x = torch.rand(2 * _CROP_ATTEMPTS + 2).tolist()
        first, last = math.log(narrow), math.log(wide)
        for share, place in zip(pairs[::2], pairs[1::2], strict=True):
            area = height * width * (low + share * (high - low))
            ratio = math.exp(first + place * (last - first))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
        ratio = min(max(width / height, narrow), wide)
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        h, w = max(1, h), max(1, w)
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def shrink(self, box: Box) -> int:
        """How many times smaller a picture may be decoded for a crop: 8, 4, 2 or 1."""
        available = min(box.height, box.width) // self.first_size
        return next((factor for factor in SHRINKS if factor <= available), 1)

    def forward(self, image: Tensor, box: Box | None = None, out: Tensor | None = None) -> Tensor:
        """Transform a picture; `box` is the crop, drawn where it is missing. `out` may hold the
        result: one that is no other tensor in the end saves a copy."""
        if box is None:
            box = self.draw_box(*image.shape[-2:])
        size = (self.first_size, self.first_size)
        if out is not None and out.shape[-2:] != size:
            out = None
        image = resize(image, size, self.interpolation, box, out)
        if self.flip and torch.rand(()).item() < self.flip:
            image = image.flip(-1)
        return image if self.steps is None else self.steps(image)


def train_transform(image_size: int, config: AugmentationConfig) -> TrainTransform:
    """The transform of a training stream; see `TrainTransform`."""
    return TrainTransform(image_size, config)


def resize(
    image: Tensor,
    size: tuple[int, int],
    interpolation: str,
    box: Box | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Resize uint8 (3, H, W), or a box of it, to (3, *size), with antialias, into `out` if given
    and if there is anything to do.

    What torchvision's `resize` and `resized_crop` do in the end, without what they look at before
    and without a copy of the picture in another layout.
    """
    channels, height, width = image.shape
    offset, strides = image.storage_offset(), image.stride()
    if box is not None:
        top, left, height, width = box
        offset += top * strides[1] + left * strides[2]
    # Of a batch of one, torch recognises the layout by its outermost stride.
    shape = (channels, height, width)
    outermost = max(stride * side for stride, side in zip(strides, shape, strict=True))
    batch = image.as_strided((1, *shape), (outermost, *strides), offset)
    if (height, width) == size:
        return batch[0]
    kernel = _RESIZE[interpolation]
    if out is not None:
        return kernel.out(batch, size, False, out=out[None])[0]
    return kernel.default(batch, size, False)[0]


class Squash(nn.Module):
    """Stretch to a square."""

    def __init__(self, image_size: int, interpolation: str) -> None:
        super().__init__()
        self.size, self.interpolation = (image_size, image_size), interpolation

    def forward(self, image: Tensor) -> Tensor:
        return resize(image, self.size, self.interpolation)


def _colour_steps(config: AugmentationConfig) -> list[nn.Module]:
    steps: list[nn.Module] = []
    if config.policy == "rand_augment":
        steps.append(
            v2.RandAugment(
                config.policy_operations, config.policy_magnitude, fill=config.background
            )
        )
    elif config.policy == "trivial_augment":
        steps.append(v2.TrivialAugmentWide(fill=config.background))
    elif config.policy == "auto_augment":
        steps.append(v2.AutoAugment(fill=config.background))
    linear = (config.brightness, config.contrast, config.saturation, config.channel_mixing)
    if any(linear):
        steps.append(_RandomColorMatrix(*linear))
    if config.hue:
        steps.append(v2.ColorJitter(hue=config.hue))
    if config.grayscale:
        steps.append(v2.RandomGrayscale(config.grayscale))
    if config.erase:
        steps.append(v2.RandomErasing(config.erase))
    return steps


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
    values = _values(config)
    for name, largest in _LARGEST.items():
        if not 0 <= values[name] <= largest:
            raise ValueError(
                f"data.augmentation.{name} is {values[name]}: choose a number from 0 to {largest}"
            )
    for name, largest in _LARGEST_OF_RANGE.items():
        low, high = values[name]
        if not 0 < low <= high <= largest:
            raise ValueError(
                f"data.augmentation.{name} is [{low}, {high}]:"
                f" choose smallest and largest, both above 0 and up to {largest}"
            )


def eval_transform(
    image_size: int, resize_mode: str = "squash", interpolation: str = "bicubic"
) -> nn.Module:
    """Deterministic resize: uint8 (3, H, W) to (3, size, size).

    open_clip's three modes, with antialias: `shortest` (its default) scales the shorter side and
    crops the centre, `longest` scales the longer side and pads with black, `squash` stretches to
    the square. Their pixels differ from open_clip's by at most 1 of 255 (its `image_transform`
    before normalisation, on RGB pictures).

    big_vision's two protocols, bilinear whatever `interpolation` says, without antialias and with
    fractions cut off, as its `resize` has it: `big_vision` is `resize(size)`, `big_vision_crop` is
    `resize(size / 0.875)|central_crop(size)`. Their pixels differ by at most 1 from its definition
    in exact arithmetic.

    Raises:
        ValueError: another resize mode, or an interpolation other than bicubic and bilinear.
    """
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation '{interpolation}' is unknown: choose bicubic or bilinear")
    if resize_mode == "squash":
        return Squash(image_size, interpolation)
    if resize_mode == "shortest":
        return _ResizeAndCrop(image_size, interpolation)
    if resize_mode == "longest":
        return _ResizeAndPad(image_size, interpolation)
    if resize_mode == "big_vision":
        return _PlainBilinear(image_size)
    if resize_mode == "big_vision_crop":
        return _PlainBilinear(round(image_size / 0.875), image_size)
    raise ValueError(
        f"resize_mode '{resize_mode}' is not supported: choose squash or shortest"
        " (or longest, big_vision, big_vision_crop) as resize_mode of the evaluation set"
    )


class _ResizeAndCrop(nn.Module):
    """Scale the shorter side to `size` and crop the centre.

    The ends are cut off first where a picture is over 16 times as long as wide: scaling one of
    1 x 10000 pixels whole would fill the memory with what the crop drops.
    """

    def __init__(self, size: int, interpolation: str) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image: Tensor) -> Tensor:
        size, (height, width) = self.size, image.shape[-2:]
        shortest = min(height, width)
        if max(height, width) > 16 * shortest:
            height, width = min(height, 16 * shortest), min(width, 16 * shortest)
            image = F.center_crop(image, [height, width])
        sides = (int(size * height / shortest), int(size * width / shortest))
        image = resize(image, sides, self.interpolation)
        top, left = (round((side - size) / 2) for side in sides)
        return image[:, top : top + size, left : left + size]


class _ResizeAndPad(nn.Module):
    """Scale the longer side to `size` and pad the shorter one with black on both sides."""

    def __init__(self, size: int, interpolation: str) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def forward(self, image: Tensor) -> Tensor:
        longest = max(image.shape[-2:])
        height, width = (max(1, round(side * self.size / longest)) for side in image.shape[-2:])
        image = resize(image, (height, width), self.interpolation)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        bottom, right = self.size - height - top, self.size - width - left
        return F.pad(image, [left, top, right, bottom])


class _PlainBilinear(nn.Module):
    """Stretch to a square as TensorFlow's `resize` does by default, cut fractions off, and crop the
    centre."""

    def __init__(self, size: int, crop_size: int | None = None) -> None:
        super().__init__()
        self.size, self.crop_size = size, crop_size or size

    def forward(self, image: Tensor) -> Tensor:
        size, crop_size = (self.size, self.size), self.crop_size
        resized = nn.functional.interpolate(image[None].float(), size, mode="bilinear")[0]
        first = (self.size - crop_size) // 2
        end = first + crop_size
        return resized[:, first:end, first:end].to(torch.uint8)
