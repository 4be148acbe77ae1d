"""Putting an exported folder on the Hugging Face hub, or telling what would be put there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

from encoders.export.model import ExportError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_hub_name(name: str) -> None:
    """Raise ExportError unless `name` is of the form owner/name."""
    if not NAME.fullmatch(name):
        raise ExportError(f"push '{name}': write owner/name, such as my-lab/soft-moe-s16")


def check_token() -> None:
    """Raise ExportError unless huggingface_hub has a token, of `hf auth login` or in HF_TOKEN."""
    if get_token() is None:
        raise ExportError("push needs a token: run `hf auth login`, or set HF_TOKEN")


def upload_listing(folder: Path) -> list[tuple[str, int, str]]:
    """Path in the repository, bytes and SHA-256 of every file that an upload consists of."""
    return [
        (path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def upload(folder: Path, name: str, private: bool, message: str) -> str:
    """Create the model repository `name`, if it is not there, and commit the folder to it.

    Args:
        private: whether nobody else may see the repository; one that is there and public is
            refused, for the hub leaves it as it is.

    Returns:
        Address of the commit.

    Raises:
        ExportError: the hub refuses or cannot be reached, or the repository is public.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        public = private and api.model_info(name).private is False
        if not public:
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
            return commit.commit_url
    except Exception as error:  # of the hub, the HTTP library or the storage library
        reason = " ".join(str(error).split()) or type(error).__name__
        option = " --private" if private else ""
        raise ExportError(
            f"'{name}' could not be pushed: {reason}; the folder is in {folder}, to push it later:"
            f" hf upload {name} {folder}{option}"
        ) from error
    raise ExportError(
        f"'{name}' is there already, and everybody sees it: push with --private false, or choose"
        f" another name; the folder is in {folder}"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
