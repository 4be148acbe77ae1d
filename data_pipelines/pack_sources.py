"""What can be packed: folders of pictures, tables, `datasets` datasets, behind one interface.

A source is a numbered list of samples that are read one at a time, in any process.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.captions import MAX_BYTES, captions_of, parse_field
from data_pipelines.image_folder import SUFFIXES
from data_pipelines.shards import MAX_MEMBER_BYTES, FieldError, ShardError
from data_pipelines.tool_config import PackConfig

CAPTION_SUFFIXES = (".txt", ".json")
# What `datasets.save_to_disk` leaves in a folder.
DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass
class Sample:
    """A picture as it was found, its captions and label where it has them, and what else is known
    of it, for the json member."""

    image: bytes
    captions: list[str] | None = None
    label: int | None = None
    record: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Samples by number."""

    classnames: list[str] | None

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What a user finds the sample by."""
        ...

    def read(self, number: int) -> Sample:
        """The sample, or FieldError with the reason why it cannot be used."""
        ...

    def fingerprint(self) -> str:
        """The same for the same samples in the same order."""
        ...


def open_source(config: PackConfig) -> Source:
    """The source that `config` names.

    Raises:
        ShardError: there is none, or not of a kind that can be packed.
    """
    from data_pipelines.pack_tables import open_dataset, open_table

    path = Path(config.source)
    kind = _kind(path) if config.kind == "auto" else config.kind
    if kind == "dataset":
        return open_dataset(config)
    if not path.exists():
        raise ShardError(f"source '{path}' does not exist")
    if kind == "table":
        return open_table(config)
    if not path.is_dir():
        raise ShardError(f"source '{path}' is no folder, but kind is {kind}")
    return _open_folder(path, config)


def _kind(path: Path) -> str:
    if path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "table"
        raise ShardError(
            f"source '{path}' is a file, but no {', '.join(TABLE_SUFFIXES)}: name a folder or table"
        )
    if not path.is_dir():
        raise ShardError(
            f"source '{path}' does not exist; for a name on the Hugging Face hub add --kind dataset"
        )
    return "dataset" if any((path / name).is_file() for name in DATASET_FILES) else "folder"


def _open_folder(root: Path, config: PackConfig) -> FolderSource:
    """Captions where any picture has them beside it, else a class for each folder."""
    pictures, texts = _walk(root)
    if not pictures:
        raise ShardError(
            f"source '{root}' has no pictures ({', '.join(sorted(SUFFIXES))}), nor is it a"
            " `datasets` folder (add --kind dataset for one of parquet files)"
        )
    captioned = bool(texts)
    kind = config.kind
    if kind == "auto":
        if not captioned and not all("/" in name for name in pictures):
            raise ShardError(
                f"source '{root}': its pictures have neither .txt or .json files beside them nor"
                " folders that name their classes"
            )
        kind = "captions" if captioned else "classes"
    if kind == "classes":
        pictures = [name for name in pictures if "/" in name]
        names = sorted({name.partition("/")[0] for name in pictures})
        if not names:
            raise ShardError(f"source '{root}' has no class folders with pictures")
        return FolderSource(root, pictures, texts, config.caption_column, names)
    return FolderSource(root, pictures, texts, config.caption_column, None)


def _walk(root: Path) -> tuple[list[str], set[str]]:
    """Paths below `root` of pictures, sorted, and of texts beside them.

    Links to folders are not followed.
    """
    pictures: list[str] = []
    texts: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = Path(folder).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in SUFFIXES:
                pictures.append(prefix + name)
            elif suffix in CAPTION_SUFFIXES:
                texts.add(prefix + name)
    stems = {_stem(name) for name in pictures}
    return sorted(pictures), {name for name in texts if _stem(name) in stems}


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


class FolderSource:
    """Pictures below a folder; captions beside them, or classes from the first folder's name."""

    def __init__(
        self,
        root: Path,
        pictures: Sequence[str],
        texts: set[str],
        caption_field: str | None,
        classnames: list[str] | None,
    ) -> None:
        self.root, self.pictures, self.texts = root, pictures, texts
        self.caption_field = caption_field or "caption"
        self.classnames = classnames
        self._labels = {name: label for label, name in enumerate(classnames or ())}

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, number: int) -> str:
        return printable_path(self.pictures[number])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in (*self.pictures, *sorted(self.texts)):
            path = self.root / name
            size = path.stat().st_size if path.exists() else -1  # links may lead nowhere
            digest.update(os.fsencode(f"{name}\0{size}\n"))
        return digest.hexdigest()

    def read(self, number: int) -> Sample:
        name = self.pictures[number]
        image = read_file(self.root / name)
        record = self._record(_stem(name) + ".json")
        captions = self._captions(_stem(name) + ".txt", record)
        label = None
        if self.classnames is not None:
            label = self._labels[name.partition("/")[0]]
        elif captions is None:
            raise FieldError("no caption")
        return Sample(image, captions, label, record)

    def _record(self, name: str) -> dict[str, Any]:
        if name not in self.texts:
            return {}
        return parse_record(read_file(self.root / name, MAX_BYTES))

    def _captions(self, name: str, record: Mapping[str, Any]) -> list[str] | None:
        if name in self.texts:
            return captions_of(parse_field("txt", read_file(self.root / name, MAX_BYTES)))
        value = record.get(self.caption_field)
        return None if value is None else captions_of(value)


def parse_record(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FieldError: it is none.
    """
    try:
        record = json.loads(data.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise FieldError("broken json") from error
    if not isinstance(record, dict):
        raise FieldError("json is no object")
    return record


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Contents of a regular file.

    Raises:
        FieldError: there is none, it is over `limit` bytes, or it cannot be read.
    """
    try:
        # Opening a pipe or a device would wait for ever.
        regular = stat.S_ISREG(path.stat().st_mode)
        data = _read(path, limit + 1) if regular else b""
    except FileNotFoundError as error:
        raise FieldError("file missing") from error
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise FieldError("file unreadable") from error
    if not regular:
        raise FieldError("no regular file")
    if len(data) > limit:
        raise FieldError(f"file over {limit} bytes")
    return data


def _read(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def printable_path(name: str) -> str:
    """A path as text that any encoder takes: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
