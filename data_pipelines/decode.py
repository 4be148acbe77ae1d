"""Image bytes to uint8 RGB tensors, safely."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

# What torchvision decodes to the same pixels as Pillow; everything else goes through Pillow.
_TORCHVISION = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGB")}


class DecodeError(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def decode_rgb(data: bytes, max_pixels: int = 64_000_000) -> Tensor:
    """Decode to uint8 (3, H, W), RGB.

    The header is checked before anything is decoded, so a small file that claims a huge picture
    costs nothing. Pictures with palette, alpha, CMYK, 16 bits or several frames are converted by
    Pillow (first frame, alpha dropped), as open_clip does.

    Raises:
        DecodeError: broken, unknown, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DecodeError(f"image over {max_pixels} pixels")
                plain = (image.format, image.mode) in _TORCHVISION
                if not plain or getattr(image, "is_animated", False):
                    array = np.array(image.convert("RGB"))
                    return torch.from_numpy(array).permute(2, 0, 1)
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(buffer, mode=ImageReadMode.RGB)
    except DecodeError:
        raise
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow reports some broken PNG files as SyntaxError.
        raise DecodeError("broken image") from error
