"""Bytes of shards by range, from disks and through fsspec from stores, with retries.

Nothing here reads more than it is asked for, and no failure is final before it has been tried
`ReadingConfig.attempts` times with growing pauses.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from data_pipelines.config import ReadingConfig
from data_pipelines.errors import FieldError, ShardError

T = TypeVar("T")
# Protocols, and the package (module name) that fsspec needs for each.
PROTOCOLS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
}
# What stores call the mark of a version of an object, best first.
_TAGS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "Last-Modified", "LastModified")
_filesystems: dict[tuple[int, str, float], Any] = {}


class ReadError(FieldError):
    """Bytes that could not be read in several attempts; the message is the reason."""


@dataclass(frozen=True)
class Stamp:
    """What a file must still be for what is known of it to hold.

    `tag` is the time of the last change in nanoseconds, or a store's entity tag; empty if the
    store tells none, and then nothing can be known for longer than a process runs.
    """

    size: int
    tag: str


def is_remote(path: str) -> bool:
    """Whether a path is the address of an object in a store."""
    return "://" in path


def check_protocol(path: str) -> None:
    """Make sure that a remote path can be read at all.

    Raises:
        ShardError: its protocol is unknown, or lacks a package.
    """
    protocol = path.partition("://")[0]
    if protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ShardError(f"'{path}' cannot be read: only files and {known} are")
    if find_spec(PROTOCOLS[protocol]) is None:
        package = PROTOCOLS[protocol]
        raise ShardError(f"'{path}' needs the package {package}: pip install {package}")


def find_remote(pattern: str, reading: ReadingConfig) -> list[str]:
    """Addresses that match a pattern with `*`, sorted.

    Raises:
        ReadError: the store does not answer.
    """
    protocol = pattern.partition("://")[0]
    found = retried(lambda: _filesystem(pattern, reading).glob(pattern), reading)
    return sorted(name if is_remote(name) else f"{protocol}://{name}" for name in found)


def stamp_of(path: str, reading: ReadingConfig) -> Stamp:
    """Size and mark of the version of a file.

    Raises:
        ReadError: it is not there or cannot be asked.
    """

    def ask() -> Stamp:
        if not is_remote(path):
            status = os.stat(path)
            return Stamp(status.st_size, str(status.st_mtime_ns))
        info = _filesystem(path, reading).info(path)
        if info.get("size") is None:
            raise OSError("the server tells no size")
        if info.get("partial") is False:
            raise OSError("the server sends no byte ranges")
        tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
        return Stamp(int(info["size"]), tag)

    return retried(ask, reading)


def content_of(path: str, reading: ReadingConfig) -> str:
    """Hash of the content of a file; of a remote one its size and mark, empty without a mark.

    Raises:
        ReadError: it is not there or cannot be asked.
    """
    stamp = stamp_of(path, reading)
    if is_remote(path):
        return f"{stamp.size} {stamp.tag}" if stamp.tag else ""
    return _hash_file(path, stamp)


@functools.lru_cache(maxsize=4096)
def _hash_file(path: str, stamp: Stamp) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_range(path: str, offset: int, length: int, reading: ReadingConfig) -> bytes:
    """`length` bytes from `offset` on.

    Raises:
        ReadError: they could not be read, or the file ends before.
    """

    def read() -> bytes:
        if is_remote(path):
            data = _filesystem(path, reading).cat_file(path, start=offset, end=offset + length)
        else:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(length)
        return check_length(data, length)

    return retried(read, reading) if length else b""


def check_length(data: bytes, length: int) -> bytes:
    """The data, or OSError where it is not as long as was asked for."""
    if len(data) > length:
        raise OSError("the server sends no byte ranges")
    if len(data) < length:
        raise OSError("shard ends early")
    return data


def retried(action: Callable[[], T], reading: ReadingConfig) -> T:
    """The result of `action`, which is tried again after failures, with doubled pauses.

    Raises:
        ReadError: it failed `reading.attempts` times; the message is the last reason.
    """
    for attempt in range(reading.attempts):
        try:
            return action()
        except ShardError:
            raise
        except Exception as error:  # the clients of stores raise nearly anything
            if attempt + 1 >= reading.attempts:
                raise ReadError(f"cannot be read ({_reason(error)})") from error
        time.sleep(reading.backoff * 2**attempt)
    raise ValueError(f"data.reading.attempts must be at least 1, got {reading.attempts}")


def _reason(error: BaseException) -> str:
    """A few words that are the same for errors of the same kind, for they are counted."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    for item in chain:
        status = getattr(item, "status", None) or getattr(item, "status_code", None)
        if isinstance(status, int):
            return f"HTTP {status}"
    for item in chain:
        if isinstance(item, TimeoutError):
            return "timed out"
        if isinstance(item, FileNotFoundError):
            return "HTTP 404" if str(item).startswith("http") else "not found"
        if isinstance(item, ConnectionError):
            return "connection lost"
        if isinstance(item, OSError) and item.errno:
            return errno.errorcode.get(item.errno, "OSError")
    if type(error) is OSError:
        return str(error)
    lost = {"ClientPayloadError", "ServerDisconnectedError", "ClientOSError", "ContentLengthError"}
    return "connection lost" if type(error).__name__ in lost else type(error).__name__


def _filesystem(path: str, reading: ReadingConfig) -> Any:
    """fsspec's client for a path, one for each process, since connections do not survive forks."""
    import fsspec

    protocol = path.partition("://")[0]
    place = (os.getpid(), protocol, reading.timeout)
    if place not in _filesystems:
        check_protocol(path)
        options: dict[str, Any] = {}
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=10 * reading.timeout, sock_connect=reading.timeout, sock_read=reading.timeout
            )
            options["client_kwargs"] = {"timeout": timeout}
            options["headers"] = {"Accept-Encoding": "identity"}  # offsets are of the bytes as are
            options["skip_instance_cache"] = True
        _filesystems[place] = fsspec.filesystem(protocol, **options)
    return _filesystems[place]


class BlockReader:
    """A read-only file, of the kind that tarfile takes, which fetches its bytes in blocks.

    Blocks double while less lies between them than they are long, and shrink after a longer jump;
    so small members are streamed, and large ones are jumped over.

    Args:
        read: gives the bytes from an offset on, of a length.
        size: of the file in bytes.
    """

    SMALLEST, LARGEST = 64 << 10, 8 << 20

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self.size = read, size
        self._place = self._start = 0
        self._block = b""
        self._length = self.SMALLEST

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def read(self, length: int) -> bytes:
        """At most `length` bytes.

        Raises:
            tarfile.ReadError: more than LARGEST, which no header of an honest tar has.
        """
        if length > self.LARGEST:
            raise tarfile.ReadError(f"a header of {length} bytes")
        end = min(self._place + length, self.size)
        if end <= self._place:
            return b""
        if not self._start <= self._place <= end <= self._start + len(self._block):
            self._fetch(end)
        data = self._block[self._place - self._start : end - self._start]
        self._place = end
        return data

    def _fetch(self, end: int) -> None:
        gap = self._place - self._start - len(self._block)
        follows = self._block and self._start <= self._place and gap <= self._length
        grown = self._length * 2 if follows else self.SMALLEST
        self._length = min(grown, self.LARGEST)
        length = min(max(self._length, end - self._place), self.size - self._place)
        self._block, self._start = self._read(self._place, length), self._place
