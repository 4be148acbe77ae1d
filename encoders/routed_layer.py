"""What every layer offers that takes the place of a transformer block's MLP."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from encoders.experts import ExpertMLP


class Placement(TypedDict, total=False):
    """Where parameters live and what type they have; torch's defaults when left out."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class ExpertOptions(Placement, total=False):
    """What the experts of every routed layer take; see `RoutedLayer` for the defaults."""

    identical_experts: bool
    dropout: float


# Default of layers that could never tell equal experts apart.
INDEPENDENT: ExpertOptions = {"identical_experts": False}


def check_padding_mask(padding_mask: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `padding_mask` is bool (B, M) for tokens `x` (B, M, d)."""
    if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} {tuple(padding_mask.shape)}; tokens of shape"
            f" {tuple(x.shape)} need torch.bool {tuple(x.shape[:2])}, true where there is no token"
        )


class RoutedLayer(nn.Module):
    """Base of the routed layers: tokens (B, M, d) to (B, M, d); the residual is outside.

    A subclass takes its own options by name and hands the rest on as `Unpack[ExpertOptions]`. Its
    parameters are made beside the experts, by `new_parameter`.

    `float32_parameters` names those of its own parameters that are read in float32 under every
    precision, such as a router's: they must not be rounded on the way.

    `auxiliary_losses` holds the weighted, differentiable terms of the latest forward pass in
    training that the layer wants added to the training loss, by name; it is empty for layers that
    have none, such as Soft MoE, in eval mode, and once the terms were collected (see
    `encoders.auxiliary_losses`).

    Args:
        dim: token width d.
        num_experts: E.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        identical_experts: start all experts equal, as the released Soft MoE configurations do.
        dropout: dropout inside the experts.
        device: where all parameters live.
        dtype: their type.

    Raises:
        ValueError: a size is not positive.
    """

    float32_parameters: tuple[str, ...] = ()

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        identical_experts: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.experts: Any = ExpertMLP(  # any, because subclasses may wrap the bank
            num_experts,
            dim,
            4 * dim if hidden_dim is None else hidden_dim,
            identical_init=identical_experts,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.auxiliary_losses: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the terms, whose graph can be neither."""
        return {**self.__dict__, "auxiliary_losses": {}}

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter on the device and of the type of the experts."""
        return nn.Parameter(self.experts.fc1_weight.new_empty(shape))

    def init_weights(self) -> None:
        """Draw the layer's own parameters again, if any; its experts initialise themselves."""

    def no_weight_decay(self) -> set[str]:
        """Names, relative to this layer, that an optimizer must not decay."""
        return {"experts.fc1_bias", "experts.fc2_bias"}

    def offer_auxiliary_losses(self, terms: dict[str, Tensor]) -> None:
        """Replace `auxiliary_losses`, in `forward`.

        Gradient checkpointing runs `forward` once more during the backward pass. That run must
        compute the terms, for their gradients need it, but not offer them a second time: the
        caller already has them, and their graph would be kept alive until the next step.
        """
        # The mark by which torch.utils.checkpoint itself knows a backward pass.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.auxiliary_losses = terms
