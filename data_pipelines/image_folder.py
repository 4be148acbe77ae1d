"""Pictures in a folder with one folder for each class."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from data_pipelines.shards import MAX_MEMBER_BYTES, ShardError
from data_pipelines.stream import SkipSample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")


class ImageFolder:
    """Samples of `root/<class>/**/<picture>`, in the order of class and path.

    Class i is the i-th folder by name, or of `classes` where they are given. Hidden files, links to
    folders and files of other types are passed over.

    Raises:
        ShardError: no such folder, no class folder or picture in it, or folders that are not those
            of `classes`.
    """

    truncated: tuple[str, ...] = ()

    def __init__(self, root: str, classes: list[str] | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ShardError(f"image folder '{root}' is not a folder")
        found = class_folders(root)
        names = found if classes is None else classes
        self.classes: list[str] | None = names
        unknown = sorted(set(found) - set(names))
        if unknown:
            raise ShardError(
                f"image folder '{root}' has the folder '{unknown[0]}', which is none of the"
                " classes: add it to the class names, or move it away"
            )
        paths: list[str] = []
        labels: list[int] = []
        digest = hashlib.sha256()
        for label, name in enumerate(names):
            for path in _pictures(self.root / name):
                relative = path.relative_to(self.root).as_posix()
                digest.update(f"{label}:{relative}:{_bytes_of(path)}\n".encode())
                paths.append(relative)
                labels.append(label)
        if not paths:
            raise ShardError(
                f"image folder '{root}' holds no pictures in class folders: expected"
                " <folder>/<class>/<picture>.jpg"
            )
        # Arrays, because a Python object for each file of a large set would fill the memory.
        self.paths = np.array(paths, np.dtypes.StringDType())
        self.labels = np.array(labels, np.int32)
        self._fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def sizes(self) -> np.ndarray:
        """All samples are one group."""
        return np.array([len(self)], np.int64)

    def fingerprint(self) -> str:
        """Hash of the classes, paths and sizes of the files."""
        return self._fingerprint

    def label(self, sample: int) -> int:
        """Number of the class."""
        return int(self.labels[sample])

    def describe(self, sample: int) -> str:
        """The file, for messages."""
        return f"'{self.root / self.key(sample)}'"

    def key(self, sample: int) -> str:
        """Path below the root."""
        return str(self.paths[sample])

    def picture(self, sample: int) -> bytes:
        """The encoded picture, or SkipSample."""
        return read_file(self.root / self.key(sample))


def class_folders(root: str | Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; none where there is none."""
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (n for n in files if n.lower().endswith(SUFFIXES) and not n.startswith("."))
        found += [Path(place, name) for name in names]
    return sorted(found)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere; it is skipped and counted when its turn comes
        return -1


def read_file(path: str | Path) -> bytes:
    """A picture file.

    Raises:
        SkipSample: it cannot be read, or is over MAX_MEMBER_BYTES.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MEMBER_BYTES + 1)
    except OSError as error:
        raise SkipSample("unreadable file") from error
    if len(data) > MAX_MEMBER_BYTES:
        raise SkipSample(f"file over {MAX_MEMBER_BYTES} bytes")
    return data
