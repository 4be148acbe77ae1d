"""Embeddings of a frozen tower, computed once and streamed in place of what it would read.

There is one file for each shard and tower, `<shard>-<hash of the shard>.<side>.safetensors`:

- `embeddings` (rows, d) float16 or float32: one row for each usable picture (side `image`), or for
  each caption line (side `text`), in the order of the shard's samples;
- `starts` (n + 1,) int64: the rows of sample i of the shard are starts[i] to starts[i + 1];
- metadata `record`, JSON: `fingerprint`, what the rows depend on besides the shard (tower, weights,
  tokenizer, ..., and `dtype`), and `skipped`, `{number in the shard: reason}`.

A shard's hash covers its size, its index and blocks of its bytes, so the file of a changed shard
is not found, wherever the shard lies; that of a changed tower is found and refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data_pipelines.config import ImageTextConfig
from data_pipelines.shards import FieldError, ShardError, ShardIndex
from data_pipelines.sources import ReadError, read_range

Side = Literal["image", "text"]
Fingerprint = dict[str, str]
FORMAT = "1"  # also of how pictures are resized and captions found
BLOCKS, BLOCK_BYTES = 16, 4096
OPEN_FILES = 64


def shard_hash(index: ShardIndex, number: int) -> str:
    """Hash of a shard's size, keys and members, and of 16 blocks of its bytes.

    Small shards (up to 64 KiB) are read in full. In larger ones an edit in place that keeps all
    lengths is noticed only where it meets a block; reading everything would take hours for sets
    that are worth caching.

    Raises:
        ShardError: the shard cannot be read.
    """
    first, last = index.starts[number], index.starts[number + 1]
    size = index.file_bytes[number]
    digest = hashlib.sha256(f"{size}\n".encode())
    digest.update("\n".join(index.keys[first:last]).encode())
    for ext, table in index.members.items():
        places = table[first:last]
        if (places >= 0).any():  # other shards' extensions are none of this one's business
            digest.update(f"\n{ext}\n".encode() + places.astype("<i8").tobytes())
    path, length = index.paths[number], min(size, BLOCK_BYTES)
    try:
        for block in range(BLOCKS):
            offset = max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1)
            digest.update(read_range(path, offset, length, index.reading))
    except ReadError as error:
        raise ShardError(f"shard '{path}' {error}") from error
    return digest.hexdigest()[:16]


def embeddings_path(folder: str | Path, index: ShardIndex, number: int, side: Side) -> Path:
    """Where the embeddings of a shard lie."""
    stem = os.path.basename(index.paths[number]).removesuffix(".tar")
    return Path(folder) / f"{stem}-{shard_hash(index, number)}.{side}.safetensors"


def source_fingerprint(config: ImageTextConfig, side: Side) -> Fingerprint:
    """What the embeddings depend on in the settings of a stream."""
    if side == "text":
        return {"format": FORMAT, "caption_key": config.caption_key}
    # Only where they are on, so that files from before these settings stay good.
    decoding = [name for name in ("exif_orientation", "scaled_decoding") if getattr(config, name)]
    return {
        "format": FORMAT,
        "image_keys": ", ".join(config.image_keys),
        "max_pixels": str(config.max_pixels),
        **dict.fromkeys(decoding, "true"),
    }


def write_embeddings(
    path: Path,
    embeddings: Tensor,
    counts: Sequence[int],
    skipped: dict[int, str],
    fingerprint: Fingerprint,
) -> None:
    """Write the embeddings of one shard, completely or not at all.

    Args:
        path: from `embeddings_path`.
        embeddings: (rows, d) float16 or float32.
        counts: n numbers of rows, one for each sample of the shard, 0 for skipped ones.
        skipped: reasons by number of the sample in the shard.

    Raises:
        ValueError: a value is not finite.
    """
    if not embeddings.isfinite().all():
        raise ValueError(
            f"embeddings for '{path}' are not finite as {embeddings.dtype}: choose --dtype float32"
            " and train.precision fp32, or look at the tower's weights"
        )
    starts = torch.zeros(len(counts) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    partial = path.with_name(f".{path.name}.partial")
    data = save(
        {"embeddings": embeddings.contiguous().cpu(), "starts": starts},
        # In one entry: safetensors writes several in any order.
        {"record": json.dumps({"fingerprint": fingerprint, "skipped": skipped})},
    )
    with open(partial, "wb") as file:  # safetensors' own files are closed to other users
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def is_finished(path: Path, fingerprint: Fingerprint) -> bool:
    """Whether a file is there, whole, and has this fingerprint."""
    try:
        return read_record(path)["fingerprint"] == fingerprint
    except (FileNotFoundError, ShardError):
        return False


def read_record(path: Path) -> dict[str, Any]:
    """`fingerprint` and `skipped` of a file.

    Raises:
        ShardError: the file is damaged, or another one.
    """
    return _open(path)[1]


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """An open file and its record."""
    try:
        file = safe_open(path, "numpy")
        record = json.loads((file.metadata() or {})["record"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ShardError(
            f"'{path}' is damaged ({error}): build it again with scripts.cache_embeddings"
        ) from error
    return file, record


class CachedEmbeddings:
    """The embeddings of every sample of `index` in one tower's files.

    Args:
        folder: holds the files.
        side: the tower.
        index: the shards.

    Raises:
        ShardError: files are missing, damaged, or of different towers.
    """

    def __init__(self, folder: str, side: Side, index: ShardIndex) -> None:
        self.folder, self.side, self.index = folder, side, index
        self.paths = [embeddings_path(folder, index, n, side) for n in range(len(index.paths))]
        self._files: dict[int, tuple[Any, np.ndarray, dict[str, str]]] = {}
        # A shard without a sample has no file.
        present = [path for path, size in zip(self.paths, index.sizes, strict=True) if size]
        self._refuse_missing(present)
        self.fingerprint: Fingerprint = read_record(present[0])["fingerprint"]
        for path in present[1:]:
            self._compare(self.fingerprint, read_record(path)["fingerprint"], f"'{path.name}'")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def digest(self) -> str:
        """Hash of the fingerprint."""
        text = json.dumps(self.fingerprint, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, expected: Fingerprint) -> None:
        """Refuse embeddings that are not those of the tower with the fingerprint `expected`, which
        says nothing about their type.

        Raises:
            ShardError: they differ; the message says in what.
        """
        expected = expected | {"dtype": self.fingerprint.get("dtype", "none")}
        self._compare(expected, self.fingerprint, "its embeddings")

    def count(self, sample: int) -> int:
        """Rows of sample number `sample` of the index: at least 1.

        Raises:
            FieldError: it was skipped; the message is the reason.
        """
        _, starts, skipped, number = self._place(sample)
        if str(number) in skipped:
            raise FieldError(skipped[str(number)])
        return int(starts[number + 1] - starts[number])

    def row(self, sample: int, number: int = 0) -> Tensor:
        """Row `number` of a sample that was not skipped: (d,) float16 or float32."""
        embeddings, starts, _, place = self._place(sample)
        row = int(starts[place]) + number
        return torch.from_numpy(embeddings[row : row + 1])[0]

    def _place(self, sample: int) -> tuple[Any, np.ndarray, dict[str, str], int]:
        """Embeddings, starts and skips of a sample's shard, and its number in there."""
        shard = int(np.searchsorted(self.index.starts, sample, side="right")) - 1
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            file, record = _open(self.paths[shard])
            rows, starts = file.get_slice("embeddings"), file.get_tensor("starts")
            self._files[shard] = rows, starts, record["skipped"]
        return *self._files[shard], sample - int(self.index.starts[shard])

    def _refuse_missing(self, paths: list[Path]) -> None:
        missing = [path for path in paths if not path.is_file()]
        if not missing:
            return
        stem = missing[0].name.rpartition("-")[0]
        others = list(missing[0].parent.glob(f"{glob.escape(stem)}-*.{self.side}.safetensors"))
        what = f"'{stem}.tar' has changed since it was embedded" if others else "they were not made"
        raise ShardError(
            f"data.cached_{self.side} '{self.folder}' lacks the embeddings of {len(missing)} of"
            f" {len(paths)} shards, the first is '{stem}.tar' ({what}): {self._remedy()}"
        )

    def _compare(self, expected: Fingerprint, found: Fingerprint, what: str) -> None:
        names = [name for name in expected | found if expected.get(name) != found.get(name)]
        if names:
            differences = ", ".join(
                f"{name} was {found.get(name, 'none')}, is {expected.get(name, 'none')}"
                for name in names
            )
            raise ShardError(
                f"data.cached_{self.side} '{self.folder}', {what}: {differences}: {self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            "build them with the settings of this run:"
            f" python -m scripts.cache_embeddings --config FILE --out {self.folder}"
        )
