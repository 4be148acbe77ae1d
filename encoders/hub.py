"""Folders of models: where they are on this machine, or in the cache of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

HUB_PREFIX = "hf-hub:"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_name(source: str) -> str | None:
    """The `owner/name` that `source` asks for, or None when it is a path.

    `hf-hub:owner/name` always means the hub; `owner/name` does where no such path exists.
    """
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    if HUB_NAME.fullmatch(source) and not Path(source).exists():
        return source
    return None


def hub_folder(name: str, patterns: Sequence[str]) -> Path:
    """Folder of the files of the hub's model `name` that match; those not cached are fetched.

    With HF_HUB_OFFLINE=1 only the cache is looked at.

    Raises:
        ValueError: the files can be had neither from the cache nor from the hub.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"'{name}' is no folder here, nor could it be had from the hub or its cache: {reason}"
        ) from error
