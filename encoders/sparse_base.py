"""What the sparse MoE layers share: a router, buffers of fixed capacity, experts, the way back.

A router decides which token goes into which buffer row; the experts process their buffers; every
token gets the sum of its rows' outputs times their gates. Initial values and precision follow
google-research/vmoe (`vmoe/nn/routing.py`, `vmoe/moe.py`).

All shapes follow from the capacity, so nothing waits for the device, and no operator depends on
the number of experts. Where more than two experts meet at one token, CUDA adds their outputs and,
in the backward pass, what they hand back to the token in no fixed order (`index_add_`, backward of
`index_select`): reproducible to the bit only under `torch.use_deterministic_algorithms`.

Shape legend: B images, M tokens, d width, E experts, G groups, S tokens per group (images per
group times M), C capacity.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from encoders.routed_layer import ExpertOptions, RoutedLayer
from encoders.soft_moe import lecun_normal_


class SparseRouting(NamedTuple):
    """What a sparse router decided.

    `clean_logits` and `logits` (G, S, E) are the router's output before and after noise, `gates`
    (G, S, E) the softmax over experts of the latter, all float32 or wider. Buffer row (g, e, c)
    holds the token `token[g, e, c]` (int64 in [0, S)) with the combine weight `weight[g, e, c]`,
    its gate, if `filled[g, e, c]`; else the token is arbitrary and the weight is 0.
    """

    clean_logits: Tensor
    logits: Tensor
    gates: Tensor
    token: Tensor
    weight: Tensor
    filled: Tensor

    def experts_per_token(self) -> Tensor:
        """How many experts process each token, int64 (G, S)."""
        counts = torch.zeros(self.gates.shape[:2], dtype=torch.int64, device=self.gates.device)
        return counts.scatter_add_(1, self.token.flatten(1), self.filled.flatten(1).long())


class SparseOptions(ExpertOptions, total=False):
    """What both sparse layers take; see `SparseMoE` for meanings and defaults."""

    capacity_factor: float
    capacity_multiple: int
    group_size: int
    noise_std: float


class SparseMoE(RoutedLayer):
    """Router, buffers and experts that both sparse layers share: (B, M, d) to (B, M, d).

    Parameters: `router` (d, E), without bias and decayed like every other kernel, as in the
    reference, and the bank `experts`. The router runs in float32 even under autocast, the experts
    in the compute dtype. Tokens without expert come out as zero.

    Args:
        dim: token width d.
        num_experts: E.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        capacity_factor: buffer rows over the rows that a balanced assignment needs.
        capacity_multiple: capacity is rounded up to a multiple of this.
        group_size: images that are routed together and compete for the same buffers. A batch in
            training must be a multiple of it; in eval mode, groups of the largest common divisor
            with the batch serve, so that a last, smaller batch passes.
        noise_std: times 1 / E, the standard deviation of normal noise on the logits in training.
        **experts: further options of `RoutedLayer`.

    Raises:
        ValueError: a setting is out of range, or, in `forward`, a batch in training that is no
            multiple of `group_size` or a capacity of 0.
    """

    float32_parameters = ("router",)

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        capacity_factor: float = 1.0,
        capacity_multiple: int = 1,
        group_size: int = 1,
        noise_std: float = 1.0,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, **experts)
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, got {capacity_factor}")
        for name, value in (("capacity_multiple", capacity_multiple), ("group_size", group_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if noise_std < 0:
            raise ValueError(f"noise_std must not be negative, got {noise_std}")
        self.capacity_factor, self.capacity_multiple = capacity_factor, capacity_multiple
        self.group_size, self.noise_std = group_size, noise_std
        self.router = self.new_parameter(dim, num_experts)
        self.init_weights()

    def init_weights(self) -> None:
        """LeCun normal for the router; the experts initialise themselves."""
        lecun_normal_(self.router, fan_in=len(self.router))

    @abstractmethod
    def capacity(self, tokens: int) -> int:
        """Buffer rows C of an expert for a group of S = `tokens`."""

    @abstractmethod
    def assign(self, gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Gates (G, S, E) to `token` and `filled` of `SparseRouting`, both (G, E, C)."""

    def route(self, x: Tensor) -> SparseRouting:
        """Router only, for tokens (B, M, d)."""
        batch, tokens, dim = x.shape
        group = self._images_per_group(batch)
        groups = x.reshape(batch // group, group * tokens, dim)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            clean = logits = groups.to(wide) @ self.router.to(wide)
            if self.training and self.noise_std > 0:
                logits = clean + self.noise_sigma() * torch.randn_like(clean)
            gates = logits.softmax(-1)
            token, filled = self.assign(gates.detach(), self.capacity(group * tokens))
            weight = gates.transpose(1, 2).gather(2, token)
            weight = torch.where(filled, weight, torch.zeros_like(weight))
        return SparseRouting(clean, logits, gates, token, weight, filled)

    def auxiliary_terms(self, routing: SparseRouting) -> dict[str, Tensor]:
        """Weighted terms for the training loss, by name; none here."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, M, d) to (B, M, d) in the dtype of `x` (or of autocast)."""
        routing = self.route(x)
        self.offer_auxiliary_losses(self.auxiliary_terms(routing) if self.training else {})
        groups, experts, capacity = routing.token.shape
        first = torch.arange(groups, device=x.device) * routing.gates.shape[1]
        # Row numbers in the flat batch, in the order of the bank's input (E, G * C, d): the wide
        # arrays are gathered and added up once each, and never transposed.
        rows = (routing.token + first.view(-1, 1, 1)).transpose(0, 1).flatten()
        tokens = x.flatten(0, 1)
        buffers = tokens.index_select(0, rows).view(experts, groups * capacity, x.shape[-1])
        outputs = self.experts(buffers).flatten(0, 1)
        weight = routing.weight.transpose(0, 1).reshape(-1, 1).to(outputs.dtype)
        mixed = torch.zeros_like(tokens, dtype=outputs.dtype)
        return mixed.index_add_(0, rows, outputs * weight).view(x.shape)

    @torch.no_grad()
    def routing_scalars(self, routing: SparseRouting) -> dict[str, Tensor]:
        """Cheap figures to log, 0-D tensors on the device.

        Returns:
            `unserved_tokens`: share of tokens without any expert; `expert_load_max` and
            `expert_load_cv`: largest load of an expert over the mean load, and standard deviation
            over mean, where load counts the tokens in the expert's buffers.
        """
        load = routing.filled.sum((0, 2)).float()
        return {
            "unserved_tokens": (routing.experts_per_token() == 0).float().mean(),
            "expert_load_max": load.max() / load.mean(),
            "expert_load_cv": load.std(correction=0) / load.mean(),
        }

    def extra_repr(self) -> str:
        dim, experts = self.router.shape
        return (
            f"dim={dim}, num_experts={experts}, capacity_factor={self.capacity_factor},"
            f" group_size={self.group_size}"
        )

    def noise_sigma(self) -> float:
        """Standard deviation of the noise on the logits."""
        return self.noise_std / self.router.shape[1]

    def _images_per_group(self, batch: int) -> int:
        if self.group_size == 1:
            return 1  # whatever the batch, which torch.export leaves open
        if self.training and batch % self.group_size:
            raise ValueError(
                f"a batch of {batch} images is no multiple of group_size={self.group_size}: set"
                f" group_size to {math.gcd(batch, self.group_size)} or 1, or change the batch"
            )
        return math.gcd(batch, self.group_size)


def images_routed_together(model: nn.Module) -> int:
    """The number of images that batches of `model` are a multiple of, if none is to be routed with
    fewer others than its layers want; 1 where no image depends on another."""
    return math.lcm(*(m.group_size for m in model.modules() if isinstance(m, SparseMoE)))
