"""What every layer offers that takes the place of a transformer block's MLP."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class RoutedLayer(nn.Module):
    """Base of the routed layers: tokens (B, M, d) to (B, M, d); the residual is outside.

    `auxiliary_losses` holds the weighted, differentiable terms of the latest forward pass in
    training that the layer wants added to the training loss, by name; it is empty for layers that
    have none, such as Soft MoE.
    """

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary_losses: dict[str, Tensor] = {}

    @abstractmethod
    def init_weights(self) -> None:
        """Draw the layer's own parameters again; its experts initialise themselves."""

    @abstractmethod
    def no_weight_decay(self) -> set[str]:
        """Names, relative to this layer, that an optimizer must not decay."""
