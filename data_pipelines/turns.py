"""Which of several processes does what only one of them has to do."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist


@contextmanager
def turn(places: Sequence[Path]) -> Iterator[bool]:
    """Whether this process may make the file that is to lie in one of `places`.

    False while another process has its turn, which ends with it, however it ends. True also where
    no folder takes a lock: then the work is done more than once, and nobody waits for ever.
    """
    found = next((d for d in map(_open_lock, places) if d is not None), None)
    if found is None:
        yield True
        return
    descriptor, path = found
    try:
        ours = take_lock(descriptor)
        try:
            yield ours
        finally:
            if ours:
                # Who has opened it before may have a turn beside one who makes it anew; such a
                # one finds the file there, or does the work once more.
                with suppress(OSError):
                    path.unlink()
    finally:
        os.close(descriptor)


def _open_lock(place: Path) -> tuple[int, Path] | None:
    path = place.with_name(f".{place.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), path
    except OSError:
        return None


def take_lock(descriptor: int) -> bool:
    """Whether this process has the lock of an open file or folder now, or there are no locks on its
    file system; False while another one has it. It is let go where the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def is_first_process() -> bool:
    """Whether this is the process that talks to the user, of those that run together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
