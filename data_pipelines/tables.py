"""Pictures with labels in tables of Hugging Face `datasets`: hub names, parquet, arrow, folders."""

from __future__ import annotations

import glob
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, load_dataset

from data_pipelines.classification import class_numbers
from data_pipelines.config import ClassificationConfig
from data_pipelines.image_folder import read_file
from data_pipelines.shards import MAX_MEMBER_BYTES, FieldError, ShardError
from data_pipelines.stream import SkipSample

LARGEST_STREAMED_WINDOW = 4096
_CHUNK = 512  # rows that a streamed table reads at a time
# A batch touches two windows, and samples that replace skipped ones come from as far away.
_KEPT_CHUNKS = 2 * (LARGEST_STREAMED_WINDOW // _CHUNK + 1)
_FINGERPRINTED = 64  # rows whose pictures are hashed


class Table:
    """Samples of one split of a dataset.

    `classes` are the names that its label column carries (ClassLabel), else None; labels that are
    names become their lines in `data.classnames`. Pictures are read as they are stored and decoded
    by this project, not by `datasets`.

    Raises:
        ShardError: the dataset, its split or a column is missing, it cannot be streamed, or labels
            are names that `data.classnames` does not have.
    """

    truncated: tuple[str, ...] = ()

    def __init__(self, config: ClassificationConfig) -> None:
        rows: Any = _load(config)
        features = rows.features or {}
        for purpose, column in (
            ("data.image_column", config.image_column),
            ("data.label_column", config.label_column),
        ):
            if column not in features:
                raise ShardError(
                    f"data.dataset '{config.dataset}' has no column '{column}': set {purpose} to"
                    f" one of {', '.join(features) or 'its columns'}"
                )
        rows = rows.select_columns([config.image_column, config.label_column])
        if isinstance(features[config.image_column], Image):
            rows = rows.cast_column(config.image_column, Image(decode=False))
        label = features[config.label_column]
        label = getattr(label, "feature", label)  # of a list of labels, what its entries are
        self.classes = list(label.names) if isinstance(label, ClassLabel) else None
        self.image_column, self.label_column = config.image_column, config.label_column
        self.numbers = class_numbers(config)
        self.rows: Any = rows
        self._last: tuple[int, dict[str, Any]] = (-1, {})
        if isinstance(rows, Dataset):
            self._length = len(rows)
            labels: Any = rows.select_columns([config.label_column]).with_format("arrow")[:]
            values = labels[config.label_column].to_pylist()
            self._check_names(values)
            self._fingerprint = self._hash_rows(rows, values)
        else:
            self._length = _streamed_length(rows, config)
            self.rows = StreamedRows(rows)
            name = f"{config.dataset}:{config.dataset_name}:{config.split}:{self._length}"
            self._fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
        if not self._length:
            raise ShardError(f"data.dataset '{config.dataset}' has no rows in '{config.split}'")

    def _check_names(self, labels: list[Any]) -> None:
        """Raise ShardError where labels are names without a number."""
        unknown = sorted({name for label in labels for name in self.numbers.unknown(label)})
        if not unknown:
            return
        more = f" and {len(unknown) - 1} more names" if len(unknown) > 1 else ""
        remedy = (
            "which data.classnames does not have, or twice: mend that file"
            if self.numbers.numbers
            else "no numbers: set data.classnames to a file with one class name per line"
        )
        raise ShardError(
            f"data.label_column '{self.label_column}' holds '{unknown[0]}'{more}, {remedy}"
        )

    def _hash_rows(self, rows: Dataset, labels: list[Any]) -> str:
        digest = hashlib.sha256(f"{len(rows)}".encode())
        digest.update(repr(labels).encode())
        for row in range(0, len(rows), -(-len(rows) // _FINGERPRINTED)):
            image = rows[row][self.image_column]
            data = image.get("bytes") if isinstance(image, dict) else image
            if data is None and isinstance(image, dict):  # a file, wherever it lies
                data = Path(image["path"] or "").name.encode()
            digest.update(hashlib.sha256(data or b"").digest())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._length

    @property
    def sizes(self) -> np.ndarray:
        """All samples are one group."""
        return np.array([len(self)], np.int64)

    def fingerprint(self) -> str:
        """Hash of the labels and of some pictures, wherever the files lie; a streamed table has
        one of its name and length."""
        return self._fingerprint

    def describe(self, sample: int) -> str:
        """The row, for messages."""
        return f"row {sample}"

    def label(self, sample: int) -> object:
        """What the label column holds, numbers in the place of names.

        Raises:
            FieldError: nothing.
            ShardError: a name without a number, in a table that is streamed.
        """
        value = self._row(sample)[self.label_column]
        if value is None:
            raise FieldError("no label")
        if isinstance(self.rows, StreamedRows):  # whose labels come one by one
            self._check_names([value])
        return self.numbers(value)

    def key(self, sample: int) -> str:
        """Number of the row."""
        return str(sample)

    def picture(self, sample: int) -> bytes:
        """The encoded picture, or SkipSample."""
        return picture_in(self._row(sample)[self.image_column])

    def _row(self, sample: int) -> dict[str, Any]:
        """A row; the last one is kept, for its label and its picture are asked for one by one."""
        if self._last[0] != sample:
            self._last = sample, self.rows[sample]
        return self._last[1]


def picture_in(cell: object) -> bytes:
    """The encoded picture in a cell: bytes, or what `datasets.Image(decode=False)` gives.

    Raises:
        SkipSample: there is none, or it cannot be read, or it is over MAX_MEMBER_BYTES.
    """
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and isinstance(cell, dict) and cell.get("path"):
        return read_file(cell["path"])
    if not isinstance(data, bytes):
        raise SkipSample("no image in the row")
    if len(data) > MAX_MEMBER_BYTES:
        raise SkipSample(f"image over {MAX_MEMBER_BYTES} bytes")
    return data


class StreamedRows:
    """Rows of a dataset that can only be read in order, by number.

    The rows around the last ones are kept; numbers far ahead are skipped to, and for numbers that
    have gone by the stream is opened again. Every loader process reads all of it.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self._rows = rows
        self._chunks: OrderedDict[int, dict[str, list[Any]]] = OrderedDict()
        self._next = 0
        self._iterator: Iterator[dict[str, list[Any]]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return StreamedRows(self._rows).__dict__

    def __getitem__(self, row: int) -> dict[str, Any]:
        chunk, place = divmod(row, _CHUNK)
        if chunk not in self._chunks:
            self._read(chunk)
        try:
            return {name: values[place] for name, values in self._chunks[chunk].items()}
        except (IndexError, KeyError):
            raise ShardError(
                f"the streamed dataset ends before row {row}: set data.samples to what it has"
            ) from None

    def _read(self, chunk: int) -> None:
        iterator = self._iterator
        if iterator is None or not self._next <= chunk <= self._next + _KEPT_CHUNKS:
            rows = self._rows.skip(chunk * _CHUNK) if chunk else self._rows
            # Not `iter(rows)`, which deals the rows out among loader processes: the order of this
            # project does that.
            iterator = self._iterator = rows.iter(batch_size=_CHUNK)
            self._next = chunk
        while self._next <= chunk and (values := next(iterator, None)) is not None:
            self._chunks[self._next] = values
            self._next += 1
            if len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)


def _load(config: ClassificationConfig) -> Dataset | IterableDataset:
    source = config.dataset
    options: dict[str, Any] = {"split": config.split, "streaming": config.streaming}
    folder = Path(source)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return _from_disk(source, config)
        for kind in ("parquet", "arrow"):
            if source.endswith(f".{kind}"):
                files = sorted(glob.glob(source)) or [source]
                return load_dataset(kind, data_files=files, **options)
        if not folder.exists() and source.startswith((".", "/")):
            raise FileNotFoundError("there is no such file or folder")
        return load_dataset(source, config.dataset_name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, ShardError):
            raise
        reason = " ".join(str(error).split())
        raise ShardError(f"data.dataset '{source}' cannot be opened: {reason}") from error


def _from_disk(source: str, config: ClassificationConfig) -> Dataset | IterableDataset:
    found = datasets.load_from_disk(source)
    if isinstance(found, DatasetDict):
        if config.split not in found:
            raise ValueError(f"no split '{config.split}', only {', '.join(map(str, found))}")
        found = found[config.split]
    return found.to_iterable_dataset() if config.streaming else found


def _streamed_length(rows: IterableDataset, config: ClassificationConfig) -> int:
    if config.shuffle and config.shuffle_window > LARGEST_STREAMED_WINDOW:
        raise ShardError(
            f"data.streaming shuffles among at most {LARGEST_STREAMED_WINDOW} samples: set"
            f" data.shuffle_window to that or less (it is {config.shuffle_window}), or do without"
            " data.streaming"
        )
    if config.samples is not None:
        return config.samples
    split = (rows.info.splits or {}).get(config.split)
    if split is None or not split.num_examples:
        raise ShardError(
            f"data.dataset '{config.dataset}' does not tell its number of rows, which an exact"
            " order needs: set data.samples, or do without data.streaming"
        )
    return split.num_examples
