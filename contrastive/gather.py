"""Gathering features from all processes with a gradient that flows back to each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _GatherRows(torch.autograd.Function):
    """Forward: rows of all processes, in rank order. Backward: sum the gradients that all
    processes hold for this process's rows (not the mean: each process's loss is a different
    function of them)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        gathered = rows.new_empty(len(rows) * world_size(), *rows.shape[1:])
        distributed.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty(ctx.count, *gradient.shape[1:])
        distributed.reduce_scatter_tensor(own, gradient)
        return own


def gather_rows(rows: Tensor) -> Tensor:
    """(b, ...) on each process to (B, ...) on all, differentiable; the rows themselves alone.

    The processes must have as many rows each: see `CountCheck`.
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)  # pyrefly: ignore


class CountCheck:
    """Makes sure that all processes hold as many rows: a mean over processes needs that.

    Every call exchanges one number, so that no process waits for one that takes no part. It is
    read on the host only in the first call and when the number of this process's rows has changed;
    otherwise the device compares, for which the host does not wait.

    Raises:
        RuntimeError: they do not, on every process. A process whose number has not changed learns
            it from the device: a GPU reports it late, as a failed assertion.
    """

    def __init__(self) -> None:
        self._known = -1

    def __call__(self, rows: Tensor) -> None:
        if world_size() == 1:
            return
        count = len(rows)
        counts = torch.empty(world_size(), dtype=torch.int64, device=rows.device)
        distributed.all_gather_into_tensor(counts, counts.new_full((1,), count))
        if count == self._known:
            same = (counts == count).all()
            torch._assert_async(
                same, f"another process no longer has {count} rows as this one: make batches equal"
            )
            return
        numbers = counts.tolist()
        if len(set(numbers)) > 1:
            raise RuntimeError(f"processes have batches of {numbers}: make them equal")
        self._known = count


def world_size() -> int:
    """Number of training processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """Number of this process."""
    return distributed.get_rank() if world_size() > 1 else 0
