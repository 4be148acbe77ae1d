"""Pictures to search through, from a folder or from shards, with the captions beside them."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_pipelines.captions import MAX_BYTES, captions_of, members_of, read_captions
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.image_folder import SUFFIXES
from data_pipelines.loaders import iterate
from data_pipelines.shards import (
    MAX_MEMBER_BYTES,
    FieldError,
    ShardIndex,
    ShardReader,
    expand_shards,
    index_shards,
)

# Up to this size all together, files are told apart by their content, above by size and time.
CHEAP_BYTES = 256 << 20


class PictureSet(Dataset[dict[str, Any]], ABC):
    """Pictures in a fixed order: {image uint8 (3, S, S), number}, or {number, skipped: the reason}.

    Args:
        transform: maps uint8 (3, H, W) to (3, S, S).
        max_pixels: pictures with more are skipped.
    """

    def __init__(self, transform: nn.Module, max_pixels: int) -> None:
        self.transform, self.max_pixels = transform, max_pixels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The picture's file as it is stored, or FieldError."""

    @abstractmethod
    def captions(self, number: int) -> list[str]:
        """What is written beside the picture; empty where nothing is."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with the pictures: by content where the files are small, else by size and time.

        Where they lie does not count, nor do the captions of a folder.
        """

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            picture = decode_rgb(self.read(index), self.max_pixels)
        except (DecodeError, FieldError) as error:
            return {"number": index, "skipped": str(error)}
        return {"number": index, "image": self.transform(picture)}

    def batches(
        self, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, list[int], Counter[str]]]:
        """All pictures in order: images (B, 3, S, S), their numbers, and reasons of skipped ones.

        A batch without a usable picture has (0, 3, S, S).

        Raises:
            LoaderError: a loader process has died.
        """
        loader = DataLoader(
            self,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator(),
        )
        return iterate(loader)


def _collate(samples: list[dict[str, Any]]) -> tuple[Tensor, list[int], Counter[str]]:
    usable = [sample for sample in samples if "image" in sample]
    skipped = Counter(sample["skipped"] for sample in samples if "image" not in sample)
    images = [sample["image"] for sample in usable]
    stacked = torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return stacked, [sample["number"] for sample in usable], skipped


class FolderPictures(PictureSet):
    """Picture files, in the order of their paths; `a.txt` holds the captions of `a.jpg`."""

    def __init__(
        self, folder: Path, files: Sequence[str], transform: nn.Module, max_pixels: int
    ) -> None:
        super().__init__(transform, max_pixels)
        self.folder, self.files = folder, files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> bytes:
        return _read_file(self.folder / self.files[number], MAX_MEMBER_BYTES)

    def captions(self, number: int) -> list[str]:
        path = (self.folder / self.files[number]).with_suffix(".txt")
        try:
            text = _read_file(path, MAX_BYTES).decode("utf-8-sig", errors="replace")
            return captions_of(text)
        except FieldError:
            return []

    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.files).encode("utf-8", "surrogateescape"))
        _digest_files(digest, [self.folder / name for name in self.files])
        return digest.hexdigest()


class ShardPictures(PictureSet):
    """The pictures of shards, in their order."""

    def __init__(
        self,
        index: ShardIndex,
        image_keys: list[str],
        caption_key: str | None,
        transform: nn.Module,
        max_pixels: int,
    ) -> None:
        super().__init__(transform, max_pixels)
        index.require("picture", image_keys)
        self.reader, self.image_keys = ShardReader(index, image_keys), image_keys
        members = [] if caption_key is None else members_of(caption_key)
        self.caption_key = caption_key if set(members) & set(index.members) else None

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The samples of a batch; their bytes are fetched for a few at a time."""
        return [self[number] for number in self.reader.ahead(indices)]

    def read(self, number: int) -> bytes:
        for extension in self.image_keys:
            data = self.reader.read(number, extension)
            if data is not None:
                return bytes(data)
        raise FieldError("no image member")

    def captions(self, number: int) -> list[str]:
        if self.caption_key is None:
            return []
        try:
            return read_captions(self.reader, number, self.caption_key)
        except FieldError:
            return []

    def fingerprint(self) -> str:
        index = self.reader.index
        digest = hashlib.sha256(f"{index.fingerprint()} {self.image_keys}".encode())
        _digest_files(digest, [Path(path) for path in index.paths])
        return digest.hexdigest()


def open_picture_set(
    source: str,
    transform: nn.Module,
    *,
    image_keys: list[str],
    caption_key: str | None = "txt",
    max_pixels: int = 64_000_000,
) -> PictureSet:
    """The pictures that `source` names.

    Args:
        source: a folder of picture files (and folders of them), a folder of shards, or a pattern
            of shards.
        transform: maps uint8 (3, H, W) to what the model sees, uint8 (3, S, S).
        image_keys: members of a sample that hold its picture, for shards.
        caption_key: member that holds a sample's captions, for shards.
        max_pixels: larger pictures are skipped.

    Raises:
        ValueError: no pictures there, or unusable shards.
    """
    folder = Path(source)
    if folder.is_dir():
        files = sorted(_picture_files(folder))
        if files:
            return FolderPictures(folder, files, transform, max_pixels)
        if not any(folder.glob("*.tar")):
            raise ValueError(f"images '{source}' is a folder without pictures or .tar shards")
        source = str(folder / "*.tar")
    index = index_shards(expand_shards(source))
    return ShardPictures(index, image_keys, caption_key, transform, max_pixels)


def _picture_files(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(parent, name)
            wanted = Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            if wanted and os.path.isfile(path):  # not a link to nowhere
                yield os.path.relpath(path, folder)


def _read_file(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise FieldError(f"file over {limit} bytes")
            return file.read()
    except OSError as error:
        raise FieldError("unreadable file") from error


def _digest_files(digest: Any, paths: Sequence[Path]) -> None:
    found = [path.stat() for path in paths]
    by_content = sum(entry.st_size for entry in found) <= CHEAP_BYTES
    for path, entry in zip(paths, found, strict=True):
        digest.update(f"\n{entry.st_size} ".encode())
        if by_content:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        else:
            digest.update(str(entry.st_mtime_ns).encode())
