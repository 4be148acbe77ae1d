"""A picture of some samples with their captions and labels beneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.captions import MAX_BYTES, member_of, parse_field, read_captions
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.shard_counts import choose
from data_pipelines.shard_stats import spread
from data_pipelines.shard_survey import Fields, find_fields, find_shards, printable, read_picture
from data_pipelines.shards import FieldError, ShardReader
from data_pipelines.tool_config import ShowConfig

MARGIN, LETTERING, LINES = 8, 12, 4
INK, FAINT, PAPER, EMPTY = (20, 20, 20), (120, 120, 120), (255, 255, 255), (224, 224, 224)


@dataclass(frozen=True)
class Tile:
    """A sample to draw: its picture, or the reason why there is none, and lines beneath."""

    picture: Image.Image | str
    key: str
    text: str


def draw_contact_sheet(config: ShowConfig) -> tuple[Image.Image, int]:
    """The sheet, and how many samples it shows.

    Raises:
        ShardError: no shard matches, or the settings do not suit the shards.
        ValueError: a setting out of range.
    """
    check_config(config)

    def pick(total: int) -> Sequence[int]:
        if config.seed is None:
            return spread(total, config.count)
        count = min(config.count, total)
        return np.random.default_rng(config.seed).choice(total, count, replace=False).tolist()

    choice = choose(find_shards(config.shards), config.index_folder, pick)
    fields = find_fields(choice.index, config)
    reader = ShardReader(choice.index)
    tiles = [read_tile(reader, sample, fields, config) for sample in choice.samples]
    title = f"{len(tiles)} of {choice.total:,} samples in {len(choice.counts):,} shards"
    return _draw(tiles, config, title), len(tiles)


def check_config(config: ShowConfig) -> None:
    """Raise ValueError for settings out of range."""
    limits = {
        "count": (1, 10_000),
        "columns": (1, 100),
        "size": (16, 2048),
        "max_pixels": (1, None),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
    if config.seed is not None and config.seed < 0:
        raise ValueError(f"seed must not be negative, got {config.seed}")
    if not config.output.endswith(".png"):
        raise ValueError(f"output '{config.output}': choose a name that ends in .png")
    if not Path(config.output).parent.is_dir():
        raise ValueError(f"output '{config.output}': make its folder first")


def read_tile(reader: ShardReader, sample: int, fields: Fields, config: ShowConfig) -> Tile:
    """What the sheet shows of a sample; what cannot be read stands there as the reason."""
    key = str(reader.index.keys[sample])
    return Tile(_picture(reader, sample, fields, config), key, _text(reader, sample, fields))


def _picture(
    reader: ShardReader, sample: int, fields: Fields, config: ShowConfig
) -> Image.Image | str:
    try:
        data = read_picture(reader, sample, fields.images)
        if data is None:
            return "no picture"
        pixels = decode_rgb(data, config.max_pixels)
    except (FieldError, DecodeError) as error:
        return str(error)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = config.size / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    method = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    return image.resize((size[0], size[1]), method)


def _text(reader: ShardReader, sample: int, fields: Fields) -> str:
    """Label and captions in one string, captions divided by bars."""
    parts = []
    try:
        if fields.labels is not None:
            data = reader.read(sample, member_of(fields.labels), MAX_BYTES)
            parts.append(f"[{parse_field(fields.labels, data)}]".replace("\n", ""))
        if fields.captions is not None:
            parts.append(" | ".join(read_captions(reader, sample, fields.captions)))
    except FieldError as error:
        parts.append(f"({error})")
    return printable(" ".join(parts), 400)


def _draw(tiles: Sequence[Tile], config: ShowConfig, title: str) -> Image.Image:
    columns = min(config.columns, len(tiles))
    rows = -(-len(tiles) // columns)
    # Letters of many alphabets: the font that comes with matplotlib.
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(str(path), LETTERING)
    line = LETTERING + 4
    wide, tall = config.size + MARGIN, config.size + (LINES + 1) * line + MARGIN
    sheet = Image.new("RGB", (columns * wide + MARGIN, rows * tall + line + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font)
    for number, tile in enumerate(tiles):
        left = MARGIN + number % columns * wide
        top = line + 2 * MARGIN + number // columns * tall
        if isinstance(tile.picture, str):
            draw.rectangle((left, top, left + config.size - 1, top + config.size - 1), EMPTY)
            draw.text((left + 4, top + 4), _fit(tile.picture, font, config.size - 8), INK, font)
        else:
            spare = [config.size - side for side in tile.picture.size]
            sheet.paste(tile.picture, (left + spare[0] // 2, top + spare[1]))
        below = top + config.size + 2
        draw.text((left, below), _fit(printable(tile.key), font, config.size), FAINT, font)
        for place, text in enumerate(_wrap(tile.text, font, config.size)):
            draw.text((left, below + (place + 1) * line), text, INK, font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Up to LINES lines that fit into `width` pixels; the last ends in … where more is left."""
    letters = max(4, int(width / font.getlength("n")))
    lines = textwrap.wrap(text, letters)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + " …"]
    return [_fit(line, font, width) for line in lines]


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
