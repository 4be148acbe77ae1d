"""A picture on its way into a shard: tried out, and shrunken or encoded anew where asked for."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image

from data_pipelines.decode import FORMATS, DecodeError, decode_rgb
from data_pipelines.tool_config import PackConfig

# Extension of the member by format; others are not among the members that training reads.
KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class HugeImageError(DecodeError):
    """A picture that claims too many pixels."""


class Header(NamedTuple):
    """What a picture's header says."""

    format: str
    width: int
    height: int


class PackedPicture(NamedTuple):
    """Encoded bytes, the extension of their format, and the size in pixels."""

    extension: str
    data: bytes
    width: int
    height: int


def read_header(data: bytes | bytearray) -> Header:
    """Format and size as they lie, without decoding.

    Raises:
        HugeImageError: over Pillow's limit of pixels, about 179 million.
        DecodeError: no picture of a format that is read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return Header(str(image.format), image.width, image.height)
    except Image.DecompressionBombError as error:
        raise HugeImageError("image over Pillow's limit of pixels") from error
    except Exception as error:  # parsers raise nearly anything on broken files
        raise DecodeError("broken image") from error


def pack_picture(data: bytes, config: PackConfig) -> PackedPicture:
    """The picture as `config` wants it.

    What is encoded anew is turned upright first, for its EXIF is lost; bytes that are copied keep
    theirs.

    Raises:
        DecodeError: broken, of a format that is not read, or over `max_pixels`.
    """
    header = read_header(data)
    if header.width * header.height > config.max_pixels:
        raise DecodeError(f"image over {config.max_pixels} pixels")
    shorter = min(header.width, header.height)
    shrinks = config.shorter_side is not None and shorter > config.shorter_side
    kept = KEPT.get(header.format)
    extension = (kept or "png") if config.encode == "keep" else config.encode
    if kept is not None and extension == kept and not shrinks:
        if config.check == "decode":
            decode_rgb(data, config.max_pixels)
        return PackedPicture(kept, data, header.width, header.height)
    pixels = decode_rgb(data, config.max_pixels, exif_orientation=True)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if shrinks and config.shorter_side is not None:
        scale = config.shorter_side / shorter
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return PackedPicture(extension, _encode(image, extension, config.quality), *image.size)


def _encode(image: Image.Image, extension: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        if extension == "png":
            image.save(buffer, "PNG")
        else:
            image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[extension], quality=quality)
    except Exception as error:  # such as WebP's limit of 16383 pixels
        raise DecodeError(f"cannot be encoded as {extension}") from error
    return buffer.getvalue()
