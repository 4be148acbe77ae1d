"""What every layer offers that takes the place of a transformer block's MLP."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class RoutedLayer(nn.Module):
    """Base of the routed layers: tokens (B, M, d) to (B, M, d); the residual is outside.

    `auxiliary_losses` holds the weighted, differentiable terms of the latest forward pass in
    training that the layer wants added to the training loss, by name; it is empty for layers that
    have none, such as Soft MoE, in eval mode, and once the terms were collected (see
    `encoders.auxiliary_losses`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary_losses: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the terms, whose graph can be neither."""
        return {**self.__dict__, "auxiliary_losses": {}}

    @abstractmethod
    def init_weights(self) -> None:
        """Draw the layer's own parameters again; its experts initialise themselves."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names, relative to this layer, that an optimizer must not decay."""

    def offer_auxiliary_losses(self, terms: dict[str, Tensor]) -> None:
        """Replace `auxiliary_losses`, in `forward`.

        Gradient checkpointing runs `forward` once more during the backward pass. That run must
        compute the terms, for their gradients need it, but not offer them a second time: the
        caller already has them, and their graph would be kept alive until the next step.
        """
        # The mark by which torch.utils.checkpoint itself knows a backward pass.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.auxiliary_losses = terms
