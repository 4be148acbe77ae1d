"""Soft mixtures in which every expert runs on every token and a softmax weighs the results.

Tutorials often call this a soft MoE. It is fully differentiable and needs no balancing loss, but it
costs E times a dense MLP of the same hidden width, whereas Soft MoE (`encoders.soft_moe`) costs
slots / tokens times one: the natural upper baseline in compute.

Shape legend: B images, M tokens, d width, E experts, G groups of experts.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.experts import ExpertMLP
from encoders.routed_layer import INDEPENDENT, ExpertOptions, Placement, RoutedLayer
from encoders.temperature import TemperatureSettings, build_temperature

RouterKind = Literal["embedding", "query", "mlp"]
Weighting = Literal["outputs", "inputs_and_outputs"]

LAYER_NORM_EPS = 1e-6  # that of the vision transformer around it


class EmbeddingScores(nn.Module):
    """Inner products of tokens (..., d) with n trained vectors: (..., n). N(0, 0.02) at first."""

    def __init__(self, dim: int, num_scores: int, **place: Unpack[Placement]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num_scores, dim, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.to(x.dtype))


class QueryScores(nn.Module):
    """Inner products of n trained vectors with W_q x, W_q (d, d) Xavier uniform without bias."""

    def __init__(self, dim: int, num_scores: int, **place: Unpack[Placement]) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False, **place)
        self.keys = EmbeddingScores(dim, num_scores, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.query.weight)
        self.keys.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.keys(F.linear(x, self.query.weight.to(x.dtype)))


class MLPScores(nn.Module):
    """W_2 silu(W_1 x) with W_1 (d, d) and W_2 (n, d), both Xavier uniform without bias."""

    def __init__(self, dim: int, num_scores: int, **place: Unpack[Placement]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim, bias=False, **place)
        self.fc2 = nn.Linear(dim, num_scores, bias=False, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.fc1.weight.to(x.dtype)))
        return F.linear(hidden, self.fc2.weight.to(x.dtype))


class ResidualExperts(nn.Module):
    """Experts LayerNorm(x + MLP(x)), each with a norm of its own: (E, C, d) to (E, C, d)."""

    def __init__(self, mlps: ExpertMLP) -> None:
        super().__init__()
        self.mlps = mlps
        self.norm_weight = nn.Parameter(torch.empty_like(mlps.fc2_bias))
        self.norm_bias = nn.Parameter(torch.empty_like(mlps.fc2_bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.layer_norm(x + self.mlps(x), x.shape[-1:], eps=LAYER_NORM_EPS)
        return torch.addcmul(self.norm_bias.unsqueeze(1), unit, self.norm_weight.unsqueeze(1))


SCORES = {"embedding": EmbeddingScores, "query": QueryScores, "mlp": MLPScores}


class Mixture(RoutedLayer):
    """What the mixtures share: all experts on all tokens of (B, M, d), and the weighted sum.

    With weights w (non-negative, sum 1 over experts) and experts f, a token x becomes
    sum_e w_e f_e(x), or sum_e w_e f_e(w_e x) with weighting "inputs_and_outputs". A residual expert
    is LayerNorm(x + MLP(x)), with a norm of its own. Router and softmax run in float32 even under
    autocast. Subclasses say where the weights come from.

    Cost: E times a dense MLP of the same hidden width, in every form; see `expert_flops_ratio`.

    Args:
        dim: token width d.
        num_experts: E.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        router: how tokens are scored: "embedding", "query" (on W_q x), or "mlp".
        weighting: what the weights multiply: "outputs", or "inputs_and_outputs" of the experts.
        temperature: T in softmax(scores / T): a number, "learned", or a schedule; see
            `encoders.temperature.build_temperature`.
        residual_experts: experts are LayerNorm(x + MLP(x)).
        **experts: further options of `RoutedLayer`; experts start different unless told otherwise.

    Raises:
        ValueError: a size or temperature is not positive, or an unknown router or weighting.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        router: RouterKind = "embedding",
        weighting: Weighting = "outputs",
        temperature: TemperatureSettings = 1.0,
        residual_experts: bool = False,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, **(INDEPENDENT | experts))
        if router not in SCORES:
            raise ValueError(f"router {router!r}: choose one of {', '.join(SCORES)}")
        if weighting not in ("outputs", "inputs_and_outputs"):
            raise ValueError(f"weighting {weighting!r}: choose 'outputs' or 'inputs_and_outputs'")
        self.weights_inputs = weighting == "inputs_and_outputs"
        kernel = self.experts.fc1_weight
        if residual_experts:
            self.experts = ResidualExperts(self.experts)
        self.scores = SCORES[router](dim, num_experts, device=kernel.device, dtype=kernel.dtype)
        self.temperature = build_temperature(temperature, kernel.device)

    def init_weights(self) -> None:
        """Draw the router again and reset the temperature; the experts initialise themselves."""
        self.scores.reset_parameters()
        self.temperature.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names, relative to this layer, that an optimizer must not decay.

        Expert embeddings and temperatures; the kernels of a query or MLP router are decayed.
        """
        endings = ("embedding", "log_value", "norm_weight", "norm_bias", "fc1_bias", "fc2_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def expert_flops_ratio(self) -> float:
        """FLOPs of the experts over those of one dense MLP of their hidden width: E."""
        return float(self.num_experts)

    @abstractmethod
    def weigh(self, x: Tensor) -> Tensor:
        """Weights (B, M or 1, E) of tokens (B, M, d), in the dtype of `x`."""

    def route(self, x: Tensor) -> Tensor:
        """Router only: tokens (B, M, d) to weights (B, M, E), float32 or wider, sum 1 over E."""
        with torch.autocast(x.device.type, enabled=False):
            weights = self.weigh(x.to(torch.promote_types(x.dtype, torch.float32)))
        return weights.expand(*x.shape[:2], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, M, d) to (B, M, d) in the dtype of `x` (or of autocast)."""
        weights = self.route(x)
        rows = x.flatten(0, 1).expand(self.num_experts, -1, -1)  # not a copy
        if self.weights_inputs:
            rows = rows * weights.flatten(0, 1).T.unsqueeze(-1).to(x.dtype)
        outputs = self.experts(rows).unflatten(1, x.shape[:2])
        return torch.einsum("bme,ebmd->bmd", weights.to(outputs.dtype), outputs)

    def extra_repr(self) -> str:
        return f"weighted={'inputs and outputs' if self.weights_inputs else 'outputs'}"


class TokenMixture(Mixture):
    """Every token has its own weights: w = softmax(scores(x) / T). See `Mixture`."""

    def weigh(self, x: Tensor) -> Tensor:
        return self.temperature(self.scores(x)).softmax(-1)


class ImageMixture(Mixture):
    """One weighting per image, from the mean of its tokens and for all of them. See `Mixture`.

    Tutorials call it batch-level; a weighting over the batch would make an image's output depend on
    its batch mates, which is why this one is per image.
    """

    def weigh(self, x: Tensor) -> Tensor:
        return self.temperature(self.scores(x.mean(1, keepdim=True))).softmax(-1)


class HierarchicalMixture(Mixture):
    """G groups of E / G experts: softmax over groups times softmax inside the group. See `Mixture`.

    Expert e belongs to group e // (E / G). With one group, or with one expert per group, this is
    `TokenMixture`.

    Args:
        dim: token width d.
        num_experts: E.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        num_groups: G, a divisor of E.
        group_temperature: T of the softmax over groups, as `temperature`, which is that of the
            softmax inside a group.
        **options: of `Mixture`.

    Raises:
        ValueError: G does not divide E, or what `Mixture` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        num_groups: int,
        group_temperature: TemperatureSettings = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, hidden_dim, **options)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(f"num_groups {num_groups} does not divide num_experts {num_experts}")
        self.num_groups = num_groups
        like = next(self.scores.parameters())
        self.group_scores = type(self.scores)(dim, num_groups, device=like.device, dtype=like.dtype)
        self.group_temperature = build_temperature(group_temperature, like.device)

    def init_weights(self) -> None:
        super().init_weights()
        self.group_scores.reset_parameters()
        self.group_temperature.reset_parameters()

    def weigh(self, x: Tensor) -> Tensor:
        groups = self.group_temperature(self.group_scores(x)).softmax(-1)
        members = self.temperature(self.scores(x)).unflatten(-1, (self.num_groups, -1)).softmax(-1)
        return (groups.unsqueeze(-1) * members).flatten(-2)
