"""Fixed routing: the ablations of the Soft MoE paper (arXiv 2308.00951, appendix A).

Each takes away one part of what Soft MoE learns. With identical numbers of tokens and slots the
paper finds Soft > Soft/Uniform > Uniform/Soft > Uniform > Identity > dense. There is no public
code; what follows is the text.

Shape legend: B images, M tokens, d width, E experts, P slots per expert, S = E * P slots.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from encoders.routed_layer import INDEPENDENT, ExpertOptions, RoutedLayer
from encoders.soft_moe import RoutingWeights, SoftMoE


class FixedRouting(RoutedLayer):
    """Base of the layers without a router: their only parameters are the experts.

    Args:
        dim: token width d.
        num_experts: E.
        slots_per_expert: P.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        **experts: further options of `RoutedLayer`.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        hidden_dim: int | None = None,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, **experts)
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert must be at least 1, got {slots_per_expert}")
        self.slots_per_expert = slots_per_expert


class IdentityRouting(FixedRouting):
    """Slot i is token i, and token i gets the output of slot i; so M must be S = E * P.

    Arguments as `FixedRouting`; `forward` raises ValueError for another number of tokens.
    """

    def route(self, x: Tensor) -> RoutingWeights:
        """Tokens (B, S, d) to the weights that `forward` does not compute, for reports."""
        batch, tokens, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = torch.eye(tokens, device=x.device, dtype=wide).expand(batch, -1, -1)
        return RoutingWeights(weights.log(), weights, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, S, d) to (B, S, d) in the dtype of `x` (or of autocast)."""
        batch, tokens, dim = x.shape
        experts, slots = self.num_experts, self.slots_per_expert
        if tokens != experts * slots:
            raise ValueError(
                f"identity routing gives every token its own slot, but {tokens} tokens meet"
                f" {experts} experts x {slots} slots: choose num_experts * slots_per_expert ="
                f" {tokens}"
            )
        rows = x.reshape(batch, experts, slots, dim).transpose(0, 1)
        outputs = self.experts(rows.reshape(experts, batch * slots, dim))
        return outputs.view(experts, batch, slots, dim).transpose(0, 1).reshape(x.shape)


class UniformRouting(FixedRouting):
    """All slots are the mean token, and all tokens get the mean of all slot outputs.

    The slots of an expert are all the same, so each expert runs once per image whatever P. Experts
    start independent by default, for identical ones would stay identical. Arguments otherwise as
    `FixedRouting`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        hidden_dim: int | None = None,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, slots_per_expert, hidden_dim, **(INDEPENDENT | experts))

    def route(self, x: Tensor) -> RoutingWeights:
        """Tokens (B, M, d) to the weights that `forward` does not compute, for reports."""
        slots = self.num_experts * self.slots_per_expert
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = torch.zeros(*x.shape[:2], slots, device=x.device, dtype=wide)
        return RoutingWeights(logits, logits.softmax(1), logits.softmax(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, M, d) to (B, M, d) in the dtype of `x` (or of autocast)."""
        rows = x.mean(1).expand(self.num_experts, -1, -1)
        return self.experts(rows).mean(0).unsqueeze(1).expand(x.shape)


class SoftUniformRouting(SoftMoE):
    """Learned dispatch, uniform combine: all tokens get the mean of all slot outputs.

    Arguments as `SoftMoE`.
    """

    def route(self, x: Tensor, padding_mask: Tensor | None = None) -> RoutingWeights:
        """As `SoftMoE.route`, with combine weights 1 / S."""
        weights = super().route(x, padding_mask)
        return weights._replace(
            combine=torch.full_like(weights.combine, 1 / weights.combine.shape[2])
        )


class UniformSoftRouting(SoftMoE):
    """Uniform dispatch, learned combine: all slots are the mean token.

    Arguments as `SoftMoE`. Identical experts answer alike, so that only the spread of the combine
    weights lets them drift apart.
    """

    def route(self, x: Tensor, padding_mask: Tensor | None = None) -> RoutingWeights:
        """As `SoftMoE.route`, with equal dispatch weights for all tokens that are not padding."""
        weights = super().route(x, padding_mask)
        equal = torch.full_like(weights.dispatch, 1 / x.shape[1])
        if padding_mask is not None:
            tokens = (~padding_mask).sum(1).clamp_min(1)[:, None, None]
            equal = (~padding_mask).unsqueeze(-1).expand_as(equal) / tokens
        return weights._replace(dispatch=equal)
