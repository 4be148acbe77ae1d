"""A few pictures to look at or to try a model on, from a folder or from shards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.evaluation import EvaluationSet
from data_pipelines.image_folder import SUFFIXES
from data_pipelines.transforms import eval_transform


def read_pictures(
    source: str, count: int, image_size: int, image_keys: list[str], resize_mode: str = "squash"
) -> Tensor:
    """Up to `count` pictures, evenly spaced over what is there: uint8 (N, 3, S, S).

    Args:
        source: a folder of picture files, a folder of shards, or a pattern of shards.
        count: at least 1. Pictures that cannot be decoded are left out.
        image_size: S.
        image_keys: members of a sample that hold its picture, for shards.
        resize_mode: see `eval_transform`.

    Raises:
        ValueError: no picture that can be used.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    folder = Path(source)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if files:
            return _from_files(files, source, count, image_size, resize_mode)
        if not any(folder.glob("*.tar")):
            raise ValueError(f"images '{source}' is a folder without pictures or .tar shards")
        source = str(folder / "*.tar")
    dataset = EvaluationSet(source, image_size, image_keys=image_keys, resize_mode=resize_mode)
    samples = [dataset[number] for number in _spread(count, len(dataset))]
    return _stack([sample["image"] for sample in samples if "image" in sample], source)


def _from_files(
    files: list[Path], source: str, count: int, image_size: int, resize_mode: str
) -> Tensor:
    transform = eval_transform(image_size, resize_mode)
    pictures = []
    for number in _spread(count, len(files)):
        try:
            pictures.append(transform(decode_rgb(files[number].read_bytes())))
        except DecodeError:
            continue
    return _stack(pictures, source)


def _stack(pictures: list[Tensor], source: str) -> Tensor:
    if not pictures:
        raise ValueError(f"images '{source}': none of the pictures can be decoded")
    return torch.stack(pictures)


def _spread(count: int, total: int) -> list[int]:
    """Up to `count` numbers below `total`, evenly spaced."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
