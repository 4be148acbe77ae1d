"""A bank of expert MLPs, held as stacked tensors and run as batched matrix products.

Shape legend: E experts, C rows per expert, d width, h hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from encoders.expert_products import (
    ReusedMemory,
    batched_expert_mlp,
    blocked_expert_mlp,
    can_run_blocked,
)


class ExpertMLP(nn.Module):
    """E two-layer MLPs with tanh-approximated GELU; expert e only ever sees row block e.

    Parameters are `fc1_weight` (E, d, h), `fc1_bias` (E, h), `fc2_weight` (E, h, d) and
    `fc2_bias` (E, d). One batched product per layer replaces a loop over experts, so the number
    of launched operators does not depend on E. In eager mode on a CPU the same products run over
    cache-sized blocks of experts (`encoders/expert_products.py`).

    Initialisation follows google-research/vmoe (`vmoe/nn/vit_moe.py`): Xavier uniform with the
    fans of a single expert, biases N(0, 1e-6), and all experts equal unless `identical_init` is
    false (the Soft MoE router breaks the symmetry; uniform routing needs independent experts).

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        identical_init: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_experts = num_experts
        self.identical_init = identical_init
        kwargs = {"device": device, "dtype": dtype}
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, dim, hidden_dim, **kwargs))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden_dim, **kwargs))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, hidden_dim, dim, **kwargs))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, dim, **kwargs))
        self.dropout = nn.Dropout(dropout)
        self._gradient_memory = (ReusedMemory(), ReusedMemory())
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh parameters; timm calls this by name when it initialises a model."""
        for weight in (self.fc1_weight, self.fc2_weight):
            for expert in weight[:1] if self.identical_init else weight:
                nn.init.xavier_uniform_(expert)
        for bias in (self.fc1_bias, self.fc2_bias):
            nn.init.normal_(bias[:1] if self.identical_init else bias, std=1e-6)
        if self.identical_init:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(parameter[:1].expand_as(parameter).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (E, C, d) to (E, C, d).

        Raises:
            ValueError: `x` has another number of row blocks than the bank has experts.
        """
        bank = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        # A size that is being traced is no number, and comparing it is warned of.
        if not torch.jit.is_tracing() and x.shape[0] != bank[0].shape[0]:
            raise ValueError(
                f"x of shape {tuple(x.shape)} must have one block of rows for each of"
                f" {bank[0].shape[0]} experts: (experts, rows, {bank[0].shape[1]})"
            )
        dropout = self.dropout.p if self.training else 0.0
        if dropout == 0 and can_run_blocked(x, bank):
            return blocked_expert_mlp(x, bank, self._gradient_memory)
        return batched_expert_mlp(x, *bank, dropout)

    def extra_repr(self) -> str:
        experts, dim, hidden = self.fc1_weight.shape
        return f"num_experts={experts}, dim={dim}, hidden_dim={hidden}"
