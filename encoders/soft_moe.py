"""Soft MoE layer (Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv 2308.00951).

Every slot is a weighted average of all tokens (dispatch), every expert processes its own slots,
and every token is a weighted average of all slot outputs (combine). Nothing is dropped, nothing is
sorted, and one image never influences another.

Shape legend: B images, M tokens, d width, E experts, P slots per expert, S = E * P slots. Flat
slot s belongs to expert s // P.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from encoders.routed_layer import ExpertOptions, RoutedLayer, check_padding_mask

# Inside the root, as in google-research/vmoe `vmoe/projects/soft_moe/router.py`; the paper's
# Algorithm 2 adds it to the norm instead, which differs measurably for many experts.
NORM_EPS = 1e-6
# Standard deviation of a unit normal truncated to [-2, 2].
TRUNCATED_STD = 0.87962566103423978


class RoutingWeights(NamedTuple):
    """What the router decided, all float32 (or wider): logits, dispatch and combine, (B, M, S)."""

    logits: Tensor
    dispatch: Tensor
    combine: Tensor


def l2_normalize(x: Tensor, dim: int) -> Tensor:
    """Divide by sqrt(sum of squares + 1e-6) along `dim`; finite for a zero vector."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True) + NORM_EPS)


def slots_for_capacity(tokens: int, experts: int, capacity_factor: float = 1.0) -> int:
    """Slots per expert for `capacity_factor` slots per token, rounded half to even.

    Follows google-research/vmoe (`vmoe/moe.py`). Compute it from the configured number of tokens:
    the slots are parameters, so they cannot follow the batch.

    Raises:
        ValueError: an argument is not positive, or the result would be no slot at all.
    """
    named = {"tokens": tokens, "experts": experts, "capacity_factor": capacity_factor}
    for name, value in named.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    slots = round(tokens * capacity_factor / experts)
    if slots < 1:
        raise ValueError(
            f"capacity_factor {capacity_factor} leaves {experts} experts without a slot for "
            f"{tokens} tokens; use fewer experts or at least {experts / tokens:g}"
        )
    return slots


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Fill with a normal of variance 1 / fan_in that is truncated at two standard deviations."""
    std = math.sqrt(1.0 / fan_in) / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class SlotLayer(RoutedLayer):
    """What Soft MoE and its causal form share: experts with learned slots, and their logits.

    Router parameters: `phi` (d, E, P), one vector per slot, and `scale`, a 0-D tensor that
    multiplies the logits (init 1, unconstrained). Logits are the products of L2-normalised tokens
    and L2-normalised `phi`, in float32 even under autocast.

    Args:
        dim: token width d.
        num_experts: E.
        slots_per_expert: P.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        **experts: further options of `RoutedLayer`.

    Raises:
        ValueError: a size is not positive.
    """

    normalize = True
    float32_parameters = ("phi", "scale")

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
        self.phi = self.new_parameter(dim, num_experts, slots_per_expert)
        self.scale = self.new_parameter()
        self.init_weights()

    def init_weights(self) -> None:
        """Scale 1, LeCun normal for phi with fan-in d * E: its first two axes, as the reference."""
        lecun_normal_(self.phi, self.phi[..., 0].numel())
        nn.init.ones_(self.scale)

    def no_weight_decay(self) -> set[str]:
        return {"phi", "scale"} | super().no_weight_decay()

    def logits(self, x: Tensor) -> Tensor:
        """Router logits (B, M, S) of tokens (B, M, d), without noise, in float32 or wider."""
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            tokens, phi = x.to(wide), self.phi.to(wide).flatten(1)
            if self.normalize:
                tokens, phi = l2_normalize(tokens, -1), l2_normalize(phi, 0)
            return tokens @ (self.scale.to(wide) * phi)

    def extra_repr(self) -> str:
        dim, experts, slots = self.phi.shape
        return f"dim={dim}, num_experts={experts}, slots_per_expert={slots}"


class SoftMoE(SlotLayer):
    """Soft MoE in place of a transformer block's MLP: (B, M, d) to (B, M, d).

    Parameters and logits are those of `SlotLayer`; the tokens that are averaged into slots are
    *not* normalised (paper section 2.3, and the public router). Logits and both softmaxes run in
    float32 even under autocast; the two mixtures and the experts run in the compute dtype.

    Args:
        dim: token width d.
        num_experts: E.
        slots_per_expert: P. The paper finds 1 best at equal cost; cost follows E * P.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        normalize: L2-normalise tokens and phi (the default); false is the paper's ablation.
        noise_std: standard deviation of normal noise on the logits, in training only.
        **experts: further options of `RoutedLayer`.

    Raises:
        ValueError: a size is not positive or noise_std is negative.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        hidden_dim: int | None = None,
        *,
        normalize: bool = True,
        noise_std: float = 0.0,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, slots_per_expert, hidden_dim, **experts)
        if noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {noise_std}")
        self.normalize = normalize
        self.noise_std = noise_std

    def route(self, x: Tensor, padding_mask: Tensor | None = None) -> RoutingWeights:
        """Router only: tokens (B, M, d) to logits, dispatch weights and combine weights (B, M, S).

        Dispatch sums to 1 over tokens for each slot, combine sums to 1 over slots for each token.
        Tokens that `padding_mask` (B, M) marks as true get no dispatch weight, unless the whole
        image is padding.
        """
        logits = self.logits(x)
        if self.training and self.noise_std > 0:
            logits = logits + self.noise_std * torch.randn_like(logits)
        competing = logits
        if padding_mask is not None:
            # Not minus infinity: an image that is all padding would become NaN.
            lowest = torch.finfo(logits.dtype).min
            competing = logits.masked_fill(padding_mask.unsqueeze(-1), lowest)
        return RoutingWeights(logits, competing.softmax(dim=1), logits.softmax(dim=2))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, M, d) to (B, M, d) in the dtype of `x` (or of autocast).

        Args:
            x: tokens.
            padding_mask: (B, M) bool, true where there is no token. Such rows do not influence
                others, whatever they contain, and come out as zero.

        Raises:
            ValueError: a mask of another shape or type.
        """
        padding = None
        if padding_mask is not None:
            check_padding_mask(padding_mask, x)
            padding = padding_mask.unsqueeze(-1)
            x = x.masked_fill(padding, 0)
        _, dispatch, combine = self.route(x, padding_mask)
        _, experts, slots_per_expert = self.phi.shape
        batch, _, dim = x.shape
        slots = dispatch.to(x.dtype).transpose(1, 2) @ x  # (B, S, d)
        slots = slots.view(batch, experts, slots_per_expert, dim).transpose(0, 1)
        outputs = self.experts(slots.reshape(experts, batch * slots_per_expert, dim))
        outputs = outputs.view(experts, batch, slots_per_expert, dim).transpose(0, 1)
        outputs = outputs.reshape(batch, experts * slots_per_expert, dim)
        mixed = combine.to(outputs.dtype) @ outputs
        return mixed if padding is None else mixed.masked_fill(padding, 0)
