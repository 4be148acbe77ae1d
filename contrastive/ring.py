"""The SigLIP loss with texts that travel from process to process instead of being gathered.

Every process computes the pairs of its own images. In `world` steps it meets the texts of all
processes: its own first, then those that the next process in the ring had before. The gradient of
a block of texts follows it a step behind, grows at every process and ends at home (the exchange of
Zhai et al., 2023, section 3.3, with its backward pass in the same round). A process thus holds a
few blocks (b, D), whatever their number; gathered texts and their gradient are two of (B, D).

A softmax needs all logits of a row before it can begin with gradients, so its texts would go
round twice; see docs/contrastive_losses.md for why that was not built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from contrastive.gather import rank, world_size
from contrastive.targets import Targets
from contrastive.tiled_losses import TILE_ROWS, sigmoid_plan, sigmoid_tiles
from contrastive.tiles import Diagnostics, Plan, Tiles, keep_gradients, scaled_gradients

TEXTS, GRADIENTS = 0, 1  # tags: two messages may be under way between the same processes


def ring_siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    targets: Targets | None = None,
    tile_rows: int = TILE_ROWS,
) -> tuple[Tensor, Diagnostics]:
    """`contrastive.tiled_losses.tiled_siglip_loss` of all processes' texts, without holding them.

    Every process must call it with as many rows, and take part in the backward pass with the same
    gradient of the loss, as for a mean over processes; the gradients are NaN otherwise. Needed by
    the options alone, group marks and teacher features of all processes are still gathered.

    Args:
        image: unit rows (b, D) of this process.
        text: unit rows (b, D) of this process.
        logit_scale: 0-D, already exponentiated.
        logit_bias: 0-D.
        targets: options; None is the own pair alone.
        tile_rows: rows whose logits exist at a time.

    Returns:
        The loss, 0-D, of this process's rows, and what its logits were like.
    """
    plan = sigmoid_plan(targets, rank() * len(image), tile_rows, world_size())
    inputs = (image, text, logit_scale, logit_bias)
    loss, found = _RingSigmoid.apply(*inputs, plan)  # pyrefly: ignore
    return loss, Diagnostics(found[0], found[1], found[2], None)


class _RingSigmoid(torch.autograd.Function):
    """Sigmoid loss of own rows (b, D) against the texts (b, D) of every process in turn."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(image, text, scale, bias, plan.tile_rows)
            if plan.differentiates:
                tiles.want(*ctx.needs_input_grad[:3])
            ring = _Ring(text, tiles)
            loss, found, of_bias = sigmoid_tiles(tiles, plan, ring.blocks())
        gradients = (tiles.of_rows, ring.of_own, tiles.of_scale, of_bias)
        keep_gradients(ctx, (image, text, scale, bias), gradients)
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled_gradients(ctx, _common(gradients[0])), None)


class _Ring:
    """Texts under way to the process before this one, and their gradients after them."""

    def __init__(self, text: Tensor, tiles: Tiles) -> None:
        self.text, self.tiles = text.contiguous(), tiles
        self.of_own: Tensor | None = None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Place of the first text, and texts (b, D), of every process, its own first."""
        world, held = world_size(), self.text
        growing: _Message | None = None
        for hop in range(world):
            # Under way while the pairs of this block are computed.
            coming = _Message(held, TEXTS) if hop + 1 < world else None
            yield (rank() + hop) % world * len(held), held
            gradient = self.tiles.of_columns
            if hop == 0:
                self.of_own = gradient
            elif gradient is not None:
                if growing is not None:
                    gradient += growing.receive()
                growing = _Message(gradient, GRADIENTS)
            if coming is not None:
                held = coming.receive()
        if growing is not None and self.of_own is not None:
            self.of_own += growing.receive()


class _Message:
    """A tensor to the process before this one, and its like from the next one."""

    def __init__(self, sent: Tensor, tag: int) -> None:
        world = world_size()
        self.sent, self._received = sent, torch.empty_like(sent)  # alive until both have arrived
        to, source = (rank() - 1) % world, (rank() + 1) % world
        self._work = distributed.batch_isend_irecv(
            [
                distributed.P2POp(distributed.isend, sent, to, tag=tag),
                distributed.P2POp(distributed.irecv, self._received, source, tag=tag),
            ]
        )

    def receive(self) -> Tensor:
        for work in self._work:
            work.wait()  # for a GPU: makes its stream wait, not the host
        return self._received


def _common(gradient: Tensor) -> Tensor:
    """The gradient of the loss, NaN unless all processes have the same: gradients of texts have
    been added up on the way as if they had."""
    if world_size() == 1:
        return gradient
    range_ = torch.stack([gradient, -gradient])
    distributed.all_reduce(range_, distributed.ReduceOp.MAX)
    return torch.where(range_[0] == -range_[1], gradient, torch.nan)
