"""Tiles of contrastive logits: walking over them, their targets, gradients and diagnostics.

The losses themselves are in `contrastive.tiled_losses`. Shape legend: a tile is (c, n), c of the b
rows of this process against a block of n columns; one block holds all B columns, unless they come
from process to process (`contrastive.ring`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive.losses import widen
from contrastive.targets import Targets

# Logit of a pair that is left out: its exponential is zero, and so is its product with zero.
LEFT_OUT = -1e30


class Diagnostics(NamedTuple):
    """0-D tensors without gradient, means over this process's rows.

    `positive_logit` is over own pairs, `negative_logit` over pairs that are neither own nor of the
    same group. The accuracies are the shares of images (texts) whose best text (image) in the
    batch is the own one, or one of the same group; the sigmoid loss has no `text_accuracy`.
    """

    positive_logit: Tensor
    negative_logit: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor | None


@dataclass
class Plan:
    """What a tiled loss needs beside its differentiable inputs."""

    targets: Targets
    offset: int
    tile_rows: int
    teacher: tuple[Any, ...] | None  # rows, all columns, scale, and possibly bias
    both: bool = False
    blocks: int = 1  # of equally many columns

    def __post_init__(self) -> None:
        if self.tile_rows < 1:
            raise ValueError(f"tile_rows must be at least 1, got {self.tile_rows}")
        # Autograd turns gradients off inside of forward.
        self.differentiates = torch.is_grad_enabled()


class Tiles:
    """Tiles of scale * rows @ columns.T + bias, and gradients accumulated from theirs."""

    def __init__(
        self, rows: Tensor, columns: Tensor, scale: Any, bias: Any = None, size: int = 256
    ) -> None:
        self.rows = widen(rows)
        self.scale, self.bias, self.size = scale, bias, size
        self.want(False, False, False)
        self.turn_to(columns)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), self.size):
            yield slice(start, min(start + self.size, len(self.rows)))

    def want(self, rows: bool, columns: bool, scale: bool) -> None:
        """Which gradients to accumulate."""
        self.of_rows: Tensor | None = torch.zeros_like(self.rows) if rows else None
        self.of_scale: Tensor | None = self.rows.new_zeros(()) if scale else None
        self._wants_columns = columns

    def turn_to(self, columns: Tensor) -> None:
        """Take a block of columns; their gradient begins at zero."""
        self.columns = widen(columns)
        self.of_columns: Tensor | None = None

    def logits(self, part: slice) -> Tensor:
        logits = (self.rows[part] * self.scale) @ self.columns.T
        return logits if self.bias is None else logits.add_(self.bias)

    def accumulate(self, part: slice, gradient: Tensor) -> None:
        """Take the gradient (c, n) of the logits of one tile."""
        if self.of_rows is not None or self.of_scale is not None:
            product = gradient @ self.columns
            if self.of_scale is not None:  # the sum of gradient * similarity, without similarities
                self.of_scale += (product * self.rows[part]).sum()
            if self.of_rows is not None:
                self.of_rows[part] += product.mul_(self.scale)
        if self._wants_columns:
            if self.of_columns is None:
                self.of_columns = torch.zeros_like(self.columns)
            self.of_columns.addmm_(gradient.T, self.rows[part] * self.scale)


class Pass:
    """One walk over the tiles of a loss: targets, shares of the mean, and diagnostics."""

    def __init__(self, tiles: Tiles, plan: Plan) -> None:
        self.tiles, self.targets = tiles, plan.targets
        count, total = len(tiles.rows), len(tiles.columns) * plan.blocks
        device = tiles.rows.device
        self.own_columns = torch.arange(count, device=device) + plan.offset
        self.share = tiles.rows.new_full((count,), 1 / count)
        if self.targets.weights is not None:
            self.share = self.share * self.targets.weights
        self.alike_count = torch.ones(count, dtype=torch.int64, device=device)
        groups, all_groups = self.targets.groups, self.targets.all_groups
        if groups is not None and all_groups is not None:
            ordered = all_groups.sort().values
            until = torch.searchsorted(ordered, groups, right=True)
            self.alike_count = until - torch.searchsorted(ordered, groups)
        self.negatives = count * total - self.alike_count.sum()
        self.own_logits = tiles.rows.new_empty(count)
        self.negative_sum = tiles.rows.new_zeros(())
        self.largest = tiles.rows.new_full((count,), -torch.inf)
        self.best = torch.zeros_like(self.own_columns)
        self.offset = plan.offset
        self.turn_to(0)

    def turn_to(self, start: int) -> None:
        """Go on with the block that the tiles have turned to; `start` is its first column."""
        stop = start + len(self.tiles.columns)
        self.start = start
        self.holds_own = start <= self.offset < stop
        all_groups = self.targets.all_groups
        self.block_groups = None if all_groups is None else all_groups[start:stop]

    def own(self, part: slice) -> tuple[Tensor, Tensor]:
        """Indices of the own pairs in a tile; empty in a block of other processes."""
        columns = self.own_columns[part] - self.start
        columns = columns if self.holds_own else columns[:0]
        return torch.arange(len(columns), device=columns.device), columns

    def alike(self, part: slice) -> Tensor | None:
        """(c, n) bool: pairs of one group, the own ones among them."""
        if self.targets.groups is None or self.block_groups is None:
            return None
        return self.targets.groups[part, None] == self.block_groups[None, :]

    def excluded(self, part: slice, alike: Tensor | None) -> Tensor | None:
        """(c, n) bool: pairs that are left out."""
        if alike is None or not self.targets.masks:
            return None
        return alike.index_put(self.own(part), alike.new_zeros(()))

    def observe(self, part: slice, logits: Tensor, alike: Tensor | None) -> None:
        """Diagnostics of logits from which nothing is left out yet."""
        own = logits[self.own(part)]
        if self.holds_own:
            self.own_logits[part] = own
        similar = own.sum() if alike is None else (logits * alike).sum()
        self.negative_sum += logits.sum() - similar

    def score(self, part: slice, largest: Tensor, best: Tensor) -> None:
        """Remember the best column of the rows of a tile; of equal ones the first."""
        best, before = best + self.start, self.largest[part]
        better = (largest > before) | ((largest == before) & (best < self.best[part]))
        self.best[part] = torch.where(better, best, self.best[part])
        self.largest[part] = torch.maximum(largest, before)

    def accuracy(self, best: Tensor) -> Tensor:
        """Share of rows whose best column (b,) is the own one, or one of the same group."""
        groups, all_groups = self.targets.groups, self.targets.all_groups
        if groups is None or all_groups is None:
            right = best == self.own_columns
        else:
            right = all_groups[best] == groups
        return right.to(self.tiles.rows.dtype).mean()

    def diagnostics(self, column_accuracy: Tensor | None = None) -> Tensor:
        """(4,) the fields of `Diagnostics`."""
        accuracy = self.accuracy(self.best)
        other = torch.zeros_like(accuracy) if column_accuracy is None else column_accuracy
        negative = self.negative_sum / self.negatives.clamp(min=1)
        return torch.stack([self.own_logits.mean(), negative, accuracy, other])


class Columns(NamedTuple):
    """Per column (B,): the largest logit, its row, and the log of the sum of exponentials of all
    logits less the largest."""

    largest: Tensor
    best: Tensor
    log_sum: Tensor

    @property
    def lse(self) -> Tensor:
        return self.largest + self.log_sum


def online_columns(tiles: Iterator[tuple[slice, Tensor]]) -> Columns:
    """Summarise columns tile by tile; the tiles are overwritten."""
    part, logits = next(tiles)
    largest, best = logits.max(dim=0)
    total = logits.sub_(largest).exp_().sum(dim=0)
    for part, logits in tiles:
        height, row = logits.max(dim=0)
        best = torch.where(height > largest, row + part.start, best)
        height = torch.maximum(height, largest)
        total = total * (largest - height).exp() + logits.sub_(height).exp_().sum(dim=0)
        largest = height
    return Columns(largest, best, total.log())


def keep_gradients(
    ctx: Any, inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]
) -> None:
    """Save gradients of the loss, in the precision of its inputs, for backward."""
    pairs = zip(inputs, gradients, strict=True)
    ctx.save_for_backward(*(None if g is None else g.to(x.dtype) for x, g in pairs))


def scaled_gradients(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    """Saved gradients times the gradient of the loss.

    Raises:
        RuntimeError: a second derivative is wanted.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tiled losses have no second derivative: use contrastive.losses for create_graph=True"
        )
    return [None if g is None else g * gradient.to(g.dtype) for g in ctx.saved_tensors]
