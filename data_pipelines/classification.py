"""Pictures with one integer label, from webdataset shards: the classification stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_pipelines.captions import label_of, member_of, read_field
from data_pipelines.config import ClassificationConfig
from data_pipelines.shards import (
    FieldError,
    ShardError,
    ShardIndex,
    ShardReader,
    expand_shards,
    index_shards,
)
from data_pipelines.stream import SkipSample, Stream
from data_pipelines.training_pictures import TrainingPictures, read_picture


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text file such as class names, line i naming label i.

    Raises:
        ShardError: the file is missing, empty or no text, or a line before the last name is empty,
            which would leave a label nameless.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ShardError(f"'{path}' is not a file: it should hold one name per line") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"'{path}' is not UTF-8 text: save it as UTF-8") from error
    # Split at newlines only: `str.splitlines` also splits at form feeds and the like, and one
    # extra line would shift every later label.
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ShardError(f"'{path}' is empty: it should hold one name per line")
    if "" in lines:
        raise ShardError(f"'{path}', line {lines.index('') + 1} is empty: fill or remove it")
    return lines


class ClassificationLoader:
    """Loads one sample as {image uint8 (3, S, S), label int64 (), key}."""

    def __init__(
        self, index: ShardIndex, config: ClassificationConfig, image_size: int, num_classes: int
    ) -> None:
        index.require("picture", config.image_keys)
        index.require("label", [member_of(config.label_key)])
        self.reader, self.config, self.num_classes = ShardReader(index), config, num_classes
        self.pictures = TrainingPictures(config, config.augmentation, image_size)

    def __call__(self, sample: int) -> dict[str, Any]:
        config, reader = self.config, self.reader
        try:
            label = label_of(read_field(reader, sample, config.label_key), self.num_classes)
        except FieldError as error:
            raise SkipSample(str(error)) from error
        data = read_picture(reader, sample, config.image_keys)
        return {
            "image": self.pictures(data),
            "label": torch.tensor(label),
            "key": str(reader.index.keys[sample]),
        }


def classification_stream(
    config: ClassificationConfig,
    *,
    image_size: int,
    num_classes: int,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Stream:
    """Open the shards of `config` as a classification training stream.

    Raises:
        ShardError: missing, empty or unsuitable shards, or fewer samples than a batch.
    """
    index = index_shards(expand_shards(config.shards))
    return Stream(
        index,
        ClassificationLoader(index, config, image_size, num_classes),
        seed=seed,
        shuffle=config.shuffle,
        window=config.shuffle_window,
        global_batch=global_batch,
        rank=rank,
        world=world,
        workers=workers,
    )
