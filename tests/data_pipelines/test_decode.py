"""Image bytes to tensors, and the transforms that follow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipelines.config import AugmentationConfig
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.transforms import eval_transform, train_transform

Encode = Callable[..., bytes]
HEIGHT, WIDTH = 37, 53
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
SMOOTH = np.stack([COLUMNS * 4, ROWS * 6, ROWS + COLUMNS * 2], -1).astype(np.uint8)
COLOUR = Image.fromarray(SMOOTH)
TURNED = Image.fromarray(SMOOTH[::-1].copy())
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand: depths that Pillow does not write, and sizes that are not true."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return png_of(header + chunk(b"IDAT", zlib.compress(rows)))


def png_of(chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def png_16_bit(high: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG whose high bytes are `high` (H, W, channels) and whose low bytes are 200."""
    words = (high.astype(">u2") << 8) + 200
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in words)
    return png(high.shape[1], high.shape[0], 16, colour, rows)


def pillow(data: bytes) -> Tensor:
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("kind", "mode", "options", "bound"),
    [
        # The bound is for another version of the same codec; with one version it is 0.
        *(("JPEG", "RGB", {"quality": q, "subsampling": s}, 4) for q in (60, 95) for s in (0, 2)),
        ("JPEG", "RGB", {"progressive": True}, 4),
        ("JPEG", "L", {}, 4),
        ("JPEG", "CMYK", {}, 4),
        *(("PNG", mode, {}, 0) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")),
        ("PNG", "P", {"transparency": bytes(range(256))}, 0),
        ("PNG", "RGB", {"transparency": (0, 0, 0)}, 0),
        *(("WEBP", mode, {"lossless": True, "exact": True}, 0) for mode in ("RGB", "RGBA")),
        *(("WEBP", mode, {}, 4) for mode in ("RGB", "RGBA")),
        ("BMP", "RGB", {}, 0),
        ("GIF", "P", {}, 0),
    ],
)
def test_pixels_are_those_of_pillow(
    encode: Encode, kind: str, mode: str, options: dict[str, object], bound: int
) -> None:
    image = COLOUR.convert(mode)
    if mode in ("LA", "RGBA"):  # the colours below transparent places must stay
        image.putalpha(Image.fromarray((SMOOTH[..., 0] > 100).astype(np.uint8) * 255))
    data = encode(image, kind, **options)
    decoded = decode_rgb(data)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
    assert (decoded.int() - pillow(data).int()).abs().max() <= bound


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG", "MPO"])
def test_animations_give_their_first_frame(encode: Encode, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(COLOUR, kind, save_all=True, append_images=[TURNED], **options)
    if kind == "WEBP":  # no alpha flag, as other encoders write it for opaque frames
        data = data[:20] + bytes([data[20] & ~0x10]) + data[21:]
        assert Image.open(io.BytesIO(data)).mode == "RGB"
    decoded = decode_rgb(data)
    assert torch.equal(decoded, pillow(data))
    difference = [
        np.abs(decoded.permute(1, 2, 0).numpy() - np.float32(i)).mean()
        for i in (np.asarray(COLOUR), np.asarray(TURNED))
    ]
    assert difference[0] < 10 < difference[1]


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_pictures_keep_their_high_byte(colour: int, channels: int) -> None:
    high = np.dstack([SMOOTH, SMOOTH[..., :1]])[..., :channels]
    decoded = decode_rgb(png_16_bit(high, colour))
    expected = high[..., :3] if channels > 2 else high[..., :1].repeat(3, -1)
    assert decoded.dtype == torch.uint8
    # Pillow rounds to the nearest byte in some of these modes and cuts in others.
    assert np.abs(decoded.permute(1, 2, 0).numpy() - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("depth", "levels"),
    [(1, [0, 0, 0, 255, 255, 0, 255, 255]), (2, [0, 85, 170, 255] * 2), (4, [17, 187] * 4)],
)
def test_shallow_grey_is_stretched(depth: int, levels: list[int]) -> None:
    rows = b"\0" + bytes([0b00011011]) * depth
    decoded = decode_rgb(png(8, 1, depth, 0, rows))
    assert decoded.tolist() == [[levels]] * 3


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("GIF", "P", {}),
        ("AVIF", "RGB", {}),
    ],
)
def test_cut_files_are_broken(
    encode: Encode, kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encode(NOISE.convert(mode), kind, **options)
    decode_rgb(data)
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        with pytest.raises(DecodeError, match=r"^broken image$"):
            decode_rgb(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"\xff\xd8\xff\xe0",
        b"P6 1 1 255\nabc",  # good, but of a format that is not in the list
    ],
)
def test_other_files_are_broken(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"^broken image$"):
        decode_rgb(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_damage_never_raises_anything_else(encode: Encode, kind: str) -> None:
    data, noise = encode(NOISE.resize((16, 16)), kind), np.random.default_rng(1)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(data)
        for place in noise.integers(0, len(data), 3):
            damaged[place] = noise.integers(256)
        try:
            decoded = decode_rgb(bytes(damaged), max_pixels=100_000)
        except DecodeError:
            outcomes.add("refused")
        else:
            outcomes.add("decoded")
            assert (decoded.dtype, decoded.shape[0]) == (torch.uint8, 3)
    assert "refused" in outcomes


def test_a_wrong_checksum_in_a_png_is_no_crash() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    rows = np.asarray(NOISE.resize((16, 16)))
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    assert torch.equal(
        decode_rgb(png_of(header + chunk(b"IDAT", packed))), torch.tensor(rows).permute(2, 0, 1)
    )
    with pytest.raises(DecodeError, match=r"^broken image$"):
        decode_rgb(png_of(header + chunk(b"IDAT", packed[:-4] + b"oops")))


@pytest.mark.parametrize(("width", "height"), [(8_001, 8_000), (100_000, 100_000), (1, 1 << 30)])
def test_bombs_are_refused_by_their_header(width: int, height: int) -> None:
    # The body holds no pixels: an attempt to decode it would say "broken image".
    with pytest.raises(DecodeError, match=r"^image over .* pixels$"):
        decode_rgb(png(width, height, 8, 2, b""))


def test_the_limit_is_a_setting(encode: Encode) -> None:
    data = encode(COLOUR, "JPEG")
    assert decode_rgb(data, HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DecodeError, match=f"^image over {HEIGHT * WIDTH - 1} pixels$"):
        decode_rgb(data, HEIGHT * WIDTH - 1)


def image(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.from_numpy(np.array(COLOUR.resize((width, height)))).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (16, 16), (200, 90)])
def test_every_shape_becomes_a_square_of_bytes(size: tuple[int, int]) -> None:
    everything = AugmentationConfig(
        crop_scale=(0.05, 1.0),
        flip=0.5,
        rotate=10,
        translate=0.1,
        zoom=(0.8, 1.2),
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        channel_mixing=0.1,
        hue=0.1,
        grayscale=0.5,
    )
    transforms = [
        train_transform(16, AugmentationConfig()),
        train_transform(16, AugmentationConfig(crop_scale=(1.0, 1.0))),
        train_transform(16, everything),
        eval_transform(16, "squash"),
        eval_transform(16, "shortest"),
    ]
    for transform in transforms:
        out = transform(image(*size))
        assert (out.dtype, out.shape) == (torch.uint8, (3, 16, 16))


def test_extreme_shapes_cost_little() -> None:
    out = eval_transform(224, "shortest")(torch.zeros(3, 1, 1_000_000, dtype=torch.uint8))
    assert out.shape == (3, 224, 224)  # scaled whole it would be 150 GB


def test_shortest_is_resize_and_centre_crop() -> None:
    # Pillow's bicubic on the central square, up to rounding; the ends must not matter.
    wide = image(40, 120)
    out = eval_transform(40, "shortest")(wide)
    assert torch.equal(out, wide[:, :, 40:80])
    assert torch.equal(eval_transform(40, "shortest")(wide.mT), wide[:, :, 40:80].mT)
    long = torch.cat([wide] * 9, dim=2)
    assert torch.equal(eval_transform(40, "shortest")(long), wide[:, :, 40:80])


def test_squash_is_pillows_bicubic() -> None:
    out = eval_transform(24)(image())
    expected = np.array(COLOUR.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.abs(out.permute(1, 2, 0).numpy() - expected.astype(int)).max() <= 1


def test_the_defaults_only_crop() -> None:
    picture = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    assert torch.equal(train_transform(8, AugmentationConfig())(picture), picture[:, :8, :8])
    whole = train_transform(24, AugmentationConfig(crop_scale=(1.0, 1.0)))
    assert torch.equal(whole(image()), eval_transform(24)(image()))


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_scale": (0.2, 0.4)},
        {"flip": 0.5},
        {"rotate": 30.0},
        {"translate": 0.3},
        {"zoom": (0.5, 0.9)},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"channel_mixing": 0.1},
        {"hue": 0.3},
        {"grayscale": 0.5},
    ],
)
def test_changes_are_drawn_from_torch(settings: dict[str, object]) -> None:
    transform = train_transform(16, AugmentationConfig(**{"crop_scale": (1.0, 1.0)} | settings))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return transform(image())

    assert torch.equal(draw(3), draw(3))
    assert any(not torch.equal(draw(3), draw(seed)) for seed in range(8))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_factors_mean_what_torchvision_makes_of_them(name: str) -> None:
    config = AugmentationConfig(crop_scale=(1.0, 1.0), **{name: 0.4})
    picture = image(24, 24).clamp(70, 180)  # no factor reaches the ends of the range
    torch.manual_seed(1)
    changed = train_transform(24, config)(picture)
    torch.manual_seed(1)
    index = ["brightness", "contrast", "saturation"].index(name)
    factor = 0.6 + 0.8 * torch.rand(3)[index].item()
    expected = getattr(F, f"adjust_{name}")(picture, factor)
    assert (changed.int() - expected.int()).abs().max() <= 1
    assert (changed.int() - picture.int()).abs().max() > 5


def test_channel_mixing_changes_colours_and_keeps_greys() -> None:
    transform = train_transform(8, AugmentationConfig(crop_scale=(1.0, 1.0), channel_mixing=0.2))
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(transform(grey), grey)
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    assert not torch.equal(transform(red), red)


def test_small_pictures_stay_sharp_under_affine_changes() -> None:
    """Nearer to the same change of a large picture than one at the small size comes."""
    squares = torch.randint(256, (3, 24, 24), generator=torch.Generator().manual_seed(0))
    picture = squares.to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    change = {"angle": 0.0, "translate": [0, 0], "scale": 0.8, "shear": [0.0], "fill": 255.0}
    bilinear = InterpolationMode.BILINEAR
    shrink = eval_transform(24)
    expected = shrink(F.affine(picture, interpolation=bilinear, **change)).float()
    config = AugmentationConfig(crop_scale=(1.0, 1.0), zoom=(0.8, 0.8))
    error = (train_transform(24, config)(picture) - expected).abs().mean()
    plain = F.affine(shrink(picture), interpolation=bilinear, **change)
    assert error < 0.6 * (plain - expected).abs().mean()


def test_rotations_go_both_ways() -> None:
    spot = torch.zeros(3, 33, 33, dtype=torch.uint8)
    spot[:, 15:18, 28:31] = 255
    config = AugmentationConfig(crop_scale=(1.0, 1.0), rotate=30, background=0)
    rows = []
    for seed in range(12):
        torch.manual_seed(seed)
        out = train_transform(33, config)(spot)[0].float().sum(1)
        rows.append(float((out * torch.arange(33)).sum() / out.sum()) - 16)
    assert -8 < min(rows) < -2 < 2 < max(rows) < 8


def test_the_background_is_grey() -> None:
    config = AugmentationConfig(crop_scale=(1.0, 1.0), zoom=(0.5, 0.5), background=200)
    out = train_transform(32, config)(torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert (out[:, :6] == 200).all()
    assert (out[:, 12:20, 12:20] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        *({"crop_scale": scale} for scale in ((0.9, 0.5), (0.0, 1.0), (0.5, 1.5))),
        *({"crop_ratio": ratio} for ratio in ((2.0, 1.0), (0.0, 1.0))),
        {"flip": 1.5},
        {"rotate": -1.0},
        {"translate": 2.0},
        {"zoom": (0.0, 1.0)},
        {"brightness": -0.5},
        {"channel_mixing": 1.5},
        {"hue": 0.6},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=rf"^data\.augmentation\.{next(iter(settings))} is .*choose"
    ):
        train_transform(16, AugmentationConfig(**settings))


def test_unknown_resize_mode() -> None:
    with pytest.raises(ValueError, match="'pad' is not supported: choose squash or shortest"):
        eval_transform(16, "pad")
