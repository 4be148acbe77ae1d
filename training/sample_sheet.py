"""Pictures of a batch with their captions beneath, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

COLUMNS, LARGEST, SIDE, LINES = 4, 16, 160, 3


def draw_sheet(images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Draw up to 16 pictures in rows of four.

    Args:
        images: uint8 (B, 3, H, W).
        captions: one for each, cut to three lines.
    """
    count = min(LARGEST, len(images))
    rows, line = -(-count // COLUMNS), 12
    height = SIDE + LINES * line + 8
    columns = min(COLUMNS, count)
    sheet = Image.new("RGB", (columns * (SIDE + 8) + 8, rows * height + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for number in range(count):
        left, top = 8 + number % COLUMNS * (SIDE + 8), 8 + number // COLUMNS * height
        pixels = images[number].permute(1, 2, 0).cpu().numpy()
        sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE)), (left, top))
        words = textwrap.wrap(captions[number], SIDE // 6)[:LINES]
        # The font that Pillow brings along knows Latin-1 only.
        text = "\n".join(words).encode("latin-1", "replace").decode("latin-1")
        draw.multiline_text((left, top + SIDE + 2), text, fill="black", spacing=1)
    return sheet
