"""Settings of the tools around shards (`scripts.shards`), free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclass
class PackConfig:
    """Pictures with captions or labels into shards."""

    source: str = ""
    """A folder of pictures, a .csv, .tsv or .parquet table, or a `datasets` dataset; may stand
    without `--source`, first."""
    out: str = ""
    """Folder for the shards; a new one, or that of the same command that was stopped."""
    kind: Literal["auto", "captions", "classes", "table", "dataset"] = "auto"
    """What the source is: pictures with .txt or .json beside them, a folder for each class, a
    table, or a `datasets` dataset; auto looks."""
    split: str = "train"
    """Which split of a `datasets` dataset."""
    root: str | None = None
    """Folder that paths in a table start from; null takes the table's own."""
    image_column: str | None = None
    """Column of a table or dataset with paths or pictures; null looks for a usual name."""
    caption_column: str | None = None
    """Column with captions, and the json field that stands in for a missing .txt; null looks."""
    label_column: str | None = None
    """Column with labels, integers or names; null looks for a usual name."""
    max_samples: int = 10_000
    """Most samples in one shard."""
    max_bytes: int = 1_000_000_000
    """Most bytes in one shard; only a single larger sample makes a larger shard."""
    shuffle: int | None = None
    """Seed of a random order; null keeps the order of the source."""
    shorter_side: int | None = None
    """Shrink pictures whose shorter side has more pixels to this; null leaves all as they are."""
    encode: Literal["keep", "jpg", "png", "webp"] = "keep"
    """Format to encode in. keep copies the bytes of JPEG, PNG and WebP that are not shrunken; other
    formats become PNG."""
    quality: int = 95
    """Of JPEG and WebP that are encoded, 1 to 100."""
    check: Literal["decode", "header"] = "decode"
    """How a picture that is copied is tried out: decoded whole, or only its header read."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels are left out and counted."""
    workers: int | None = None
    """Processes that read and encode; 0 uses none beside the first, null one for each core."""


@dataclass
class ReadConfig:
    """Which shards a tool reads, and what in them."""

    shards: str = ""
    """Shard pattern: a path, `{0000..0099}` ranges, `*` globs, several joined by `::`; may stand
    without `--shards`, first. A folder means its .tar files."""
    image_keys: list[str] = field(default_factory=lambda: list(IMAGE_KEYS))
    """Member extensions that hold the picture, the first present one is used."""
    caption_key: str | None = None
    """Member with captions, or `json:field`, or several joined by `::`; null takes `txt` where any
    sample has it."""
    label_key: str | None = None
    """Member with an integer label, or `json:field`; null takes `cls` where any sample has it."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels are not decoded."""


@dataclass
class ValidateConfig(ReadConfig):
    """Find what is wrong with shards."""

    min_side: int = 16
    """Pictures with a shorter side count as tiny."""
    ignore: list[str] = field(default_factory=list)
    """Kinds of problems that are neither reported nor removed."""
    near_duplicates: int | None = None
    """Also report pictures that differ in at most this many of 64 brightness steps (0 to 7)."""
    classnames: str | None = None
    """File with one class name per line, in label order; null takes labels that are names for
    broken ones."""
    report: str | None = None
    """File for the whole report as JSON."""
    clean: str | None = None
    """New folder for a copy of the shards without the samples that have problems."""
    workers: int | None = None
    """Processes that read and decode; 0 uses none beside the first, null one for each core."""


@dataclass
class StatsConfig(ReadConfig):
    """Count and measure."""

    tokenizer: str | None = "clip"
    """Tokenizer whose tokens are counted: `clip`, a model name of open_clip, or the folder or hub
    name of a Hugging Face tokenizer; null counts words only."""
    context_length: int = 77
    """Tokens that a text tower reads, start and end included; longer captions are counted."""
    samples: int | None = None
    """How many samples to look at, evenly spaced; null takes all."""
    top: int = 20
    """How many of the most frequent words, tokens and labels to list."""
    classnames: str | None = None
    """File with one class name per line, in label order, to name the labels; labels that are names
    are counted with it."""
    out: str | None = None
    """Folder for stats.json and stats.png."""
    index_folder: str | None = None
    """Folder for the indexes of shards; null keeps each beside its shard."""
    workers: int | None = None
    """Processes that read; 0 uses none beside the first, null one for each core."""


@dataclass
class ShowConfig(ReadConfig):
    """Draw a contact sheet."""

    count: int = 24
    """How many samples."""
    seed: int | None = None
    """Draws the samples at random; null takes them evenly spaced."""
    columns: int = 6
    """Pictures in a row."""
    size: int = 192
    """Pixels of the square that a picture is fitted into."""
    output: str = "shards.png"
    """The contact sheet, a .png."""
    index_folder: str | None = None
    """Folder for the indexes of shards; null keeps each beside its shard."""


@dataclass
class IndexConfig:
    """Read the shards' headers once and keep what they say for later runs."""

    index_folder: str | None = None
    """Folder for the indexes; null keeps each beside its shard, or in the user's cache where that
    is read-only or remote."""

    shards: str = ""
    """Shard pattern; may stand without `--shards`, first. A folder means its .tar files."""
