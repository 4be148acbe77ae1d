"""Tables and `datasets` datasets as sources of samples to pack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_pipelines.captions import captions_of, integer_of
from data_pipelines.pack_sources import DATASET_FILES, Sample, printable_path, read_file
from data_pipelines.shard_writer import file_digest
from data_pipelines.shards import MAX_MEMBER_BYTES, FieldError, ShardError
from data_pipelines.tool_config import PackConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table

IMAGE_COLUMNS = ("image", "path", "filepath", "file_path", "image_path", "file", "filename")
IMAGE_COLUMNS += ("file_name", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "title")
LABEL_COLUMNS = ("label", "labels", "cls", "class")


class _TableRows:
    """Rows of an Arrow table as dicts; bytes of text files are decoded."""

    def __init__(self, table: Table, textual: bool) -> None:
        self.table, self.textual = table, textual

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.table.slice(number, 1).to_pylist()[0]
        if self.textual:
            return {name: value.decode(errors="replace") for name, value in row.items()}
        return row


class RowSource:
    """Rows with a picture, or the path of one, and captions or a label."""

    def __init__(
        self,
        rows: Any,
        columns: tuple[str, str | None, str | None],
        root: Path,
        classnames: list[str] | None,
        fingerprint: str,
    ) -> None:
        self.rows, self.root, self.classnames = rows, root, classnames
        self.image, self.caption, self.label = columns
        self._labels = {name: label for label, name in enumerate(classnames or ())}
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"row {number}"

    def fingerprint(self) -> str:
        return self._fingerprint

    def read(self, number: int) -> Sample:
        try:
            row = self.rows[number]
        except Exception as error:  # damaged tables raise nearly anything
            raise FieldError("row unreadable") from error
        record = {k: v for k, v in row.items() if k not in (self.image, self.caption, self.label)}
        record = {str(k): v for k, v in record.items() if _is_plain(v)}
        image, path = self._image(row[self.image])
        if path is not None:
            record["source"] = printable_path(path)
        captions = None
        if self.caption is not None:
            captions = captions_of(row[self.caption])
        label = None if self.label is None else self._label(row[self.label])
        return Sample(image, captions, label, record)

    def _image(self, value: object) -> tuple[bytes, str | None]:
        """Bytes of a picture, and its path where that is known."""
        path = None
        if isinstance(value, Mapping):  # as `datasets` and its parquet files keep pictures
            found = value.get("path")
            path = found if isinstance(found, str) else None
            value = value.get("bytes") or path
        if isinstance(value, bytes):
            if len(value) > MAX_MEMBER_BYTES:
                raise FieldError(f"picture over {MAX_MEMBER_BYTES} bytes")
            return value, path
        if isinstance(value, str) and value:
            return read_file(self.root / value), value
        raise FieldError("no picture")

    def _label(self, value: object) -> int:
        if value is None:
            raise FieldError("no label")
        if self.classnames is not None and isinstance(value, str):
            if value not in self._labels:
                raise FieldError("no label")
            return self._labels[value]
        return integer_of(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def open_table(config: PackConfig) -> RowSource:
    """A .csv, .tsv or .parquet file whose rows name picture files, or hold them (parquet).

    Raises:
        ShardError: it cannot be read, or columns are missing.
    """
    import pyarrow

    path = Path(config.source)
    textual = path.suffix.lower() != ".parquet"
    root = Path(config.root) if config.root is not None else path.parent
    try:
        if not textual and not _names_files(path, config):
            return _dataset_rows(_load_parquet(path), config, root, file_digest(path))
        table = _read_text_table(path) if textual else _read_parquet(path)
        columns = _columns(config, table.column_names, str(path))
        names = _names_of_labels(table, columns[2], textual)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"table '{path}' cannot be read: {_first_line(error)}") from error
    return RowSource(_TableRows(table, textual), columns, root, names, file_digest(path))


def _names_files(path: Path, config: PackConfig) -> bool:
    """Whether a parquet file has paths in the place of pictures."""
    from pyarrow import parquet, types

    schema = parquet.read_schema(path)
    column = _columns(config, schema.names, str(path))[0]
    kind = schema.field(column).type
    return types.is_string(kind) or types.is_large_string(kind)


def _read_text_table(path: Path) -> Table:
    """All columns as bytes, so that neither broken UTF-8 nor a caption `NA` is lost."""
    import pyarrow
    from pyarrow import csv

    parse = csv.ParseOptions(
        delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
    )
    with path.open("rb") as file:
        head = file.readline(1 << 20)
    header = csv.read_csv(pyarrow.BufferReader(head), parse_options=parse)
    types = {name: pyarrow.binary() for name in header.column_names}
    convert = csv.ConvertOptions(column_types=types, strings_can_be_null=False)
    return csv.read_csv(path, parse_options=parse, convert_options=convert)


def _read_parquet(path: Path) -> Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def _load_parquet(path: Path) -> Dataset:
    """A parquet file with pictures inside, which may be larger than the memory."""
    import datasets

    try:
        return cast(Any, datasets.load_dataset("parquet", data_files=str(path), split="train"))
    except Exception as error:  # the library raises nearly anything on broken files
        raise ShardError(f"table '{path}' cannot be read: {_first_line(error)}") from error


def _names_of_labels(table: Table, column: str | None, textual: bool) -> list[str] | None:
    """Sorted names of a column whose labels are no integers."""
    if column is None:
        return None
    values = table.column(column).unique().to_pylist()
    if textual:
        values = [value.decode(errors="replace") for value in values]
    names = [value for value in values if isinstance(value, str) and value.strip()]
    if all(name.strip().lstrip("-").isdigit() for name in names):
        return None
    return sorted(names)


def open_dataset(config: PackConfig) -> RowSource:
    """A dataset of the `datasets` library: a folder that it saved or can read, or a hub name.

    Raises:
        ShardError: it cannot be opened, the split is missing, or columns are missing.
    """
    dataset = _load_dataset(config)
    root = Path(config.root or (config.source if Path(config.source).is_dir() else "."))
    return _dataset_rows(dataset, config, root, _content(dataset))


def _dataset_rows(dataset: Dataset, config: PackConfig, root: Path, content: str) -> RowSource:
    import datasets

    columns = _columns(config, dataset.column_names, config.source)
    features = dataset.features
    names = None
    if columns[2] is not None and isinstance(features[columns[2]], datasets.ClassLabel):
        names = list(features[columns[2]].names)
    elif columns[2] is not None:
        names = _names_of_labels(dataset.data.table, columns[2], textual=False)
    for name, feature in features.items():
        # Pictures stay encoded: what they hold is tried out later, and bytes are copied as they
        # are.
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return RowSource(dataset, columns, root, names, content)


def _load_dataset(config: PackConfig) -> Dataset:
    import datasets

    folder = Path(config.source)
    saved = any((folder / name).is_file() for name in DATASET_FILES)
    try:
        found: Any = datasets.load_from_disk(folder) if saved else None
        found = datasets.load_dataset(config.source) if found is None else found
    except Exception as error:  # the library raises nearly anything on broken files
        raise ShardError(
            f"dataset '{config.source}' cannot be opened: {_first_line(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise ShardError(
                f"dataset '{config.source}' has no split '{config.split}': it has"
                f" {', '.join(map(str, found))}"
            )
        found = found[config.split]
    return found


def _content(dataset: Dataset) -> str:
    """What tells two versions of a dataset apart; its own fingerprint may be drawn at random."""
    files = sorted(Path(entry["filename"]) for entry in dataset.cache_files)
    sizes = ",".join(f"{file.name}:{file.stat().st_size}" for file in files)
    return hashlib.sha256(f"{dataset.features}:{len(dataset)}:{sizes}".encode()).hexdigest()


def _columns(
    config: PackConfig, names: Sequence[str], source: str
) -> tuple[str, str | None, str | None]:
    """Columns with the picture, the captions and the label."""
    picture = _column(names, config.image_column, IMAGE_COLUMNS, source)
    caption = _column(names, config.caption_column, CAPTION_COLUMNS, source)
    label = _column(names, config.label_column, LABEL_COLUMNS, source)
    present = ", ".join(map(repr, names))
    if picture is None:
        raise ShardError(f"'{source}' has no column for pictures: set --image_column to {present}")
    if caption is None and label is None:
        raise ShardError(
            f"'{source}' has no column for captions or labels: set --caption_column or"
            f" --label_column to one of {present}"
        )
    return picture, caption, label


def _column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], source: str
) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise ShardError(f"'{source}' has no column '{wanted}': it has {', '.join(names)}")
        return wanted
    return next((name for name in usual if name in names), None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
