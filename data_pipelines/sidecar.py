"""The index of a shard, kept in a file of its own so that it is read from the headers only once.

`<shard>.index.safetensors` holds `key_bytes` (uint8), `key_ends` (n,) and `places` (extensions, n,
2) int64; its metadata the format, size and tag of the shard, and the names of the extensions. It is
used only while all of them hold; a damaged one is built again. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipelines.config import ReadingConfig
from data_pipelines.errors import ShardError
from data_pipelines.sources import ReadError, Stamp, is_remote, read_range, stamp_of
from data_pipelines.tar_headers import MAX_EXTENSIONS, ShardPart, read_headers
from data_pipelines.turns import turn

FORMAT = "1"  # also of how names are cut into keys and extensions
SUFFIX = ".index.safetensors"
# A file that was changed so shortly before it was indexed may be changed again within the same
# tick of the file system's clock; such an index is not believed.
FRESH_SECONDS = 2.0
TURN_SECONDS = 0.05  # until another process is looked at again that is at work


def index_file(
    path: str, folder: str | None = None, reading: ReadingConfig | None = None
) -> ShardPart:
    """The index of a shard: from its sidecar if that is up to date, else from the headers, and then
    a sidecar is written where one can be.

    Args:
        path: a file or an address.
        folder: where sidecars are kept; None for beside the shard, or else the user's cache.

    Raises:
        ShardError: the shard cannot be read or used.
    """
    indexing = Indexing(path, folder, reading or ReadingConfig())
    while (part := indexing.attempt()) is None:
        time.sleep(TURN_SECONDS)
    return part


class Indexing:
    """A shard whose index is wanted, by this process and perhaps by others at the same time.

    One of them reads the headers, under a lock that its death would release; the others find the
    sidecar afterwards. Where no sidecar will be believed, or no lock can be had, each reads alone.

    Raises:
        ShardError: the shard is not there or cannot be asked.
    """

    def __init__(self, path: str, folder: str | None, reading: ReadingConfig) -> None:
        self.path, self.reading = path, reading
        self.places = sidecar_paths(path, folder)
        with _named(path):
            self.stamp = stamp_of(path, reading)

    def attempt(self) -> ShardPart | None:
        """The index, or None while another process builds it.

        Raises:
            ShardError: the shard cannot be read or used.
        """
        part = self._load()
        if part is not None:
            return part
        if not self.stamp.tag or _is_fresh(self.path, self.stamp):
            return self._build()
        with turn(self.places) as ours:
            return (self._load() or self._build()) if ours else None

    def _load(self) -> ShardPart | None:
        parts = (_load(place, self.stamp) for place in self.places)
        return next((part for part in parts if part is not None), None)

    def _build(self) -> ShardPart:
        fresh = _is_fresh(self.path, self.stamp)
        with _named(self.path):
            part = _read(self.path, self.stamp, self.reading)
        if self.stamp.tag:
            _store(self.places, part, self.stamp, fresh)
        return part


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except ReadError as error:
        raise ShardError(f"shard '{path}' {error}") from error


def sidecar_paths(path: str, folder: str | None = None) -> list[Path]:
    """Where the index of a shard may lie, in the order in which places are tried."""
    if folder is not None or is_remote(path):
        return [_in_folder(Path(folder) if folder is not None else default_folder(), path)]
    return [Path(path + SUFFIX), _in_folder(default_folder(), path)]


def default_folder() -> Path:
    """The user's cache of indexes, `$XDG_CACHE_HOME/softmoe-clip/shard-indexes`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "softmoe-clip" / "shard-indexes"


def _in_folder(folder: Path, path: str) -> Path:
    whole = path if is_remote(path) else os.path.realpath(path)
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:16]
    return folder / f"{os.path.basename(path)[:100]}-{digest}{SUFFIX}"


def _read(path: str, stamp: Stamp, reading: ReadingConfig) -> ShardPart:
    if is_remote(path):
        return read_headers(
            path, lambda at, length: read_range(path, at, length, reading), stamp.size
        )
    with open(path, "rb", buffering=0) as file:
        return read_headers(
            path, lambda at, length: os.pread(file.fileno(), length, at), stamp.size
        )


def _is_fresh(path: str, stamp: Stamp) -> bool:
    return not is_remote(path) and time.time() - int(stamp.tag) / 1e9 < FRESH_SECONDS


def _store(places: list[Path], part: ShardPart, stamp: Stamp, fresh: bool) -> None:
    """Write a sidecar to the first place that takes it; none is no error."""
    data = _pack(part, stamp, fresh)
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            # Processes that index the same shard at once each write their own.
            handle, partial = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.chmod(partial, 0o644)
                os.replace(partial, place)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
            return


def _pack(part: ShardPart, stamp: Stamp, fresh: bool) -> bytes:
    keys = [str(key).encode() for key in part.keys]
    places = np.array(list(part.members.values()), np.int64)
    places = places.reshape(len(part.members), len(keys), 2)
    record = {
        "format": FORMAT,
        "size": stamp.size,
        "tag": stamp.tag,
        "fresh": fresh,
        "complete": part.complete,
        "extensions": list(part.members),
    }
    tensors = {
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "places": places,
    }
    return save(tensors, {"record": json.dumps(record)})


def _load(place: Path, stamp: Stamp) -> ShardPart | None:
    """The index in a sidecar, or None where there is none for this version of the shard."""
    if not stamp.tag or not place.is_file():
        return None
    try:
        with safe_open(place, "numpy") as file:
            record = json.loads((file.metadata() or {})["record"])
            expected = {"format": FORMAT, "size": stamp.size, "tag": stamp.tag, "fresh": False}
            if any(record[name] != value for name, value in expected.items()):
                return None
            keys, ends = file.get_tensor("key_bytes"), file.get_tensor("key_ends")
            return _unpack(keys, ends, file.get_tensor("places"), record, stamp.size)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None  # damaged, or of another kind: the headers tell


def _unpack(
    key_bytes: np.ndarray,
    key_ends: np.ndarray,
    places: np.ndarray,
    record: dict[str, Any],
    size: int,
) -> ShardPart:
    """The index in the arrays of a sidecar, or ValueError where they do not fit together."""
    extensions = record["extensions"]
    if places.shape != (len(extensions), len(key_ends), 2) or len(extensions) > MAX_EXTENSIONS:
        raise ValueError("shapes")
    absent = (places == -1).all(-1)
    inside = (places >= 0).all(-1) & (places[..., 0] <= size) & (places[..., 1] <= size)
    inside &= places.sum(-1) <= size
    if places.dtype != np.int64 or not (absent | inside).all():
        raise ValueError("places")
    blob, ends = key_bytes.tobytes(), [0, *key_ends.tolist()]
    if ends[-1] != len(blob) or ends != sorted(ends):
        raise ValueError("keys")
    keys = [blob[a:b].decode() for a, b in pairwise(ends)]
    members = {str(ext): places[number] for number, ext in enumerate(extensions)}
    return ShardPart(
        np.array(keys, np.dtypes.StringDType()), members, size, bool(record["complete"])
    )
