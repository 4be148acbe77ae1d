"""Labelled pictures, from webdataset shards, tables or folders: the classification stream."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipelines.captions import class_indices_of, label_of, member_of, read_field, vector_of
from data_pipelines.config import ClassificationConfig
from data_pipelines.gpu_decode import GpuPictures
from data_pipelines.image_folder import ImageFolder
from data_pipelines.read_ahead import ReadAhead
from data_pipelines.sample_index import SampleIndex
from data_pipelines.shard_reader import Bytes, ShardReader
from data_pipelines.shards import FieldError, ShardError, open_shards
from data_pipelines.stream import SkipSample, Stream
from data_pipelines.training_pictures import TrainingPictures, read_picture

LONGEST_SHOWN = 60  # letters of a label in a message


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


NO_LABEL = -1  # in a list of labels, or in a table


class ClassNumbers:
    """Turns labels that are names of classes into their places among the names.

    What reads as an integer is one, whatever the classes are called; names that are there twice
    have no number.

    Args:
        names: in label order; empty where none are known.
        labels: as in ClassificationConfig.
    """

    def __init__(self, names: Sequence[str], labels: str = "single") -> None:
        twice = {name for name, count in Counter(names).items() if count > 1}
        self.numbers = {name: n for n, name in enumerate(names) if name not in twice}
        self.labels = labels

    def __call__(self, value: object) -> object:
        """What is stored as a sample's label, with numbers in the place of names that have one."""
        if self.labels == "indices" and isinstance(value, list | str):
            return self.several(value)
        return self.number(value) if self.labels == "single" else value

    def unknown(self, value: object) -> list[str]:
        """Names in what is stored as a sample's label that have no number."""
        if self.labels == "vector":
            return []
        found = self(value)
        entries = found if self.labels == "indices" and isinstance(found, list) else [found]
        return [entry for entry in entries if isinstance(entry, str)]

    def number(self, label: object) -> object:
        """One label: a number in the place of a text, if there is one."""
        if isinstance(label, float) and label.is_integer():  # as JSON and arrays may have it
            return int(label)
        if not isinstance(label, str):
            return label
        try:
            return int(label)
        except ValueError:
            return self.numbers.get(label.strip(), label)

    def several(self, labels: list[Any] | str) -> list[object]:
        """Labels in a list, or in a text: as JSON, or with commas, lines or spaces in between (not
        spaces, where names have them)."""
        return list(map(self.number, self._split(labels) if isinstance(labels, str) else labels))

    def required(self, value: object, several: bool, where: str) -> list[int]:
        """The numbers in what is stored as a sample's label: one, unless there may be `several`.

        Raises:
            ShardError: one is neither a number nor a name that has one, or there is a list in the
                place of one; `where` begins the message.
        """
        if isinstance(value, list) and not several:
            raise ShardError(f"{where} {_shown(value)}, a list: set label_kind to any or multi")
        found = [value]
        if several:
            found = self.several(value if isinstance(value, list | str) else [value])
            found = [entry for entry in found if not isinstance(entry, str) or entry.strip()]
        numbers: list[int] = []
        for entry in map(self.number, found):
            if not isinstance(entry, int) or isinstance(entry, bool):
                raise ShardError(
                    f"{where} {_shown(entry)}, which is neither a number nor one of"
                    " classnames: name the classes as the labels do, each once"
                )
            numbers.append(int(entry))
        return numbers

    def _split(self, text: str) -> list[Any]:
        text = text.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                text = text[1:-1]
        if isinstance(self.number(text), int):  # also of a name with commas
            return [text]
        found = list[str]()
        for part in filter(None, map(str.strip, re.split(r"[,\n]", text))):
            words = part.split()
            known = isinstance(self.number(part), int)
            # An unknown part is told as a whole.
            split = not known and all(isinstance(self.number(word), int) for word in words)
            found += words if split else [part]
        return found


def _shown(label: object) -> str:
    """A label for a message, which is of one line."""
    text = repr(label)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"


def class_numbers(config: ClassificationConfig) -> ClassNumbers:
    """Those of `data.classnames`, where that file is given."""
    return ClassNumbers(read_lines(config.classnames) if config.classnames else (), config.labels)


class Source(SampleIndex, Protocol):
    """Labelled pictures by number; `classes` are the names that the source itself carries."""

    classes: list[str] | None

    def label(self, sample: int) -> object:
        """What is stored as the label, or FieldError."""
        ...

    def key(self, sample: int) -> str:
        """What the sample is called in logs."""
        ...

    def picture(self, sample: int) -> Bytes:
        """The encoded picture, or SkipSample."""
        ...


class Shards:
    """Labelled pictures in webdataset shards."""

    classes: list[str] | None = None

    def __init__(self, config: ClassificationConfig) -> None:
        index = open_shards(config)
        index.require("picture", config.image_keys)
        index.require("label", [member_of(config.label_key)])
        members = (member_of(config.label_key), *config.image_keys)
        self.reader, self.index = ShardReader(index, members), index
        self.image_keys, self.label_key = config.image_keys, config.label_key
        self.numbers = class_numbers(config)

    def __len__(self) -> int:
        return len(self.index)

    def label(self, sample: int) -> object:
        return self.numbers(read_field(self.reader, sample, self.label_key))

    def key(self, sample: int) -> str:
        return str(self.index.keys[sample])

    def picture(self, sample: int) -> Bytes:
        return read_picture(self.reader, sample, self.image_keys)


def open_source(config: ClassificationConfig) -> Source | Shards:
    """The one of `shards`, `dataset` and `folder` that the settings name.

    Raises:
        ShardError: none or several of them are set, or the source cannot be used.
    """
    names = [name for name in ("shards", "dataset", "folder") if getattr(config, name)]
    if len(names) > 1:
        raise ShardError(f"data.{names[0]} and data.{names[1]} are both set: choose one source")
    if config.dataset:
        # Here, because the import takes a second that no other source needs.
        from data_pipelines.tables import Table

        return Table(config)
    if config.folder:
        return ImageFolder(
            config.folder, read_lines(config.classnames) if config.classnames else None
        )
    return Shards(config)


def class_names(config: ClassificationConfig, source: Source | Shards) -> list[str]:
    """The names of the classes, in label order: of `classnames`, or those the source carries.

    Raises:
        ShardError: there are none, or the file and the source count differently.
    """
    if not config.classnames and source.classes is None:
        raise ShardError(
            "the number of classes is not known: set data.classnames to a file with one class name"
            " per line"
        )
    names = read_lines(config.classnames) if config.classnames else source.classes or []
    if source.classes is not None and len(names) != len(source.classes):
        raise ShardError(
            f"'{config.classnames}' names {len(names)} classes, but the data have"
            f" {len(source.classes)}: leave data.classnames empty to take the names of the data"
        )
    return names


class ClassificationLoader:
    """Loads one sample as {image uint8 (3, S, S), label, key}.

    The label is int64 () for single labels, else float32 (num_classes,).
    """

    def __init__(
        self,
        source: Source | Shards,
        config: ClassificationConfig,
        image_size: int,
        num_classes: int,
    ) -> None:
        self.source, self.num_classes = source, num_classes
        self.labels = config.labels
        self.records = ReadAhead(self._read, source.reader if isinstance(source, Shards) else None)
        # A tensor made of a number takes ten times as long as one taken out of another.
        self._numbers = torch.arange(num_classes)
        kind = GpuPictures if config.gpu_decoding else TrainingPictures
        self.pictures = kind(config, config.augmentation, image_size)

    def start_batch(self, count: int) -> None:
        """Prepare for the pictures of `count` samples."""
        if isinstance(self.pictures, TrainingPictures):
            self.pictures.start_batch(count)

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Read a few samples that are loaded next."""
        self.records.fetch(samples)

    def __call__(self, sample: int) -> dict[str, Any]:
        try:
            label, key, data = self.records.take(sample)
        except FieldError as error:
            raise SkipSample(str(error)) from error
        return {"image": self.pictures(data), "label": label, "key": key}

    def _read(self, sample: int) -> tuple[Tensor, str, Bytes]:
        label = self._label(self.source.label(sample))
        return label, self.source.key(sample), self.source.picture(sample)

    def _label(self, value: object) -> Tensor:
        if self.labels == "vector":
            return vector_of(value, self.num_classes)
        if self.labels == "indices":
            return class_indices_of(value, self.num_classes)
        return self._numbers[label_of(value, self.num_classes)]


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
    source: Source | Shards | None = None,
) -> Stream:
    """A classification training stream from `source`, or from what `config` names.

    Raises:
        ShardError: missing, empty or unsuitable data, or fewer samples than a batch.
    """
    source = open_source(config) if source is None else source
    loader = ClassificationLoader(source, config, image_size, num_classes)
    pictures = loader.pictures
    return Stream(
        source.index if isinstance(source, Shards) else source,
        loader,
        seed=seed,
        shuffle=config.shuffle,
        window=config.shuffle_window,
        global_batch=global_batch,
        rank=rank,
        world=world,
        workers=workers,
        config=config,
        finish=pictures.finish if isinstance(pictures, GpuPictures) else None,
    )
