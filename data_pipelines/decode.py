"""Image bytes to uint8 RGB tensors, safely."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

# Without this list Pillow would also try formats that run other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# What torchvision decodes faster, to the same pixels. Not PNG: with torchvision 0.29 a single
# flipped bit in the compressed data of a PNG ends the process with a segmentation fault.
_TORCHVISION = {("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB")}


class DecodeError(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def decode_rgb(data: bytes, max_pixels: int = 64_000_000) -> Tensor:
    """Decode to uint8 (3, H, W), RGB.

    The header is checked before anything is decoded, so a small file that claims a huge picture
    costs nothing. The pixels are those of Pillow's `convert("RGB")`, as in open_clip: alpha is
    dropped, animations give their first frame, EXIF rotation is ignored. Only 16-bit greyscale
    differs: Pillow would clip it to white, here its high byte is kept.

    Raises:
        DecodeError: broken, of a format outside FORMATS, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            # Odd metadata and the like: nothing a user of a million files could act upon.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise DecodeError(f"image over {max_pixels} pixels")
                animated = getattr(image, "is_animated", False)
                if (image.format, image.mode) in _TORCHVISION and not animated:
                    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    return decode_image(buffer, mode=ImageReadMode.RGB)
                return _from_pillow(image)
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, about 179 million
        raise DecodeError("image over Pillow's limit of pixels") from error
    except Exception as error:  # decoders raise nearly anything on broken files
        raise DecodeError("broken image") from error


def _from_pillow(image: Image.Image) -> Tensor:
    if image.mode.startswith("I;16"):
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return torch.from_numpy(high).expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
