"""Counting and measuring what is in shards; pictures are not decoded, only their headers read."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.captions import MAX_BYTES, integer_of, member_of, parse_field, read_captions
from data_pipelines.classification import ClassNumbers, read_lines
from data_pipelines.decode import DecodeError
from data_pipelines.pack_pictures import read_header
from data_pipelines.shard_counts import choose
from data_pipelines.shard_survey import Fields, find_fields, find_shards, read_picture, survey
from data_pipelines.shards import FieldError, ShardIndex, ShardReader
from data_pipelines.token_names import TokenNames, open_token_names
from data_pipelines.tool_config import StatsConfig

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def _numbers() -> array[int]:
    return array("q")


@dataclass
class Tally:
    """What samples have been found to hold; lists have one entry for each picture or caption."""

    samples: int = 0
    widths: array[int] = field(default_factory=_numbers)
    heights: array[int] = field(default_factory=_numbers)
    image_bytes: array[int] = field(default_factory=_numbers)
    captions: array[int] = field(default_factory=_numbers)
    words: array[int] = field(default_factory=_numbers)
    tokens: array[int] = field(default_factory=_numbers)
    formats: Counter[str] = field(default_factory=Counter)
    word_counts: Counter[str] = field(default_factory=Counter)
    token_counts: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Take in what was found elsewhere."""
        self.samples += other.samples
        for name in ("widths", "heights", "image_bytes", "captions", "words", "tokens"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("formats", "word_counts", "token_counts", "labels", "unreadable"):
            getattr(self, name).update(getattr(other, name))


@dataclass
class ShardStats:
    """Figures of a set of shards; `looked_at` of its samples were read. `recorded` where counts are
    those of `_stats.json` files, and `truncated` counts among the shards that were looked at."""

    shards: int
    samples: int
    recorded: bool
    truncated: int
    file_bytes: Sequence[int]
    shard_samples: Sequence[int]
    tally: Tally
    tokenizer: str | None
    context_length: int

    def distributions(self) -> dict[str, np.ndarray]:
        """Figures that every shard, picture or caption has, by name; empty ones are left out."""
        tally = self.tally
        widths, heights = np.array(tally.widths), np.array(tally.heights)
        found = {
            "samples per shard": np.array(self.shard_samples),
            "bytes per shard": np.array(self.file_bytes),
            "width": widths,
            "height": heights,
            "width / height": widths / np.maximum(heights, 1),
            "bytes per picture": np.array(tally.image_bytes),
            "captions per sample": np.array(tally.captions),
            "words per caption": np.array(tally.words),
            "tokens per caption": np.array(tally.tokens),
        }
        return {name: values for name, values in found.items() if values.size}

    @property
    def over_context(self) -> int:
        """Captions with more tokens than a text tower reads."""
        return int((np.array(self.tally.tokens) > self.context_length).sum())

    def as_json(self, top: int, names: Sequence[str] | None = None) -> dict[str, Any]:
        """All figures as plain values, `top` words, tokens and labels of each list."""
        tally = self.tally
        return {
            "shards": self.shards,
            "truncated_shards": self.truncated,
            "samples": self.samples,
            "counts_from": "_stats.json" if self.recorded else "headers",
            "looked_at": tally.samples,
            "unreadable": dict(tally.unreadable.most_common()),
            "formats": dict(tally.formats.most_common()),
            "distributions": {k: summary(v) for k, v in self.distributions().items()},
            "tokenizer": self.tokenizer,
            "context_length": self.context_length,
            "captions_over_context": self.over_context if self.tokenizer else None,
            "different_words": len(tally.word_counts),
            "top_words": top_of(tally.word_counts, top),
            "top_tokens": top_of(tally.token_counts, top),
            "different_labels": len(tally.labels),
            "top_labels": [
                [label_name(label, names), count] for label, count in top_of(tally.labels, top)
            ],
        }


def summary(values: np.ndarray) -> dict[str, float]:
    """Smallest, largest, mean and three quantiles of numbers (N,)."""
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
    return {
        "min": values.min().item(),
        "5%": low,
        "median": middle,
        "mean": values.mean().item(),
        "95%": high,
        "max": values.max().item(),
    }


def top_of(counts: Counter[Any], top: int) -> list[list[Any]]:
    """The most frequent entries and their counts; among equals in the order of their names."""
    return [[k, n] for k, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top]]


def label_name(label: int, names: Sequence[str] | None) -> str:
    """A label with its name where that is known."""
    known = names is not None and 0 <= label < len(names)
    return f"{label} {names[label]}" if known and names is not None else str(label)


def measure(config: StatsConfig, workers: int) -> ShardStats:
    """Read the samples of `config` and count.

    Raises:
        ShardError: no shard matches, or the settings do not suit the shards.
        ValueError: a setting out of range.
    """
    for name in ("top", "context_length", "max_pixels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.samples is not None and config.samples < 1:
        raise ValueError(f"samples must be at least 1, got {config.samples}")
    choice = choose(
        find_shards(config.shards), config.index_folder, lambda total: spread(total, config.samples)
    )
    index = choice.index
    fields = find_fields(index, config)
    names = None
    if config.tokenizer is not None and fields.captions is not None:
        names = open_token_names(config.tokenizer)
    numbers = ClassNumbers(read_lines(config.classnames) if config.classnames else ())
    reader = SampleMeter(index, fields, names, numbers)
    tally = Tally()
    with tqdm(total=len(choice.samples), unit="sample", desc="stats", disable=None) as bar:
        for count, part in survey(reader.measure, index, choice.samples, workers):
            tally.add(part)
            bar.update(count)
    return ShardStats(
        shards=len(choice.counts),
        samples=choice.total,
        recorded=choice.recorded,
        truncated=len(index.truncated),
        file_bytes=choice.file_bytes,
        shard_samples=choice.counts,
        tally=tally,
        tokenizer=None if names is None else names.name,
        context_length=config.context_length,
    )


def spread(total: int, count: int | None) -> Sequence[int]:
    """Up to `count` numbers below `total`, evenly spaced; all of them for null."""
    if count is None or count >= total:
        return range(total)
    return [number * total // count for number in range(count)]


class SampleMeter:
    """Measures samples, in any process."""

    def __init__(
        self, index: ShardIndex, fields: Fields, names: TokenNames | None, numbers: ClassNumbers
    ) -> None:
        self.reader, self.fields, self.names = ShardReader(index), fields, names
        self.numbers = numbers

    def measure(self, samples: Sequence[int]) -> Tally:
        """What `samples` hold."""
        tally = Tally(samples=len(samples))
        for sample in samples:
            self._picture(sample, tally)
            self._captions(sample, tally)
            self._label(sample, tally)
        return tally

    def _picture(self, sample: int, tally: Tally) -> None:
        try:
            data = read_picture(self.reader, sample, self.fields.images)
            if data is None:
                raise FieldError("no image member")
            header = read_header(data)
        except (FieldError, DecodeError) as error:
            tally.unreadable[str(error)] += 1
            return
        tally.widths.append(header.width)
        tally.heights.append(header.height)
        tally.image_bytes.append(len(data))
        tally.formats[header.format] += 1

    def _captions(self, sample: int, tally: Tally) -> None:
        if self.fields.captions is None:
            return
        try:
            captions = read_captions(self.reader, sample, self.fields.captions)
        except FieldError as error:
            tally.unreadable[str(error)] += 1
            return
        tally.captions.append(len(captions))
        for caption in captions:
            words = _WORD.findall(caption.casefold())
            tally.words.append(len(words))
            tally.word_counts.update(words)
            if self.names is not None:
                tokens = self.names(caption)
                tally.tokens.append(len(tokens) + self.names.added)
                tally.token_counts.update(tokens)

    def _label(self, sample: int, tally: Tally) -> None:
        if self.fields.labels is None:
            return
        try:
            data = self.reader.read(sample, member_of(self.fields.labels), MAX_BYTES)
            label = self.numbers.number(parse_field(self.fields.labels, data))
            tally.labels[integer_of(label)] += 1
        except FieldError as error:
            tally.unreadable[str(error)] += 1
