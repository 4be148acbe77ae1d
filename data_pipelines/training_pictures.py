"""Encoded pictures to cropped, augmented tensors: what all training streams do alike."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipelines.config import AugmentationConfig, StreamConfig
from data_pipelines.decode import DecodeError, Picture
from data_pipelines.shard_reader import Bytes, ShardReader
from data_pipelines.shards import FieldError
from data_pipelines.stream import SkipSample
from data_pipelines.transforms import train_transform


class TrainingPictures:
    """Bytes of a picture to uint8 (3, S, S), by the settings of a stream.

    The crop is drawn from the header, before decoding, so that with `scaled_decoding` a JPEG is
    decoded no larger than the crop needs.
    """

    def __init__(
        self, config: StreamConfig, augmentation: AugmentationConfig, image_size: int
    ) -> None:
        self.max_pixels, self.exif_orientation = config.max_pixels, config.exif_orientation
        self.scaled = config.scaled_decoding
        self.transform = train_transform(image_size, augmentation)
        self.image_size = image_size
        self._rows: list[Tensor] = []

    def start_batch(self, count: int) -> None:
        """Let the next `count` pictures lie side by side, so that `collate` need not copy them."""
        size = self.image_size
        rows = torch.empty((count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self._rows = list(rows.unbind())[::-1]

    def __call__(self, data: Bytes) -> Tensor:
        """Decode, crop and augment, drawing from torch's default generator.

        Raises:
            SkipSample: a picture that cannot be used.
        """
        try:
            picture = Picture(data, self.max_pixels, self.exif_orientation)
            box = self.transform.draw_box(picture.height, picture.width)
            shrink = self.transform.shrink(box) if self.scaled else 1
            image = picture.decode(shrink)
        except DecodeError as error:
            raise SkipSample(str(error)) from error
        if image.shape[-2:] != (picture.height, picture.width):
            box = box.shrunk(shrink)
        if not self._rows:
            return self.transform(image, box)
        row = self._rows.pop()
        result = self.transform(image, box, row)
        return row if result.data_ptr() == row.data_ptr() else row.copy_(result)


def read_picture(reader: ShardReader, sample: int, image_keys: list[str]) -> Bytes:
    """The encoded picture of a sample: the first of its members `image_keys`.

    Raises:
        SkipSample: it has none, or one that is too large to be read.
    """
    for ext in image_keys:
        try:
            data = reader.read(sample, ext)
        except FieldError as error:
            raise SkipSample(str(error)) from error
        if data is not None:
            return data
    raise SkipSample("no image member")
