"""Collecting what processes have measured on their shares of a set."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def process() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def everybodys(own: T) -> list[T]:
    """What every process has, in rank order: values, dataclasses or CPU tensors, sent by pickle."""
    _, world = process()
    if world == 1:
        return [own]
    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, own)
    return cast(list[T], parts)


def gather_variable(rows: Tensor) -> Tensor:
    """Concatenate CPU tensors (n_r, ...) of all processes in rank order; n_r may differ.

    Raises:
        RuntimeError: from torch, when trailing shapes differ between processes that have rows.
    """
    return torch.cat([part for part in everybodys(rows) if len(part)] or [rows])


def gather_counts(counts: Counter[str]) -> Counter[str]:
    """Sum counts over all processes."""
    return sum(everybodys(counts), Counter())
