"""Tiles of contrastive logits: walking over them, their targets, gradients and diagnostics.

The losses themselves are in `contrastive.tiled_losses`. Shape legend: a tile is (c, B), c rows of
this process against all B columns; b rows in all.
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
    teacher: tuple[Any, ...] | None  # rows, columns, scale, and possibly bias
    both: bool = False

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
        self.rows, self.columns = widen(rows), widen(columns)
        self.scale, self.bias, self.size = scale, bias, size
        self.want(False, False, False)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, len(self.rows), self.size):
            yield slice(start, min(start + self.size, len(self.rows)))

    def logits(self, part: slice) -> Tensor:
        logits = (self.rows[part] * self.scale) @ self.columns.T
        return logits if self.bias is None else logits.add_(self.bias)

    def want(self, rows: bool, columns: bool, scale: bool) -> None:
        """Which gradients to accumulate."""
        self.of_rows: Tensor | None = torch.empty_like(self.rows) if rows else None
        self.of_columns: Tensor | None = torch.zeros_like(self.columns) if columns else None
        self.of_scale: Tensor | None = self.rows.new_zeros(()) if scale else None

    def accumulate(self, part: slice, gradient: Tensor) -> None:
        """Take the gradient (c, B) of the logits of one tile."""
        if self.of_rows is not None or self.of_scale is not None:
            product = gradient @ self.columns
            if self.of_scale is not None:  # the sum of gradient * similarity, without similarities
                self.of_scale += (product * self.rows[part]).sum()
            if self.of_rows is not None:
                torch.mul(product, self.scale, out=self.of_rows[part])
        if self.of_columns is not None:
            self.of_columns.addmm_(gradient.T, self.rows[part] * self.scale)


class Pass:
    """One walk over the tiles of a loss: targets, shares of the mean, and diagnostics."""

    def __init__(self, tiles: Tiles, plan: Plan) -> None:
        self.tiles, self.targets, self.offset = tiles, plan.targets, plan.offset
        count, total = len(tiles.rows), len(tiles.columns)
        self.share = tiles.rows.new_full((count,), 1 / count)
        if self.targets.weights is not None:
            self.share = self.share * self.targets.weights
        self.alike_count = torch.ones(count, dtype=torch.int64, device=tiles.rows.device)
        groups, all_groups = self.targets.groups, self.targets.all_groups
        if groups is not None and all_groups is not None:
            ordered = all_groups.sort().values
            until = torch.searchsorted(ordered, groups, right=True)
            self.alike_count = until - torch.searchsorted(ordered, groups)
        self.negatives = count * total - self.alike_count.sum()
        self.own_logits = tiles.rows.new_empty(count)
        self.negative_sum = tiles.rows.new_zeros(())
        self.hits = tiles.rows.new_zeros(())

    def own(self, part: slice) -> tuple[Tensor, Tensor]:
        """Indices of the own pairs in a tile."""
        local = torch.arange(part.stop - part.start, device=self.tiles.rows.device)
        return local, local + (part.start + self.offset)

    def alike(self, part: slice) -> Tensor | None:
        """(c, B) bool: pairs of one group, the own ones among them."""
        groups, all_groups = self.targets.groups, self.targets.all_groups
        if groups is None or all_groups is None:
            return None
        return groups[part, None] == all_groups[None, :]

    def excluded(self, part: slice, alike: Tensor | None) -> Tensor | None:
        """(c, B) bool: pairs that are left out."""
        if alike is None or not self.targets.masks:
            return None
        return alike.index_put(self.own(part), alike.new_zeros(()))

    def observe(self, part: slice, logits: Tensor, alike: Tensor | None) -> None:
        """Diagnostics of logits from which nothing is left out yet."""
        self.own_logits[part] = logits[self.own(part)]
        similar = self.own_logits[part].sum() if alike is None else (logits * alike).sum()
        self.negative_sum += logits.sum() - similar

    def score(self, part: slice, best: Tensor) -> None:
        """Count rows of a tile whose best column (c,) is right."""
        groups, all_groups = self.targets.groups, self.targets.all_groups
        if groups is None or all_groups is None:
            right = best == self.own(part)[1]
        else:
            right = all_groups[best] == groups[part]
        self.hits += right.sum()

    def diagnostics(self, column_accuracy: Tensor | None = None) -> Tensor:
        """(4,) the fields of `Diagnostics`."""
        accuracy = self.hits / len(self.tiles.rows)
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
