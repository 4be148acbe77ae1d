"""Sparse MoE layers, the baselines of the Soft MoE paper: Tokens Choice and Experts Choice.

In Tokens Choice every token picks its best experts and is dropped by those whose buffer is full
(V-MoE, arXiv 2106.05974); in Experts Choice every expert picks its best tokens (arXiv
2202.09368). Assignments, tie rules and losses follow google-research/vmoe (`vmoe/moe.py`,
`vmoe/nn/routing.py`).

Shape legend: G groups, S tokens per group, E experts, C capacity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Unpack

import torch
from torch import Tensor

from encoders.auxiliary_losses import gshard_loss, importance_loss, load_loss, z_loss
from encoders.sparse_base import SparseMoE, SparseOptions, SparseRouting

# What Tokens Choice rounds capacities up to a multiple of, unless told otherwise.
CAPACITY_MULTIPLE = 4
# Weights of its auxiliary losses, likewise.
LOSS_WEIGHTS = {"importance": 0.005, "load": 0.005, "gshard": 0.0, "z": 0.0}


class TokensChoice(SparseMoE):
    """Every token goes to its `top_k` experts, as far as their buffers have room.

    The combine weights are the gates of the chosen experts, not renormalised. Buffers fill with
    all first choices before any second one, and a choice that finds its buffer full is dropped.
    C = ceil(S * top_k * capacity_factor / E), rounded up to a multiple. With more than one image
    per group, what becomes of an image depends on its batch mates.

    Defaults are those of the Soft MoE paper's baseline (one expert per token, batch priority,
    groups of 8 images) with the loss weights of the released V-MoE configurations.

    Args:
        dim: token width d.
        num_experts: E.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        top_k: experts that a token chooses.
        batch_priority: tokens with the largest first gate fill the buffers first (batch priority
            routing); otherwise the order within the group decides.
        loss_weights: weights of the terms "importance", "load", "gshard" and "z" of
            `encoders.auxiliary_losses`, in place of those in `LOSS_WEIGHTS`; 0 leaves a term out.
            Importance and z see the clean logits, gshard the noisy ones; load is defined by the
            noise and left out where there is none.
        **options: of `SparseMoE`; capacities are multiples of 4 and groups have 8 images unless
            told otherwise.

    Raises:
        ValueError: a setting is out of range or a loss unknown; see also `SparseMoE`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        top_k: int = 1,
        batch_priority: bool = True,
        loss_weights: Mapping[str, float] | None = None,
        **options: Unpack[SparseOptions],
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be 1 to num_experts={num_experts}, got {top_k}")
        defaults: SparseOptions = {"capacity_multiple": CAPACITY_MULTIPLE, "group_size": 8}
        super().__init__(dim, num_experts, hidden_dim, **(defaults | options))
        self.top_k, self.batch_priority = top_k, batch_priority
        self.loss_weights = {**LOSS_WEIGHTS, **(loss_weights or {})}
        for name, weight in self.loss_weights.items():
            if name not in LOSS_WEIGHTS or weight < 0:
                raise ValueError(
                    f"loss_weights['{name}']={weight}: choose from {', '.join(LOSS_WEIGHTS)}, and"
                    " weights of at least 0"
                )

    def capacity(self, tokens: int) -> int:
        needed = math.ceil(tokens * self.top_k * self.capacity_factor / self.router.shape[1])
        return needed + -needed % self.capacity_multiple

    def assign(self, gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Fill the buffers; of equal gates, the lowest expert and the earliest token win."""
        groups, tokens, experts = gates.shape
        chosen = self._choose(gates)
        order = None
        if self.batch_priority:
            order = gates.amax(-1).argsort(dim=-1, descending=True, stable=True)
            chosen = chosen.gather(1, order.unsqueeze(-1).expand_as(chosen))
        # One queue per group, first choices first. Sorted by expert, an expert's buffer is the
        # head of its run.
        queue, place = chosen.transpose(1, 2).flatten(1).sort(dim=-1, stable=True)
        ids = torch.arange(experts, device=gates.device).repeat(groups, 1)
        start = torch.searchsorted(queue, ids)
        length = torch.searchsorted(queue, ids, right=True) - start
        row = torch.arange(capacity, device=gates.device)
        index = (start.unsqueeze(-1) + row).clamp_max(queue.shape[1] - 1).flatten(1)
        token = place.gather(1, index) % tokens
        if order is not None:
            token = order.gather(1, token)
        return token.view(groups, experts, capacity), row < length.unsqueeze(-1)

    def _choose(self, gates: Tensor) -> Tensor:
        """The top_k experts of every token, (G, S, K), best first.

        argmax promises the first of equal values, which topk does not.
        """
        choices = [gates.argmax(-1, keepdim=True)]
        while len(choices) < self.top_k:
            gates = gates.scatter(-1, choices[-1], -1.0)
            choices.append(gates.argmax(-1, keepdim=True))
        return torch.cat(choices, -1)

    def auxiliary_terms(self, routing: SparseRouting) -> dict[str, Tensor]:
        """Weighted importance, load, gshard and z losses, as far as their weights are positive."""
        clean, logits = routing.clean_logits, routing.logits
        weights = {name: weight for name, weight in self.loss_weights.items() if weight > 0}
        if self.noise_std == 0:
            weights.pop("load", None)
        losses = {
            "importance": lambda: importance_loss(clean.softmax(-1)),
            "load": lambda: load_loss(clean, logits, self.top_k, self.noise_sigma()),
            "gshard": lambda: gshard_loss(routing.gates),
            "z": lambda: z_loss(clean),
        }
        with torch.autocast(clean.device.type, enabled=False):
            return {name: weight * losses[name]() for name, weight in weights.items()}

    @torch.no_grad()
    def routing_scalars(self, routing: SparseRouting) -> dict[str, Tensor]:
        """As `SparseMoE.routing_scalars`, and `dropped_assignments`: share of choices dropped."""
        groups, tokens, _ = routing.gates.shape
        kept = routing.filled.sum() / (groups * tokens * self.top_k)
        return {"dropped_assignments": 1 - kept, **super().routing_scalars(routing)}


class ExpertsChoice(SparseMoE):
    """Every expert takes the C tokens of a group with the largest gates for it.

    Gates are softmaxed over experts; the combine weight is the gate. Every buffer is full, no
    auxiliary loss is needed, and a token may get no expert or many. C = round(S * capacity_factor
    / E), halves to even, rounded up to a multiple and at most S. With one image per group, the
    default, an image never depends on its batch mates.

    Arguments as `SparseMoE`.
    """

    def capacity(self, tokens: int) -> int:
        # Under torch.jit.trace, sizes are tensors, which `round` does not take.
        tokens, experts = int(tokens), int(self.router.shape[1])
        needed = round(tokens * self.capacity_factor / experts)
        if needed < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} leaves {experts} experts no row for groups"
                f" of {tokens} tokens: use at least {experts / tokens:.3g}, or larger groups"
            )
        return min(tokens, needed + -needed % self.capacity_multiple)

    def assign(self, gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Fill the buffers, best first; of equal gates, the earliest token wins."""
        columns = gates.transpose(1, 2)
        # Doubles leave no bits for the place; torch.jit.trace cannot record a view as integers, and
        # ONNX has none.
        recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if gates.dtype == torch.float64 or recorded:
            order = columns.argsort(dim=-1, descending=True, stable=True)
            token = order[..., :capacity]
            return token, torch.ones_like(token, dtype=torch.bool)
        # topk is cheaper than a stable sort, but does not say which of equal values it takes.
        # Gates are not negative, so their bits order as they do; the place breaks ties.
        bits = columns.float().contiguous().view(torch.int32).long()
        place = torch.arange(gates.shape[1] - 1, -1, -1, device=gates.device)
        token = ((bits << 32) + place).topk(capacity, dim=-1).indices
        return token, torch.ones_like(token, dtype=torch.bool)

    @torch.no_grad()
    def routing_scalars(self, routing: SparseRouting) -> dict[str, Tensor]:
        """As `SparseMoE.routing_scalars`, and `served_by_<n>`, n = 2, 4, 8 ... up to E.

        The last are the shares of tokens that at least n experts process.
        """
        served = routing.experts_per_token()
        steps = [2**power for power in range(1, self.router.shape[1].bit_length())]
        shares = {f"served_by_{step}": (served >= step).float().mean() for step in steps}
        return {**super().routing_scalars(routing), **shares}
