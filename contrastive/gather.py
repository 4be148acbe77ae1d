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
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # A copy: autograd may still need the gradient that it hands over.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient)
        start = distributed.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """(b, ...) on each process to (B, ...) on all, differentiable; the rows themselves alone."""
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)  # pyrefly: ignore


def check_equal_counts(rows: Tensor) -> None:
    """Make sure that all processes hold as many rows: a mean over processes needs that.

    Only on a CPU. Elsewhere the host would have to wait for the device; there the loop's look at
    each batch must do.

    Raises:
        RuntimeError: they do not; on every process.
    """
    if world_size() == 1 or rows.device.type != "cpu":
        return
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = len(rows)
    distributed.all_reduce(counts)
    if len(set(counts.tolist())) > 1:
        raise RuntimeError(f"processes have batches of {counts.tolist()}: make them equal")


def world_size() -> int:
    """Number of training processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """Number of this process."""
    return distributed.get_rank() if world_size() > 1 else 0
