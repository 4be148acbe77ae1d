"""Recipes, crops, scaled decoding and orientation, against the libraries that define them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, ToPILImage, v2

from data_pipelines.config import AugmentationConfig, StreamConfig
from data_pipelines.decode import Picture, decode_rgb
from data_pipelines.training_pictures import TrainingPictures
from data_pipelines.transforms import (
    RECIPES,
    Box,
    changes_at_random,
    eval_transform,
    recipe_of,
    resize,
    train_transform,
)

Encode = Callable[..., bytes]


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: noise of all scales, most of it in the large ones."""
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(1, 3, height, width)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = torch.rand((1, 3, cells, cells), generator=generator) - 0.5
        total += (
            torch.nn.functional.interpolate(noise, (height, width), mode="bicubic") / cells**0.6
        )
    return ToPILImage()((128 + 150 * total[0]).clamp(0, 255).to(torch.uint8))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "grey"])
def test_evaluation_sees_the_pixels_of_open_clip(
    encode: Encode, mode: str, interpolation: str, kind: str
) -> None:
    theirs = image_transform(
        40, False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    ours, worst = eval_transform(40, mode, interpolation), 0
    for size in ((300, 401), (401, 300), (97, 97), (40, 40), (31, 20), (57, 640), (9, 1)):
        image = scene(*size).convert("L" if kind == "grey" else "RGB")
        data = encode(image, "JPEG" if kind == "grey" else kind)
        expected = theirs(Image.open(io.BytesIO(data))) * 255
        worst = max(worst, float((ours(decode_rgb(data)) - expected).abs().max()))
    # One step of rounding; the JPEG decoders of Pillow and torchvision may be of two versions.
    assert worst < 1.01 if kind == "PNG" else worst < 4


def big_vision_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear between the four nearest pixels at half-pixel centres, in float64, cut to bytes."""
    out = image.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        out = out.take(low, axis) * (1 - share) + out.take(high, axis) * share
    return np.floor(out).astype(int)


@pytest.mark.parametrize("size", [(300, 401), (97, 60), (20, 31)])
def test_evaluation_sees_the_pixels_of_big_vision(size: tuple[int, int]) -> None:
    image = scene(*size)
    whole = eval_transform(56, "big_vision")(tensor(image)).permute(1, 2, 0).numpy()
    difference = np.abs(whole - big_vision_resize(np.asarray(image), 56))
    assert difference.max() <= 1
    assert difference.mean() < 0.01  # where float32 falls on the other side of a whole number
    cropped = eval_transform(56, "big_vision_crop")(tensor(image)).permute(1, 2, 0).numpy()
    expected = big_vision_resize(np.asarray(image), 64)[4:60, 4:60]
    assert np.abs(cropped - expected).max() <= 1
    if size == (300, 401):  # with antialias the pixels are others
        smooth = eval_transform(56, "squash", "bilinear")(tensor(image)).permute(1, 2, 0).numpy()
        assert np.abs(smooth - whole.astype(int)).max() > 5


def test_resizing_a_box_is_cropping_and_resizing() -> None:
    image, box = tensor(scene(90, 120)), Box(11, 7, 50, 80)
    cut = image[:, 11:61, 7:87]
    for interpolation in ("bicubic", "bilinear"):
        mode = v2.InterpolationMode(interpolation)
        expected = v2.functional.resize(cut.contiguous(), [24, 24], mode, antialias=True)
        for source in (image, image.contiguous(), torch.stack([image, image])[1]):
            out = resize(source, (24, 24), interpolation, box)
            assert (out.int() - expected.int()).abs().max() <= 1
    assert resize(image, (24, 24), "bicubic", box).stride() == (1, 72, 3)  # channels side by side
    assert torch.equal(resize(image, (50, 80), "bicubic", box), cut)


def test_crops_are_drawn_like_those_of_torchvision() -> None:
    transform = train_transform(8, AugmentationConfig(recipe="inception"))
    torch.manual_seed(0)
    for height, width in ((100, 160), (300, 90), (5, 3)):
        ours = [transform.draw_box(height, width) for _ in range(2000)]
        empty = torch.empty(1, height, width)
        theirs = [
            RandomResizedCrop.get_params(empty, [0.05, 1.0], [0.75, 1.3333]) for _ in range(2000)
        ]
        for top, left, h, w in ours:
            assert 0 <= top <= height - h < height
            assert 0 <= left <= width - w < width
        one, other = np.array(ours, float), np.array(theirs, float)
        # Means and spreads of top, left, height and width, within four standard errors.
        error = other.std(0) / math.sqrt(500) + 0.02
        assert (np.abs(one.mean(0) - other.mean(0)) < 2 * error).all()
        assert (np.abs(one.std(0) - other.std(0)) < 2 * error).all()


def test_crops_that_do_not_fit_come_from_the_centre() -> None:
    for height, width in ((4000, 20), (20, 4000)):
        expected = RandomResizedCrop.get_params(
            torch.empty(1, height, width), [0.9, 1.0], [0.75, 1.3333]
        )
        assert train_transform(8, AugmentationConfig()).draw_box(height, width) == expected


def test_recipes_and_what_replaces_their_parts() -> None:
    assert recipe_of(AugmentationConfig()) == RECIPES["clip"]
    inception = recipe_of(AugmentationConfig(recipe="inception", flip=0.0))
    assert inception == ((0.05, 1.0), (0.75, 1.3333), 0.0, "bilinear")
    assert changes_at_random(AugmentationConfig(recipe="resize")) == []
    assert changes_at_random(AugmentationConfig(recipe="inception")) == ["crop_scale", "flip"]
    added = AugmentationConfig(recipe="resize", policy="rand_augment", erase=0.1)
    assert changes_at_random(added) == ["policy", "erase"]
    image = tensor(scene(40, 50))
    transform = train_transform(16, AugmentationConfig(recipe="inception"))
    halves = [transform(image) for _ in range(40)]
    assert len({half.contiguous().numpy().tobytes() for half in halves}) == 40
    lines = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1)
    rising = [bool((transform(lines)[0, 0].int().diff() >= 0).all()) for _ in range(200)]
    assert 70 < sum(rising) < 130  # half of them are flipped


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment", "auto_augment"])
def test_policies_come_from_the_seeded_stream(policy: str) -> None:
    transform = train_transform(32, AugmentationConfig(recipe="resize", policy=policy))
    image, plain = tensor(scene(40, 50)), eval_transform(32)(tensor(scene(40, 50)))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return transform(image)

    assert (draw(1).dtype, draw(1).shape) == (torch.uint8, (3, 32, 32))
    assert all(torch.equal(draw(seed), draw(seed)) for seed in range(5))
    assert sum(not torch.equal(draw(seed), plain) for seed in range(10)) > 5


def test_erasing_blackens_a_rectangle() -> None:
    transform = train_transform(32, AugmentationConfig(recipe="resize", erase=1.0))
    out = transform(torch.full((3, 40, 40), 90, dtype=torch.uint8))
    assert set(out.unique().tolist()) == {0, 90}


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("size", [(512, 384), (257, 131), (9, 17)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_smaller(
    encode: Encode, shrink: int, size: tuple[int, int], mode: str
) -> None:
    data = encode(scene(*size).convert(mode), "JPEG", quality=90)
    small = Picture(data).decode(shrink)
    assert small.shape == (3, -(-size[0] // shrink), -(-size[1] // shrink))
    image = Image.open(io.BytesIO(data))
    image.draft(mode, (size[1] // shrink, size[0] // shrink))  # Pillow's way to the same pixels
    theirs = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert (small.int() - theirs.int()).abs().max() <= 4  # another version
    if min(size) > 100:  # the mean of each block, which the eye takes for the picture
        whole = decode_rgb(data)[:, : size[0] // shrink * shrink, : size[1] // shrink * shrink]
        blocks = whole.float().unfold(1, shrink, shrink).unfold(2, shrink, shrink).mean((-1, -2))
        error = (small[:, : blocks.shape[1], : blocks.shape[2]] - blocks).abs()
        assert error.mean() < 1


def test_scaled_decoding_keeps_to_its_stated_error(encode: Encode) -> None:
    def load(data: bytes, scaled: bool, size: int, **settings: object) -> Tensor:
        config = StreamConfig(scaled_decoding=scaled)
        torch.manual_seed(1)
        return TrainingPictures(config, AugmentationConfig(**settings), size)(data).int()

    data = encode(scene(600, 900), "JPEG", quality=90)
    for settings in ({"recipe": "resize"}, {"crop_scale": (0.5, 0.6)}):
        error = (load(data, True, 64, **settings) - load(data, False, 64, **settings)).abs()
        assert 0 < error.float().mean() < 2.5
        assert error.max() < 30
    # Less than twice the target: nothing changes.
    assert torch.equal(load(data, True, 301), load(data, False, 301))
    png = encode(scene(300, 300), "PNG")
    assert torch.equal(load(png, True, 64), load(png, False, 64))


def test_the_shrink_leaves_the_target() -> None:
    transform = train_transform(224, AugmentationConfig())
    sides = {447: 1, 448: 2, 895: 2, 896: 4, 1791: 4, 1792: 8, 9000: 8}
    assert {side: transform.shrink(Box(0, 0, side, 9999)) for side in sides} == sides
    box = Box(101, 7, 50, 33).shrunk(4)
    assert box == (25, 1, 13, 9)
    assert Box(0, 0, 9, 17).shrunk(4) == (0, 0, 3, 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P")])
def test_exif_orientation_by_option(encode: Encode, orientation: int, kind: str, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = scene(24, 40).convert(mode)
    data = encode(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    picture = Picture(data, exif_orientation=True)
    decoded = picture.decode()
    assert decoded.shape[1:] == (picture.height, picture.width) == upright.size[::-1]
    assert (decoded.int() - tensor(upright).int()).abs().max() <= 4
    assert decode_rgb(data).shape == (3, 24, 40)
    config = StreamConfig(exif_orientation=True, scaled_decoding=True)
    whole = TrainingPictures(config, AugmentationConfig(recipe="resize"), 10)(data)
    expected = np.array(upright.resize((10, 10), Image.Resampling.BICUBIC), int)
    assert np.abs(whole.permute(1, 2, 0).numpy() - expected).mean() < 3


def test_broken_exif_is_no_orientation(encode: Encode) -> None:
    data = encode(scene(24, 40), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))
    assert torch.equal(Picture(data, exif_orientation=True).decode(), decode_rgb(data))


def test_the_short_way_reads_what_pillow_reads(encode: Encode) -> None:
    variants = [
        {}, {"progressive": True}, {"subsampling": 0}, {"comment": b"x" * 70_000},
        {"icc_profile": bytes(100_000)}, {"restart_marker_blocks": 2}, {"dpi": (300, 300)},
        {"exif": b"Exif\0\0" + bytes(60)}, {"keep_rgb": True, "subsampling": 0},
    ]  # fmt: skip
    for options in variants[:3] + variants[4:]:
        for mode in ("RGB", "L"):
            data = encode(scene(33, 47).convert(mode), "JPEG", **options)
            picture = Picture(data)
            assert picture._image is None, options  # Pillow was not asked
            assert (picture.height, picture.width) == (33, 47)
            difference = picture.decode().int() - tensor(Image.open(io.BytesIO(data))).int()
            assert difference.abs().max() <= 4, options
    for mode, kind in (("CMYK", "JPEG"), ("RGB", "MPO")):
        more = {"save_all": True, "append_images": [scene(33, 47, 1)]} if kind == "MPO" else {}
        data = encode(scene(33, 47).convert(mode), kind, **more)
        assert Picture(data)._image is not None
