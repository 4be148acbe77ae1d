"""Pictures with captions, from webdataset shards: the contrastive training stream and its
evaluation counterpart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_pipelines.captions import (
    captions_of,
    draw_caption,
    group_of,
    member_of,
    read_field,
)
from data_pipelines.config import ImageTextConfig
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.shards import FieldError, ShardIndex, ShardReader, expand_shards, index_shards
from data_pipelines.stream import SkipSample, Stream
from data_pipelines.transforms import train_transform

Tokenize = Callable[[list[str]], Tensor]
REMEMBERED_CAPTIONS = 65_536


def read_image(reader: ShardReader, sample: int, image_keys: list[str], max_pixels: int) -> Tensor:
    """Decode a sample's picture to uint8 (3, H, W), or raise SkipSample."""
    for ext in image_keys:
        try:
            data = reader.read(sample, ext)
            if data is not None:
                return decode_rgb(data, max_pixels)
        except (DecodeError, FieldError) as error:
            raise SkipSample(str(error)) from error
    raise SkipSample("no image member")


class ImageTextLoader:
    """Loads one sample as {image uint8 (3, S, S), text int64 (L,), key, group int64 ()}."""

    def __init__(
        self, index: ShardIndex, config: ImageTextConfig, image_size: int, tokenize: Tokenize
    ) -> None:
        index.require("picture", config.image_keys)
        index.require("caption", [member_of(config.caption_key)])
        if config.group_key is not None:
            index.require("group", [member_of(config.group_key)])
        self.reader, self.config, self.tokenize = ShardReader(index), config, tokenize
        self.transform = train_transform(image_size, config.augmentation)
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, sample: int) -> dict[str, Any]:
        config, reader = self.config, self.reader
        try:
            caption = draw_caption(captions_of(read_field(reader, sample, config.caption_key)))
            fields: dict[str, Any] = {"key": str(reader.index.keys[sample])}
            if config.group_key is not None:
                value = read_field(reader, sample, config.group_key)
                fields["group"] = torch.tensor(group_of(value))
        except FieldError as error:
            raise SkipSample(str(error)) from error
        image = read_image(reader, sample, config.image_keys, config.max_pixels)
        return fields | {"text": self._tokenize(caption), "image": self.transform(image)}

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
        ShardError: missing, empty or unsuitable shards, or fewer samples than a batch.
    """
    index = index_shards(expand_shards(config.shards))
    return Stream(
        index,
        ImageTextLoader(index, config, image_size, tokenize),
        seed=seed,
        shuffle=config.shuffle,
        window=config.shuffle_window,
        global_batch=global_batch,
        rank=rank,
        world=world,
        workers=workers,
    )
