"""Evaluation sets that are not shards: image folders, Hugging Face datasets, Karpathy splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.classification import NO_LABEL, ClassNumbers
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.evaluation import SampleSet
from data_pipelines.image_folder import ImageFolder, read_file
from data_pipelines.shards import ShardError
from data_pipelines.stream import SkipSample
from data_pipelines.tables import picture_in


@dataclass(frozen=True)
class Entry:
    """One sample: its name, how to read its bytes (SkipSample where they cannot be), its captions
    and its labels, if it has any."""

    key: str
    read: Callable[[], bytes]
    captions: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def content(self) -> bytes:
        """What tells the picture from others: its bytes, or the reason why there are none."""
        try:
            return self.read()
        except SkipSample as reason:
            return str(reason).encode()


class EntrySet(SampleSet):
    """Samples that are listed in memory and read one by one.

    Raises:
        ShardError: no entries.
    """

    def __init__(
        self,
        source: str,
        entries: Sequence[Entry],
        transform: Callable[[Tensor], Tensor],
        classnames: list[str] | None = None,
        exif_orientation: bool = False,
    ) -> None:
        if not entries:
            raise ShardError(f"'{source}' is an empty split: there is nothing to evaluate")
        self.entries, self.transform = entries, transform
        self.exif_orientation = exif_orientation
        self.classnames = classnames or []
        self._content = ""

    def __len__(self) -> int:
        return len(self.entries)

    def fingerprint(self) -> str:
        """Hash of names, captions, labels and contents, which are read once for it."""
        if not self._content:
            digest = hashlib.sha256()
            for entry in self.entries:
                line = json.dumps([entry.key, entry.captions, entry.labels])
                digest.update(line.encode() + hashlib.sha256(entry.content()).digest())
            self._content = digest.hexdigest()[:16]
        return self._content

    def version(self) -> str:
        return self.fingerprint() + "-upright" * self.exif_orientation

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        try:
            data = entry.read()
            image = decode_rgb(data, exif_orientation=self.exif_orientation)
        except (DecodeError, SkipSample) as error:
            return {"number": index, "skipped": str(error)}
        return {
            "number": index, "key": entry.key, "captions": entry.captions, "labels": entry.labels,
            "image": self.transform(image), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip


def image_folder(
    path: str,
    transform: Callable[[Tensor], Tensor],
    folders: list[str] | None = None,
    classnames: Sequence[str] = (),
    exif_orientation: bool = False,
) -> EntrySet:
    """Pictures in one subfolder per class; see `ImageFolder`.

    Where a folder is called as one of `classnames`, or has the number of one, these are the
    classes, in their order; where none is, the folders are, in the order of their names.

    Args:
        folders: names of the subfolders that there may be; those that `path` has by default.

    Raises:
        ShardError: as `ImageFolder` does; or some of the folders are among `classnames` and others
            are not, or two are one class.
    """
    found = ImageFolder(path, folders)
    labels, names = _folder_labels(path, found.classes or [], classnames)
    entries = [
        Entry(found.key(n), partial(found.picture, n), labels=[labels[found.label(n)]])
        for n in range(len(found))
    ]
    return EntrySet(path, entries, transform, names, exif_orientation)


def _folder_labels(
    path: str, folders: Sequence[str], classnames: Sequence[str]
) -> tuple[Sequence[int], list[str]]:
    """The label of each class folder, and the names in the order of the labels."""
    numbers = ClassNumbers(classnames)
    labels: dict[str, int] = {}
    for folder in folders:
        for name in (folder, folder.replace("_", " ")):
            label = numbers.number(name)
            if isinstance(label, int) and 0 <= label < len(classnames):
                labels.setdefault(folder, label)
    if not labels:
        return range(len(folders)), [folder.replace("_", " ") for folder in folders]
    unknown = [folder for folder in folders if folder not in labels]
    if unknown or len({*labels.values()}) < len(labels):
        known = dict(zip(labels.values(), labels, strict=True))  # the last folder of each class
        odd = unknown or [folder for folder, label in labels.items() if known[label] != folder]
        raise ShardError(
            f"'{path}' has the folder '{odd[0]}', which is"
            f" {'none of classnames' if unknown else 'the class of another one, too'}: call each"
            " folder as its class is called there"
        )
    return [labels[folder] for folder in folders], list(classnames)


def hugging_face_set(
    path: str,
    split: str,
    transform: Callable[[Tensor], Tensor],
    label_key: str | None = None,
    caption_key: str | None = None,
    classnames: Sequence[str] = (),
    several: bool = False,
    exif_orientation: bool = False,
) -> EntrySet:
    """A dataset saved by `datasets` (`save_to_disk`), or a folder or name that it loads.

    The picture is the column of type Image; names of classes come from a ClassLabel column. Labels
    that are names without it become their places in `classnames`. With `several`, the label column
    may hold lists.

    Raises:
        ShardError: no such dataset, split or columns, or a label that is neither a number nor a
            name.
    """
    import datasets

    saved = (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file()
    try:
        loaded: Any = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise ShardError(f"'{path}' is no folder and no dataset that loads: {reason}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ShardError(f"'{path}' has no split '{split}': it has {', '.join(loaded)}")
        loaded = loaded[split]
    columns = loaded.features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ShardError(f"'{path}' has no column of type Image: it has {', '.join(columns)}")
    for key in (label_key, caption_key):
        if key is not None and key not in columns:
            raise ShardError(f"'{path}' has no column '{key}': it has {', '.join(columns)}")
    loaded = loaded.cast_column(images[0], datasets.Image(decode=False))
    table = loaded.remove_columns(images[0])

    def read(number: int) -> bytes:
        return picture_in(loaded[number][images[0]])

    entries, numbers = [], ClassNumbers(classnames)
    for number in range(len(loaded)):
        row = table[number] if len(table.column_names) else {}
        found = row[caption_key] if caption_key else []
        captions = [found] if isinstance(found, str) else list(found)
        where = f"'{path}', {split}, row {number}, column '{label_key}' holds"
        labels = numbers.required(row[label_key], several, where) if label_key else []
        labels = [label for label in labels if label != NO_LABEL]
        entries.append(Entry(str(number), partial(read, number), captions, labels))
    column = columns.get(label_key) if label_key else None
    names = getattr(getattr(column, "feature", column), "names", None)  # of a list: its entries'
    return EntrySet(f"{path}, {split}", entries, transform, names, exif_orientation)


def karpathy_split(
    captions: str,
    images: str,
    split: str,
    transform: Callable[[Tensor], Tensor],
    exif_orientation: bool = False,
) -> EntrySet:
    """Pictures and captions of a split in a `dataset_coco.json` or `dataset_flickr30k.json` file.

    Args:
        captions: the JSON file: {images: [{filename, filepath, split, sentences: [{raw}]}]}.
        images: folder of the pictures, with or without COCO's subfolders (`filepath`).
        split: val or test; a `restval` picture belongs to training.

    Raises:
        ShardError: a file of another layout, an empty split, or pictures that are not there.
    """
    try:
        listed = json.loads(Path(captions).read_text(encoding="utf-8"))["images"]
        chosen = [entry for entry in listed if entry["split"] == split]
        rows = [
            (e.get("filepath", ""), e["filename"], [s["raw"].strip() for s in e["sentences"]])
            for e in chosen
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"'{captions}' is no file of Karpathy splits: {error!r}") from error
    entries, missing = [], []
    for folder, name, lines in rows:
        paths = [Path(images) / folder / name, Path(images) / name]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            missing.append(name)
        else:
            entries.append(Entry(name, partial(read_file, found), lines))
    if missing:
        raise ShardError(
            f"'{captions}' names {len(missing)} images that '{images}' does not have, the first is"
            f" '{missing[0]}': point to the folder of the pictures"
        )
    return EntrySet(f"{captions}, {split}", entries, transform, exif_orientation=exif_orientation)


def label_tensor(sets: Sequence[Sequence[int]]) -> Tensor:
    """Labels of each sample as int64 (N, L), padded with -1."""
    width = max([1, *map(len, sets)])
    return torch.tensor([[*own, *[-1] * (width - len(own))] for own in sets], dtype=torch.int64)
