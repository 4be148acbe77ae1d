"""Pictures with captions, from webdataset shards: the contrastive training stream and its
evaluation counterpart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipelines.cached_embeddings import CachedEmbeddings, Side
from data_pipelines.captions import (
    captions_by_field,
    check_weights,
    draw_caption,
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
from data_pipelines.shards import FieldError, ShardIndex, ShardReader, open_shards
from data_pipelines.stream import SkipSample, Stream
from data_pipelines.training_pictures import TrainingPictures, read_picture
from data_pipelines.transforms import RECIPES, changes_at_random, recipe_of

Tokenize = Callable[[list[str]], Tensor]
REMEMBERED_CAPTIONS = 65_536


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
        self._tokens: dict[str, Tensor] = {}

    def start_batch(self, count: int) -> None:
        """Prepare for the pictures of `count` samples."""
        if isinstance(self.pictures, TrainingPictures) and "image" not in self.cached:
            self.pictures.start_batch(count)

    def __call__(self, sample: int) -> dict[str, Any]:
        config, reader = self.config, self.reader
        try:
            text = self._text(sample)
            fields: dict[str, Any] = {"key": str(reader.index.keys[sample])}
            if config.group_key is not None:
                value = read_field(reader, sample, config.group_key)
                fields["group"] = torch.tensor(group_of(value))
            return fields | text | self._image(sample)
        except FieldError as error:
            raise SkipSample(str(error)) from error

    def _image(self, sample: int) -> dict[str, Any]:
        if "image" not in self.cached:
            data = read_picture(self.reader, sample, self.config.image_keys)
            return {"image": self.pictures(data)}
        self.cached["image"].count(sample)
        return {"image_embedding": self.cached["image"].row(sample)}

    def _text(self, sample: int) -> dict[str, Tensor]:
        if "text" not in self.cached:
            return {"text": self._tokenize(self._draw_caption(sample))}
        cached = self.cached["text"]
        return {"text_embedding": cached.row(sample, draw_number(cached.count(sample)))}

    def _draw_caption(self, sample: int) -> str:
        weights, key = self.config.caption_weights, self.config.caption_key
        if not weights:
            return draw_caption(read_captions(self.reader, sample, key))
        return draw_weighted(captions_by_field(self.reader, sample, key), weights)

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
