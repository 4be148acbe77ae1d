"""The `train.log` of a run: what it printed, and why it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

LOGGER = logging.getLogger("softmoe_clip.train")


def say(message: str) -> None:
    """Print a line beside the progress bar and log it."""
    tqdm.write(message)
    LOGGER.info(message)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append what is logged inside to `path`, with the traceback of what ends it early."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # printing is not the log's task
    LOGGER.addHandler(handler)
    try:
        yield
    except BaseException as error:
        LOGGER.exception("stopped by %s", type(error).__name__)
        raise
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
