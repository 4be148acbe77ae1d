"""Labelled and captioned pictures in a fixed order, for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipelines.captions import FieldError, captions_of, label_of, member_of, read_field
from data_pipelines.image_text import read_image
from data_pipelines.shards import ShardReader, expand_shards, index_shards
from data_pipelines.stream import SkipSample, collate
from data_pipelines.transforms import eval_transform


class EvaluationSet(Dataset[dict[str, Any]]):
    """Samples in shard order: {image uint8 (3, S, S), number, captions, label, key}.

    `captions` is a list of strings (empty without `caption_key`), `label` an int (-1 without
    `label_key`). A sample that cannot be used comes as {number, skipped: the reason}.

    Raises:
        ShardError: missing, empty or unsuitable shards.
        ValueError: labels without a number of classes, or an unknown resize mode.
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
        max_pixels: int = 64_000_000,
    ) -> None:
        if label_key is not None and num_classes < 1:
            raise ValueError(f"label_key '{label_key}' needs num_classes of at least 1")
        self.index = index_shards(expand_shards(shards))
        self.index.require("picture", image_keys)
        if caption_key is not None:
            self.index.require("caption", [member_of(caption_key)])
        if label_key is not None:
            self.index.require("label", [member_of(label_key)])
        self.reader = ShardReader(self.index)
        self.image_keys, self.caption_key, self.label_key = image_keys, caption_key, label_key
        self.num_classes, self.max_pixels = num_classes, max_pixels
        self.transform = eval_transform(image_size, resize_mode)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        fields: dict[str, Any] = {"number": index, "key": str(self.index.keys[index])}
        try:
            fields["captions"] = []
            if self.caption_key is not None:
                member = self.reader.read(index, member_of(self.caption_key))
                fields["captions"] = captions_of(read_field(self.caption_key, member))
            fields["label"] = -1
            if self.label_key is not None:
                member = self.reader.read(index, member_of(self.label_key))
                fields["label"] = label_of(read_field(self.label_key, member), self.num_classes)
            image = read_image(self.reader, index, self.image_keys, self.max_pixels)
        except (FieldError, SkipSample) as error:
            return {"number": index, "skipped": str(error)}
        return fields | {"image": self.transform(image)}

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[dict[str, Any]]:
        """This process's share of the samples (every world-th), in batches.

        Each batch is collated from the usable samples and has `skipped`, a Counter of reasons;
        a batch without any usable sample has only `skipped`.
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
        return iter(loader)

    def pictures(self, numbers: list[int]) -> Tensor:
        """Transformed pictures of the given samples, uint8 (N, 3, S, S), for showing."""
        return torch.stack([self[number]["image"] for number in numbers])


def _collate_usable(samples: list[dict[str, Any]]) -> dict[str, Any]:
    usable = [sample for sample in samples if "image" in sample]
    skipped = Counter(sample["skipped"] for sample in samples if "image" not in sample)
    return (collate(usable) if usable else {}) | {"skipped": skipped}
