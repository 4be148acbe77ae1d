"""Labelled and captioned pictures in a fixed order, for evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.captions import integer_of, member_of, members_of, read_captions, read_field
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.loaders import iterate
from data_pipelines.shards import (
    FieldError,
    ShardError,
    ShardReader,
    expand_shards,
    index_shards,
)
from data_pipelines.sources import content_of
from data_pipelines.stream import SkipSample, collate, without_stack
from data_pipelines.training_pictures import read_picture
from data_pipelines.transforms import eval_transform


class SampleSet(Dataset[dict[str, Any]], ABC):
    """Numbered samples {image, sha256, number, key, captions, label, labels}, wherever they lie.

    `sha256` is of the picture's encoded bytes.
    """

    transform: Callable[[Tensor], Tensor]
    exif_orientation = False
    """Turn photographs upright as their EXIF data say."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, or {number, skipped: the reason}."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that names the set, the same wherever it lies."""

    @abstractmethod
    def version(self) -> str:
        """Hash that changes with any byte of the samples and with how they are read; empty where
        that cannot be known."""

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        """This process's share of the samples (every world-th), in batches.

        Each batch is collated from the usable samples and has `skipped`, a Counter of reasons;
        a batch without any usable sample has only `skipped`.

        Raises:
            ShardError: a label is out of range.
            LoaderError: a loader process has died.
        """
        loader = DataLoader(
            self,
            batch_size=batch_size,
            sampler=range(rank, len(self), world),
            num_workers=workers,
            collate_fn=_collate_usable,
            # A loader draws one number; not from the generator that training uses.
            generator=torch.Generator(),
        )
        try:
            yield from iterate(loader)
        except ShardError as error:
            raise without_stack(error) from None

    def pictures(self, numbers: list[int]) -> Tensor:
        """Transformed pictures of the given samples, uint8 (N, 3, S, S), for showing."""
        return torch.stack([self[number]["image"] for number in numbers])


class EvaluationSet(SampleSet):
    """Samples in shard order: {image uint8 (3, S, S), number, captions, label, key}.

    `captions` is a list of strings (empty without `caption_key`), `label` an int (-1 without
    `label_key`); with `several`, `labels` is the list of all its labels, which the member lists
    with spaces or commas in between or as JSON. A sample that cannot be used comes as
    {number, skipped: the reason}.

    Raises:
        ShardError: missing, empty or unsuitable shards.
        ValueError: labels without a number of classes, or an unknown resize mode or interpolation.
    """

    def __init__(
        self,
        shards: str,
        image_size: int,
        *,
        image_keys: list[str],
        caption_key: str | None = None,
        label_key: str | None = None,
        num_classes: int = 0,
        resize_mode: str = "squash",
        interpolation: str = "bicubic",
        max_pixels: int = 64_000_000,
        several: bool = False,
        exif_orientation: bool = False,
    ) -> None:
        if label_key is not None and num_classes < 1:
            raise ValueError(f"label_key '{label_key}' needs num_classes of at least 1")
        self.index = index_shards(expand_shards(shards))
        self.index.require("picture", image_keys)
        if caption_key is not None:
            self.index.require("caption", members_of(caption_key))
        if label_key is not None:
            self.index.require("label", [member_of(label_key)])
        members = [] if caption_key is None else members_of(caption_key)
        members += [] if label_key is None else [member_of(label_key)]
        self.reader = ShardReader(self.index, [*members, *image_keys])
        self.image_keys, self.caption_key, self.label_key = image_keys, caption_key, label_key
        self.num_classes, self.max_pixels, self.several = num_classes, max_pixels, several
        self.exif_orientation = exif_orientation
        self.transform = eval_transform(image_size, resize_mode, interpolation)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The samples of a batch; their bytes are fetched for a few at a time."""
        return [self[number] for number in self.reader.ahead(indices)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        fields: dict[str, Any] = {"number": index, "key": str(self.index.keys[index])}
        try:
            fields["captions"] = []
            if self.caption_key is not None:
                fields["captions"] = read_captions(self.reader, index, self.caption_key)
            fields["label"] = -1
            if self.label_key is not None and self.several:
                fields["labels"] = self._labels(index, self.label_key)
            elif self.label_key is not None:
                fields["label"] = self._label(index, self.label_key)
            data = read_picture(self.reader, index, self.image_keys)
            image = decode_rgb(data, self.max_pixels, self.exif_orientation)
        except (DecodeError, FieldError, SkipSample) as error:
            return {"number": index, "skipped": str(error)}
        digest = hashlib.sha256(data).hexdigest()
        return fields | {"image": self.transform(image), "sha256": digest}

    def fingerprint(self) -> str:
        return self.index.fingerprint()

    def version(self) -> str:
        """Of local shards the content counts, of remote ones what their store calls the version."""
        options = [
            self.image_keys, self.caption_key, self.label_key, self.several, self.num_classes,
            self.max_pixels, self.exif_orientation,
        ]  # fmt: skip
        versions = [content_of(path, self.index.reading) for path in self.index.paths]
        if not all(versions):
            return ""
        text = json.dumps([options, self.fingerprint(), versions])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_labels(self) -> None:
        """Read all labels; those that cannot be read are left to be skipped.

        Raises:
            ShardError: one is out of range.
        """
        if self.label_key is None:
            return
        read = self._labels if self.several else self._label
        for index in range(len(self)):
            with suppress(FieldError):
                read(index, self.label_key)

    def _labels(self, index: int, label_key: str) -> list[int]:
        value = read_field(self.reader, index, label_key)
        entries = value if isinstance(value, list) else re.split(r"[\s,\[\]]+", str(value))
        return [self._checked(index, integer_of(e)) for e in entries if str(e).strip()]

    def _label(self, index: int, label_key: str) -> int:
        return self._checked(index, integer_of(read_field(self.reader, index, label_key)))

    def _checked(self, index: int, label: int) -> int:
        if not 0 <= label < self.num_classes:  # leaving samples out would flatter the figures
            raise ShardError(
                f"sample '{self.index.keys[index]}' of '{self.reader.shard_of(index)}' has label"
                f" {label}, but there are {self.num_classes} classes: wrong classnames file or"
                " label_key?"
            )
        return label


def _collate_usable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    usable = [sample for sample in samples if "image" in sample]
    skipped = Counter(sample["skipped"] for sample in samples if "image" not in sample)
    return (collate(usable) if usable else {}) | {"skipped": skipped}
