"""Pictures that are broken, lie about their size or try to exhaust the machine."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.classification import classification_stream
from data_pipelines.config import AugmentationConfig, ClassificationConfig, StreamConfig
from data_pipelines.decode import MAX_SCANS, DecodeError, Picture, decode_rgb
from data_pipelines.stream import SkipSample
from data_pipelines.training_pictures import TrainingPictures

Encode = Callable[..., bytes]
MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, packed: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def zeros(count: int) -> bytes:
    """That many zero bytes, deflated without holding them."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block[: min(len(block), count - n)]) for n in range(0, count, 1 << 20)]
    return b"".join(parts) + packer.flush()


def bombs() -> dict[str, bytes]:
    """Files of a few hundred kilobytes that expand to half a gigabyte, or claim to."""
    much, little = zeros(13_000 * 39_001), zeros(8 * 25)
    return {
        "169 megapixels": png(13_000, 13_000, much),  # as clip-art collections hold them
        "larger": png(40_000, 40_000, little),
        "long": png(1 << 30, 1, little),
        "more rows than told": png(8, 8, much),
        "text": png(8, 8, little, chunk(b"zTXt", b"a\0\0" + much)),
        "colour profile": png(8, 8, little, chunk(b"iCCP", b"a\0\0" + much)),
    }


def test_bombs_take_neither_memory_nor_the_process(tmp_path: Path) -> None:
    for name, data in bombs().items():
        assert len(data) < 1 << 20
        (tmp_path / f"{name}.png").write_bytes(data)
    code = """
import resource, sys
from pathlib import Path
from data_pipelines.decode import DecodeError, decode_rgb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        print(path.stem, tuple(decode_rgb(path.read_bytes()).shape), sep=": ")
    except DecodeError as error:
        print(path.stem, error, sep=": ")
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print("grown", grown, sep=": ")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split(": ") for line in done.stdout.splitlines())
    assert found["169 megapixels"] == "image over 64000000 pixels"
    for name in ("larger", "long"):
        assert found[name] == "image over Pillow's limit of pixels"
    for name in ("more rows than told", "text", "colour profile"):
        assert found[name] in ("(3, 8, 8)", "broken image")
    assert int(found["grown"]) < 100  # MiB


def outcome_of(data: bytes, shrink: int = 1) -> Tensor | str:
    """The picture, or the reason for refusing it."""
    try:
        return Picture(data).decode(shrink)
    except DecodeError as error:
        return str(error)


@pytest.mark.parametrize(
    "options",
    [{"quality": 60}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}],
    ids=["baseline", "progressive", "grey", "cmyk"],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_jpeg_cut_anywhere_is_told_or_whole(
    encode: Encode, options: dict[str, Any], scaled: bool
) -> None:
    options = dict(options)
    data = encode(NOISE.convert(options.pop("mode", "RGB")), "JPEG", **options)
    shrink = 2 if scaled else 1
    whole = Picture(data).decode(shrink)
    refused = 0
    for end in range(0, len(data), 3 if len(data) > 2000 else 1):
        outcome = outcome_of(data[:end], shrink)
        if isinstance(outcome, str):
            assert outcome == "broken image"
            refused += 1
        else:  # the end marker alone is missing
            assert end >= len(data) - 2
            assert torch.equal(outcome, whole)
    assert refused > 300


@pytest.mark.parametrize("scaled", [False, True])
def test_a_jpeg_that_decoders_warn_of_is_decoded_as_pillow_does(
    encode: Encode, scaled: bool
) -> None:
    data = encode(NOISE, "JPEG", quality=90)
    odd = data[:-2] + bytes(100) + data[-2:]  # more bytes than the picture has
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(odd)
    assert torch.equal(Picture(odd).decode(2 if scaled else 1), Picture(data).decode())
    theirs = torch.from_numpy(np.array(Image.open(io.BytesIO(odd)))).permute(2, 0, 1)
    assert (Picture(odd).decode().int() - theirs.int()).abs().max() <= 4  # another version


def test_many_scans_are_refused(encode: Encode) -> None:
    data = encode(NOISE, "JPEG", progressive=True)
    assert Picture(data).decode().shape == (3, 24, 40)
    scans = data.count(b"\xff\xda")
    last = data.rindex(b"\xff\xda")
    # Its last scan again and again, which decoders take and work off each time.
    long = data[:-2] + data[last:-2] * (MAX_SCANS + 1 - scans) + data[-2:]
    with pytest.raises(DecodeError, match=rf"^JPEG of over {MAX_SCANS} scans$"):
        Picture(long)
    assert Picture(data[:-2] + data[last:-2] * (MAX_SCANS - scans) + data[-2:]).height == 24


def jpeg_claiming(encode: Encode, height: int, width: int) -> bytes:
    """A JPEG of 24 x 40 pixels whose frame says something else."""
    data = bytearray(encode(NOISE, "JPEG"))
    frame = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


def test_sizes_that_are_not_true(encode: Encode) -> None:
    with pytest.raises(DecodeError, match=r"^image over 64000000 pixels$"):
        Picture(jpeg_claiming(encode, 65_500, 65_500))
    for height, width in ((0, 40), (24, 0)):
        with pytest.raises(DecodeError, match=r"^broken image$"):
            Picture(jpeg_claiming(encode, height, width)).decode()
    for height, width in ((3000, 3000), (25, 41), (2000, 40)):  # data for less than it says
        outcome = outcome_of(jpeg_claiming(encode, height, width))
        assert isinstance(outcome, str) or outcome.shape == (3, height, width)
    # Two frames: the second one must not get past the limit that the first one passed.
    data = encode(NOISE, "JPEG")
    frame = data.index(b"\xff\xc0")
    length = 2 + struct.unpack_from(">H", data, frame + 2)[0]
    second = bytearray(data[frame : frame + length])
    struct.pack_into(">HH", second, 5, 60_000, 60_000)
    with pytest.raises(DecodeError, match=r"^broken image$"):
        Picture(data[: frame + length] + bytes(second) + data[frame + length :]).decode()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_slim_pictures_are_pictures(encode: Encode, size: tuple[int, int], kind: str) -> None:
    data = encode(Image.new("RGB", size, (200, 30, 30)), kind)
    config = StreamConfig(scaled_decoding=True)
    for recipe in ("clip", "inception", "resize"):
        image = TrainingPictures(config, AugmentationConfig(recipe=recipe), 16)(data)
        assert image.shape == (3, 16, 16)
        assert (image[0] > 150).all()
        assert (image[1:] < 80).all()


def test_the_stream_counts_every_hostile_picture(
    make_shard: MakeShard, picture: Callable[[int], bytes], encode: Encode
) -> None:
    good = [(f"good{n}", {"png": picture(n), "cls": b"1"}) for n in range(20)]
    jpeg = encode(NOISE, "JPEG")
    hostile = {
        "text": b"this is a file where an image should be",
        "html": b"<!doctype html><title>404</title>",
        "zero": b"",
        "cut": jpeg[: len(jpeg) // 2],
        "nulls": bytes(5000),
        "pickle": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
        "bomb": png(13_000, 13_000, zeros(1 << 20)),
    }
    bad = [(name, {"png": data, "cls": b"1"}) for name, data in hostile.items()]
    shards = str(make_shard("x.tar", [*good[:10], *bad, *good[10:]]))
    config = ClassificationConfig(shards=shards)
    options = {"image_size": 8, "num_classes": 2, "seed": 0, "global_batch": 27}
    for workers in (0, 1):
        stream = classification_stream(config, workers=workers, **options)
        for batch in itertools.islice(stream.batches(), 2):
            assert {key for key, _ in good} == set(batch["key"])
            counts = Counter(batch["skipped"])
            assert set(counts) == {"broken image", "image over 64000000 pixels"}
            assert counts["broken image"] >= 6


def test_a_loader_says_why_it_skips() -> None:
    with pytest.raises(SkipSample, match=r"^broken image$"):
        TrainingPictures(StreamConfig(), AugmentationConfig(), 8)(b"")
    with pytest.raises(DecodeError, match=r"^broken image$"):
        decode_rgb(b"\xff\xd8" + b"\xff\xe0\x00\x00" * 10)
