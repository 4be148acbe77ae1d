"""Pictures with captions, from webdataset shards: the contrastive training stream and its
evaluation counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipelines.cached_embeddings import CachedEmbeddings, Side
from data_pipelines.captions import (
    captions_by_field,
    check_weights,
    draw_number,
    draw_weighted,
    group_of,
    member_of,
    members_of,
    read_captions,
    read_field,
)
from data_pipelines.config import AugmentationConfig, ImageTextConfig
from data_pipelines.gpu_decode import GpuPictures
from data_pipelines.read_ahead import ReadAhead
from data_pipelines.shard_reader import Bytes
from data_pipelines.shards import FieldError, ShardIndex, ShardReader, open_shards
from data_pipelines.stream import SkipSample, Stream
from data_pipelines.training_pictures import TrainingPictures, read_picture
from data_pipelines.transforms import RECIPES, changes_at_random, recipe_of

Tokenize = Callable[[list[str]], Tensor]
REMEMBERED_CAPTIONS = 65_536


class _Record(NamedTuple):
    """What is stored of a sample; nothing in place of what a cached embedding stands for."""

    key: str
    captions: list[list[str]]  # of each field that a caption may be drawn from
    group: Tensor | None
    data: Bytes | None


class ImageTextLoader:
    """Loads one sample as {image uint8 (3, S, S), text int64 (L,), key, group int64 ()}.

    With `cached` embeddings of a side, `image_embedding` or `text_embedding` (d,) takes the place
    of `image` or `text`; everything else, the caption that is drawn included, stays the same.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: ImageTextConfig,
        image_size: int,
        tokenize: Tokenize,
        cached: Mapping[Side, CachedEmbeddings] | None = None,
    ) -> None:
        index.require("picture", config.image_keys)
        index.require("caption", members_of(config.caption_key))
        if config.caption_weights:
            check_weights(config.caption_weights, config.caption_key)
            if "text" in (cached or {}):
                raise ValueError(
                    "cached text embeddings do not know their fields: leave data.caption_weights"
                    " empty, or do without data.cached_text"
                )
        if config.group_key is not None:
            index.require("group", [member_of(config.group_key)])
        self.cached = dict(cached or {})
        members = [] if "text" in self.cached else members_of(config.caption_key)
        members += [] if "image" in self.cached else config.image_keys
        members += [] if config.group_key is None else [member_of(config.group_key)]
        self.reader, self.config, self.tokenize = ShardReader(index, members), config, tokenize
        self.decoded = TrainingPictures(config, config.augmentation, image_size)
        self.pictures: TrainingPictures | GpuPictures = self.decoded
        if config.gpu_decoding and "image" not in self.cached:
            self.pictures = GpuPictures(config, config.augmentation, image_size)
        self.records = ReadAhead(self._read, self.reader)
        self._tokens: dict[str, Tensor] = {}

    def start_batch(self, count: int) -> None:
        """Prepare for the pictures of `count` samples."""
        if isinstance(self.pictures, TrainingPictures) and "image" not in self.cached:
            self.pictures.start_batch(count)

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Read a few samples that are loaded next."""
        self.records.fetch(samples)

    def __call__(self, sample: int) -> dict[str, Any]:
        try:
            record = self.records.take(sample)
            fields: dict[str, Any] = {"key": record.key}
            if record.group is not None:
                fields["group"] = record.group
            return fields | self._text(sample, record) | self._image(sample, record)
        except FieldError as error:
            raise SkipSample(str(error)) from error

    def _read(self, sample: int) -> _Record:
        config, reader = self.config, self.reader
        captions: list[list[str]] = []
        if "text" not in self.cached and config.caption_weights:
            captions = captions_by_field(reader, sample, config.caption_key)
        elif "text" not in self.cached:
            captions = [read_captions(reader, sample, config.caption_key)]
        group = None
        if config.group_key is not None:
            group = torch.tensor(group_of(read_field(reader, sample, config.group_key)))
        data = None
        if "image" not in self.cached:
            data = read_picture(reader, sample, config.image_keys)
        return _Record(str(reader.index.keys[sample]), captions, group, data)

    def _image(self, sample: int, record: _Record) -> dict[str, Any]:
        if record.data is not None:
            return {"image": self.pictures(record.data)}
        self.cached["image"].count(sample)
        return {"image_embedding": self.cached["image"].row(sample)}

    def _text(self, sample: int, record: _Record) -> dict[str, Tensor]:
        if record.captions:
            weights = self.config.caption_weights or [1.0]
            return {"text": self._tokenize(draw_weighted(record.captions, weights))}
        cached = self.cached["text"]
        return {"text_embedding": cached.row(sample, draw_number(cached.count(sample)))}

    def _tokenize(self, caption: str) -> Tensor:
        """Tokens (L,) of a caption; small sets repeat theirs, and a byte-pair tokenizer takes as
        long for one as decoding a small picture does."""
        tokens = self._tokens.get(caption)
        if tokens is None:
            tokens = self.tokenize([caption])[0]
            if len(self._tokens) < REMEMBERED_CAPTIONS:
                self._tokens[caption] = tokens
        return tokens


def image_text_stream(
    config: ImageTextConfig,
    *,
    image_size: int,
    tokenize: Tokenize,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Stream:
    """Open the shards of `config` as a contrastive training stream.

    Raises:
        ShardError: missing, empty or unsuitable shards or embeddings, or fewer samples than a
            batch.
        ValueError: augmentation beside cached embeddings of pictures.
    """
    if config.cached_image is not None:
        refuse_augmentation(config.augmentation)
    index = open_shards(config)
    cached = open_caches(config, index)
    loader = ImageTextLoader(index, config, image_size, tokenize, cached)
    pictures = loader.pictures
    return Stream(
        index,
        loader,
        seed=seed,
        shuffle=config.shuffle,
        window=config.shuffle_window,
        global_batch=global_batch,
        rank=rank,
        world=world,
        workers=workers,
        config=config,
        cached=cached,
        finish=pictures.finish if isinstance(pictures, GpuPictures) else None,
    )


def open_caches(config: ImageTextConfig, index: ShardIndex) -> dict[Side, CachedEmbeddings]:
    """The embeddings that `config` names, by side."""
    folders: dict[Side, str | None] = {"image": config.cached_image, "text": config.cached_text}
    return {
        side: CachedEmbeddings(folder, side, index)
        for side, folder in folders.items()
        if folder is not None
    }


def refuse_augmentation(config: AugmentationConfig) -> None:
    """Raise ValueError for settings that embeddings of whole pictures cannot follow.

    The default crop passes, or every preset would have to turn it off.
    """
    default = tuple(recipe_of(config).crop_scale) == RECIPES["clip"].crop_scale
    names = [name for name in changes_at_random(config) if name != "crop_scale" or not default]
    if names:
        raise ValueError(
            "cached embeddings are of whole pictures, which data.augmentation"
            f" ({', '.join(names)}) would change: turn it off (crop_scale [1, 1], the rest 0), or"
            " do without data.cached_image"
        )
