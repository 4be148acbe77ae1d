"""Labelled and captioned pictures in a fixed order, for evaluation."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.captions import member_of, members_of, read_captions, read_field
from data_pipelines.classification import NO_LABEL, ClassNumbers
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.loaders import iterate
from data_pipelines.shards import (
    FieldError,
    ShardError,
    ShardReader,
    expand_shards,
    index_shards,
)
from data_pipelines.sources import content_of, is_remote
from data_pipelines.stream import SkipSample, collate, without_stack
from data_pipelines.training_pictures import read_picture
from data_pipelines.transforms import eval_transform


class SampleSet(Dataset[dict[str, Any]], ABC):
    """Numbered samples {image, sha256, number, key, captions, label, labels}, wherever they lie.

    `sha256` is of the picture's encoded bytes.
    """

    transform: Callable[[Tensor], Tensor]

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
    with spaces or commas in between or as JSON: numbers of classes, or some of `classnames`. A
    sample that cannot be used comes as
    {number, skipped: the reason}.

    Raises:
        ShardError: missing, empty or unsuitable shards.
        ValueError: labels without names of classes, or an unknown resize mode or interpolation.
    """

    def __init__(
        self,
        shards: str,
        image_size: int,
        *,
        image_keys: list[str],
        caption_key: str | None = None,
        label_key: str | None = None,
        classnames: Sequence[str] = (),
        resize_mode: str = "squash",
        interpolation: str = "bicubic",
        max_pixels: int = 64_000_000,
        several: bool = False,
        exif_orientation: bool = False,
    ) -> None:
        if label_key is not None and not classnames:
            raise ValueError(f"label_key '{label_key}' needs classnames")
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
        self.num_classes, self.max_pixels, self.several = len(classnames), max_pixels, several
        self.exif_orientation = exif_orientation
        self.class_numbers, self._labels_hash = ClassNumbers(classnames), ""
        self.transform = eval_transform(image_size, resize_mode, interpolation)

    @property
    def remote(self) -> bool:
        """Whether it takes requests to a store to read all labels."""
        return any(map(is_remote, self.index.paths))

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
            if self.label_key is not None:
                labels = self._labels(index, self.label_key)
                fields |= {"labels": labels} if self.several else {"label": labels[0]}
            data = read_picture(self.reader, index, self.image_keys)
            image = decode_rgb(data, self.max_pixels, self.exif_orientation)
        except (DecodeError, FieldError, SkipSample) as error:
            return {"number": index, "skipped": str(error)}
        digest = hashlib.sha256(data).hexdigest()
        return fields | {"image": self.transform(image), "sha256": digest}

    def fingerprint(self) -> str:
        return self.index.fingerprint()

    def version(self) -> str:
        """Of local shards the content counts, of remote ones what their store calls the version;
        class names count where labels are looked up among them."""
        options: list[Any] = [
            self.image_keys, self.caption_key, self.label_key, self.several, self.num_classes,
            self.max_pixels, self.exif_orientation,
        ]  # fmt: skip
        versions = [content_of(path, self.index.reading) for path in self.index.paths]
        if not all(versions):
            return ""
        labels = self.class_numbers.numbers if self.remote else self.check_labels()
        text = json.dumps([options, self.fingerprint(), versions, labels])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_labels(self) -> str:
        """Read all labels, and hash them; those that cannot be read are left to be skipped.

        Raises:
            ShardError: one is out of range, or a name of no class.
        """
        if self.label_key is not None and not self._labels_hash:
            digest = hashlib.sha256()
            for index in range(len(self)):
                with suppress(FieldError):
                    digest.update(f"{index} {self._labels(index, self.label_key)}\n".encode())
            self._labels_hash = digest.hexdigest()
        return self._labels_hash

    def _labels(self, index: int, label_key: str) -> list[int]:
        """All labels of a sample: one, unless there may be `several`.

        Raises:
            FieldError: they cannot be read.
            ShardError: one is out of range, or a name of no class: to leave such samples out would
                flatter the figures.
        """
        value = read_field(self.reader, index, label_key)
        if isinstance(value, np.ndarray):
            value = value.item() if value.size == 1 else value.reshape(-1).tolist()
        where = f"sample '{self.index.keys[index]}' of '{self.reader.shard_of(index)}' has label"
        if not self.several and isinstance(value, str) and not value.strip():
            raise FieldError("no label")
        labels = self.class_numbers.required(value, self.several, where)
        if self.several:
            labels = [label for label in labels if label != NO_LABEL]
        for label in labels:
            if not 0 <= label < self.num_classes:
                raise ShardError(
                    f"{where} {label}, but there are {self.num_classes} classes: wrong classnames"
                    " file or label_key?"
                )
        return labels


def _collate_usable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    usable = [sample for sample in samples if "image" in sample]
    skipped = Counter(sample["skipped"] for sample in samples if "image" not in sample)
    return (collate(usable) if usable else {}) | {"skipped": skipped}
