"""The contrastive losses of `contrastive.losses` without their (b, B) logits.

Rows are taken `tile_rows` at a time. A tile has all columns, so the softmax of its rows is at hand
and the gradient of its logits can be computed on the spot: forward already accumulates the
gradients of features, scale and bias, and backward only multiplies them by the gradient of the
loss. What lives from forward to backward is one gradient per input; the rest is a few tiles of
(tile_rows, B). A sigmoid loss thus takes three matrix products, as the plain form does.

Alone in the world the two directions of CLIP read the same logits, once by rows and once by
columns. A first pass then gathers the log-sum-exp of every column online (Milakov and Gimelshein,
2018), and the second pass serves both directions: four products instead of six.

Shapes and conventions are those of `contrastive.losses`. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from contrastive.targets import Targets
from contrastive.tiles import (
    LEFT_OUT,
    Columns,
    Diagnostics,
    Pass,
    Plan,
    Tiles,
    keep_gradients,
    online_columns,
    scaled_gradients,
)

TILE_ROWS = 256


def tiled_clip_loss(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    offset: int = 0,
    targets: Targets | None = None,
    tile_rows: int = TILE_ROWS,
) -> tuple[Tensor, Diagnostics]:
    """`contrastive.losses.clip_loss`, and what the logits look like.

    Where `all_image` and `all_text` are `image` and `text` themselves, as in one process, both
    directions share their logits.

    Args:
        image: unit rows (b, D) of this process.
        text: unit rows (b, D) of this process.
        all_image: unit rows (B, D) of all processes.
        all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated.
        offset: own column of the first row.
        targets: options; None is the own pair alone.
        tile_rows: rows whose logits exist at a time.

    Returns:
        The loss, 0-D, the mean over the b rows of this process, and what its logits were like.

    Raises:
        ValueError: tile_rows below 1.
    """
    targets = targets or Targets()
    teacher, rest = targets.teacher, (targets, offset, tile_rows)
    to_text = to_image = None
    if teacher is not None:
        to_text = (teacher.image, teacher.all_text, teacher.logit_scale)
        to_image = (teacher.text, teacher.all_image, teacher.logit_scale)
    if all_image is image and all_text is text:
        plan = Plan(*rest, to_text, both=True)
        loss, found = _TiledSoftmax.apply(image, text, logit_scale, plan)  # pyrefly: ignore
        return loss, Diagnostics(*found.unbind())
    plan = Plan(*rest, to_text)
    by_image, found = _TiledSoftmax.apply(image, all_text, logit_scale, plan)  # pyrefly: ignore
    plan = Plan(*rest, to_image)
    by_text, other = _TiledSoftmax.apply(text, all_image, logit_scale, plan)  # pyrefly: ignore
    positive, negative, image_accuracy, _ = found.unbind()
    return (by_image + by_text) / 2, Diagnostics(positive, negative, image_accuracy, other[2])


def tiled_siglip_loss(
    image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int = 0,
    targets: Targets | None = None,
    tile_rows: int = TILE_ROWS,
) -> tuple[Tensor, Diagnostics]:
    """`contrastive.losses.siglip_loss`, and what the logits look like.

    Args:
        image: unit rows (b, D) of this process.
        all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated.
        logit_bias: 0-D.
        offset: own column of the first row.
        targets: options; None is the own pair alone.
        tile_rows: rows whose logits exist at a time.

    Returns:
        The loss, 0-D, of the b rows of this process, and what its logits were like.

    Raises:
        ValueError: tile_rows below 1.
    """
    plan = sigmoid_plan(targets, offset, tile_rows)
    inputs = (image, all_text, logit_scale, logit_bias)
    loss, found = _TiledSigmoid.apply(*inputs, plan)  # pyrefly: ignore
    return loss, Diagnostics(found[0], found[1], found[2], None)


class _SoftmaxPass(Pass):
    """Targets of the softmax loss, of rows alone or of rows and columns (`both`)."""

    def __init__(self, tiles: Tiles, plan: Plan) -> None:
        super().__init__(tiles, plan)
        self.both = plan.both
        self.share = self.share / 2 if plan.both else self.share
        total, targets = len(tiles.columns), plan.targets
        self.teacher = None if plan.teacher is None else Tiles(*plan.teacher, size=tiles.size)
        self.columns = self._columns() if plan.both else None
        self.column_accuracy = self.teacher_lse = None
        if self.columns is not None:
            self.column_accuracy = self.accuracy(self.columns.best)
        if self.teacher is not None and plan.both:
            found = ((part, self.teacher.logits(part)) for part in self.teacher)
            self.teacher_lse = online_columns(found).lse
        positives = self.alike_count if targets.spreads else torch.ones_like(self.alike_count)
        kept = total + 1 - self.alike_count if targets.masks else total
        self.of_positive = (1 - targets.label_smoothing) * self.share / positives
        self.of_kept = targets.label_smoothing * self.share / kept

    def logits(self, part: slice, alike: Tensor | None) -> Tensor:
        logits, excluded = self.tiles.logits(part), self.excluded(part, alike)
        return logits if excluded is None else logits.masked_fill_(excluded, LEFT_OUT)

    def _columns(self) -> Columns:
        return online_columns((part, self.logits(part, self.alike(part))) for part in self.tiles)

    def wanted(self, part: slice, alike: Tensor | None) -> Tensor | None:
        """(c, B) targets times shares; None when these are `of_positive` at the own pairs."""
        if self.teacher is not None:
            similar = self.teacher.logits(part)
            wanted = similar.softmax(dim=1) * self.share[part, None]
            if self.teacher_lse is not None:
                wanted += (similar - self.teacher_lse).exp_() * self.share
            return wanted
        if not (self.targets.label_smoothing or self.targets.spreads):
            return None
        wanted = self._pairwise(self.of_kept, part)
        if (excluded := self.excluded(part, alike)) is not None:
            wanted.masked_fill_(excluded, 0)
        if alike is not None and self.targets.spreads:
            return wanted.add_(self._pairwise(self.of_positive, part).mul_(alike))
        own = self.own(part)
        return wanted.index_put_(own, self.own_share(part), accumulate=True)

    def own_share(self, part: slice) -> Tensor:
        return self.of_positive[part] * (2 if self.both else 1)

    def _pairwise(self, of_row: Tensor, part: slice) -> Tensor:
        """(c, B) from a value per row, plus the value of the column where columns count."""
        if self.both:
            return of_row[part, None] + of_row
        return of_row[part, None].repeat(1, len(self.tiles.columns))


class _TiledSoftmax(torch.autograd.Function):
    """Cross-entropy of rows (b, D) against columns (B, D), and with `plan.both` the mean of that
    and of columns against rows; beside it the fields of `Diagnostics`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            tiles = Tiles(rows, columns, scale, size=plan.tile_rows)
            if plan.differentiates:
                tiles.want(*ctx.needs_input_grad[:3])
            loss, found = _softmax_tiles(tiles, plan)
        keep_gradients(
            ctx, (rows, columns, scale), (tiles.of_rows, tiles.of_columns, tiles.of_scale)
        )
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, gradients[0]), None)


def _softmax_tiles(tiles: Tiles, plan: Plan) -> tuple[Tensor, Tensor]:
    walk = _SoftmaxPass(tiles, plan)
    terms = torch.cat([_softmax_tile(tiles, walk, part) for part in tiles])
    return terms.sum(), walk.diagnostics(walk.column_accuracy)


def _softmax_tile(tiles: Tiles, walk: _SoftmaxPass, part: slice) -> Tensor:
    """Terms (c,) of the loss; a function of its own, so that nothing of a tile outlives it."""
    alike, own = walk.alike(part), walk.own(part)
    logits = tiles.logits(part)
    walk.observe(part, logits, alike)
    if (excluded := walk.excluded(part, alike)) is not None:
        logits.masked_fill_(excluded, LEFT_OUT)
    largest, best = logits.max(dim=1)
    walk.score(part, largest, best)
    share, wanted = walk.share[part], walk.wanted(part, alike)
    gradient = (logits - largest[:, None]).exp_()
    total = gradient.sum(dim=1)
    gradient *= (share / total)[:, None]
    # Own logits are held against the largest, where rows that match well lose no digits.
    entropy, heights = total.log(), largest
    own_logits = 2 * walk.own_logits[part] if walk.both else walk.own_logits[part]
    if walk.columns is not None:
        entropy = entropy + walk.columns.log_sum[part]
        heights = heights + walk.columns.largest[part]
    if wanted is None:
        terms = share * (entropy - (own_logits - heights))
    else:
        terms = share * (entropy + heights) - (wanted * logits).sum(dim=1)
    if walk.columns is not None:
        gradient += logits.sub_(walk.columns.lse).exp_().mul_(walk.share)
    if wanted is None:
        gradient.index_put_(own, -walk.own_share(part), accumulate=True)
    else:
        gradient -= wanted
    tiles.accumulate(part, gradient)
    return terms


class _TiledSigmoid(torch.autograd.Function):
    """Sigmoid loss of rows (b, D) against columns (B, D), and the fields of `Diagnostics`."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            tiles = Tiles(rows, columns, scale, bias, plan.tile_rows)
            if plan.differentiates:
                tiles.want(*ctx.needs_input_grad[:3])
            loss, found, of_bias = sigmoid_tiles(tiles, plan, [(0, columns)])
        gradients = (tiles.of_rows, tiles.of_columns, tiles.of_scale, of_bias)
        keep_gradients(ctx, (rows, columns, scale, bias), gradients)
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, gradients[0]), None)


def sigmoid_plan(targets: Targets | None, offset: int, tile_rows: int, blocks: int = 1) -> Plan:
    """Plan of a sigmoid loss of images against texts."""
    targets = targets or Targets()
    to_text = None
    if (teacher := targets.teacher) is not None:
        to_text = (teacher.image, teacher.all_text, teacher.logit_scale, teacher.logit_bias)
    return Plan(targets, offset, tile_rows, to_text, blocks=blocks)


def sigmoid_tiles(
    tiles: Tiles, plan: Plan, blocks: Iterable[tuple[int, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, the fields of `Diagnostics`, and the gradient of the bias.

    Args:
        blocks: place of the first column, and columns (n, D) of each block. The gradient of the
            columns is in `tiles` when the next block is asked for.
    """
    walk = Pass(tiles, plan)
    teacher = None if plan.teacher is None else Tiles(*plan.teacher, size=tiles.size)
    terms, of_bias = [], []
    for start, columns in blocks:
        tiles.turn_to(columns)
        walk.turn_to(start)
        if teacher is not None and plan.teacher is not None:
            teacher.turn_to(plan.teacher[1][start : start + len(columns)])
        for part in tiles:
            term, slope = _sigmoid_tile(tiles, walk, teacher, part)
            terms.append(term)
            of_bias.append(slope)
    return torch.cat(terms).sum(), walk.diagnostics(), torch.cat(of_bias).sum()


def _sigmoid_tile(
    tiles: Tiles, walk: Pass, teacher: Tiles | None, part: slice
) -> tuple[Tensor, Tensor]:
    """Terms (c,) of the loss and of the gradient of the bias.

    A pair's term is softplus(u) - flip * u, where u is the logit, negated at positives, and flip
    what the target lacks of certainty: for hard targets no two large numbers cancel.
    """
    alike, own = walk.alike(part), walk.own(part)
    signed = tiles.logits(part)
    walk.observe(part, signed, alike)
    if (excluded := walk.excluded(part, alike)) is not None:
        signed.masked_fill_(excluded, LEFT_OUT)
    walk.score(part, *signed.max(dim=1))
    positives = alike if walk.targets.spreads else None
    flip: float | Tensor = walk.targets.label_smoothing / 2
    if teacher is None:
        _negate(signed, own, positives)
    else:
        flip = teacher.logits(part).sigmoid_()
    terms = _softplus_sums(signed)
    if isinstance(flip, Tensor) or flip:
        known = signed if excluded is None else signed.masked_fill(excluded, 0)
        terms -= (known * flip).sum(dim=1)
    gradient = signed.sigmoid_().sub_(flip)
    if excluded is not None:
        gradient.masked_fill_(excluded, 0)
    if teacher is None:
        _negate(gradient, own, positives)
    gradient *= walk.share[part, None]
    tiles.accumulate(part, gradient)
    return terms * walk.share[part], gradient.sum(dim=1)


def _softplus_sums(tile: Tensor) -> Tensor:
    """Row sums of log(1 + exp(tile)), exact at both ends, with one more tile in memory."""
    rest = tile.abs().neg_().exp_().log1p_().sum(dim=1)
    return rest + tile.clamp(min=0).sum(dim=1)


def _negate(tile: Tensor, own: tuple[Tensor, Tensor], positives: Tensor | None) -> None:
    """Change the sign at own pairs, or at all positives, in place."""
    if positives is None:
        tile[own] = -tile[own]
    else:
        torch.where(positives, -tile, tile, out=tile)
