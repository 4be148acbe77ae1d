"""Image bytes to uint8 RGB tensors, fast and safely.

JPEG in RGB and grey is decoded by simplejpeg, which is libjpeg-turbo with little around it, opaque
WebP by torchvision: faster than by Pillow and to the same pixels. Everything else (palettes, CMYK,
several frames or pictures, 16 bits, alpha) is left to Pillow, whose conversions are the ones that
open_clip and most others train with.

What libjpeg-turbo warns of (a marker out of place, bytes too many), or has no name for (rare
samplings of the colours), is left to torchvision, which makes a picture of it where one can be made
and refuses one that was cut.

PNG stays with Pillow. In torchvision 0.29 one flipped bit in the compressed data of a PNG ends the
process with a segmentation fault. Checksums alone would not help, for whoever makes a file can make
them match; proving the data sound means inflating it once more, after which both together take
longer (7.6 ms for a picture of 512 pixels) than Pillow alone (5.9 ms).
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode

# Without this list Pillow would also try formats that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# What torchvision's function of this name ends in, without a warning for each call.
_decode_image = torch.ops.image.decode_image.default
_NO_NEED_OF_PILLOW = {("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB")}
_START_OF_JPEG = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"
# Encoders write about ten. Each scan of a progressive JPEG may pass over the whole picture again,
# so a file of a few hundred kilobytes could keep a decoder busy for minutes.
MAX_SCANS = 100
_ORIENTATION = 0x0112  # the EXIF tag


class DecodeError(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


class _JpegHeader(NamedTuple):
    height: int
    width: int
    progressive: bool
    exif: bool


def _plain_jpeg(data: bytes | bytearray) -> _JpegHeader | None:
    """The header of a JPEG in 8-bit grey or RGB with nothing unusual before its frame, else None.

    Pillow would say the same and take a twentieth of the time that a small picture takes in all.
    Several pictures in one file (MPO), other encodings and anything that breaks the rules are left
    to Pillow.
    """
    if data[:2] != _START_OF_JPEG:
        return None
    position, exif = 2, False
    while position + 10 <= len(data):
        start, marker, length = struct.unpack_from(">BBH", data, position)
        if start != 0xFF or length < 2:
            return None
        if 0xC0 <= marker <= 0xC2:
            depth, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if depth != 8 or channels not in (1, 3) or not height or not width:
                return None
            return _JpegHeader(height, width, marker == 0xC2, exif)
        table_or_note = marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF
        if not table_or_note or data.startswith(b"MPF\0", position + 4):
            return None
        exif |= data.startswith(b"Exif\0\0", position + 4)
        position += 2 + length
    return None


class Picture:
    """An encoded picture whose header has been read and found within bounds.

    `height` and `width` are those of the picture as `decode` turns it.

    Raises:
        DecodeError: the header is broken, of a format outside FORMATS, or claims more than
            `max_pixels`.
    """

    def __init__(
        self, data: bytes | bytearray, max_pixels: int = 64_000_000, exif_orientation: bool = False
    ) -> None:
        self._data, self._orientation = data, 1
        self._image: Image.Image | None = None
        header = _plain_jpeg(data)
        if header is None or (exif_orientation and header.exif):
            self._image = _open(data)
            self.height, self.width = self._image.height, self._image.width
            progressive = "progressive" in self._image.info
            if exif_orientation:
                self._orientation = _orientation(self._image)
        else:
            self.height, self.width, progressive, _ = header
        if self.height * self.width > max_pixels:
            raise DecodeError(f"image over {max_pixels} pixels")
        if progressive and data.count(_START_OF_SCAN) > MAX_SCANS:
            raise DecodeError(f"JPEG of over {MAX_SCANS} scans")
        if self._orientation >= 5:
            self.height, self.width = self.width, self.height

    @property
    def needs_pillow(self) -> bool:
        """Whether Pillow alone gives the right pixels."""
        image = self._image
        if image is None:
            return False
        kind = (image.format, image.mode)
        return kind not in _NO_NEED_OF_PILLOW or getattr(image, "is_animated", False)

    @property
    def plain_jpeg(self) -> bool:
        """Whether it is a JPEG in grey or RGB that is to be decoded as it lies."""
        return self._image is None

    def decode(self, shrink: int = 1) -> Tensor:
        """uint8 (3, H, W), RGB, whose channels lie side by side in memory (H, W, 3).

        `shrink` of 2, 4 or 8 lets a JPEG in grey or RGB come out that many times smaller, sides
        rounded up, by leaving out its high frequencies; other pictures, those smaller than that,
        and those that libjpeg-turbo warns of come out whole.

        Raises:
            DecodeError: broken.
        """
        try:
            if self.needs_pillow:
                image = _from_pillow(self._image or _open(self._data))
            elif self._data[:2] == _START_OF_JPEG:
                image = self._from_jpeg(shrink)
            else:
                image = _from_torchvision(self._data)
        except DecodeError:
            raise
        except Exception as error:  # decoders raise nearly anything on broken files
            raise DecodeError("broken image") from error
        return _turn(image, self._orientation) if self._orientation != 1 else image

    def _from_jpeg(self, shrink: int) -> Tensor:
        height, width = self.height, self.width
        if self._orientation >= 5:
            height, width = width, height
        least = (0, 0, 1)
        if 1 < shrink <= min(height, width):
            # The largest factor that leaves at least this size, which is `shrink`.
            least = (-(-height // shrink), -(-width // shrink), shrink)
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", False, False, *least)
        except ValueError:  # a warning, or a sampling without a name
            return _from_torchvision(self._data)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_rgb(
    data: bytes | bytearray, max_pixels: int = 64_000_000, exif_orientation: bool = False
) -> Tensor:
    """Decode to uint8 (3, H, W), RGB.

    The header is checked before anything is decoded, so a small file that claims a huge picture
    costs nothing. The pixels are those of Pillow's `convert("RGB")`, as in open_clip: alpha is
    dropped, animations give their first frame. Only 16-bit greyscale differs: Pillow would clip it
    to white, here its high byte is kept. EXIF rotation is ignored, as in open_clip and big_vision,
    unless `exif_orientation` is set.

    Raises:
        DecodeError: broken, of a format outside FORMATS, or larger than `max_pixels`.
    """
    return Picture(data, max_pixels, exif_orientation).decode()


def _from_torchvision(data: bytes | bytearray) -> Tensor:
    # Of bytes that may not be written to, torch would warn.
    buffer = torch.frombuffer(
        data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8
    )
    return _decode_image(buffer, ImageReadMode.RGB.value, False)


def _open(data: bytes | bytearray) -> Image.Image:
    """Read a header with Pillow."""
    try:
        with warnings.catch_warnings():
            # Odd metadata and the like: nothing a user of a million files could act upon.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # Pillow's own limit, about 179 million
        raise DecodeError("image over Pillow's limit of pixels") from error
    except Exception as error:
        raise DecodeError("broken image") from error


def _from_pillow(image: Image.Image) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.mode.startswith("I;16"):
            high = (np.asarray(image) >> 8).astype(np.uint8)
            return torch.from_numpy(np.stack([high] * 3, -1)).permute(2, 0, 1)
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, which is upright, where there is none that makes sense."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata is no reason to drop a picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation on (3, H, W)."""
    if orientation >= 5:
        image = image.mT
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return image.flip(flips) if flips else image
