"""AdamW with weight decay on kernels only."""

from __future__ import annotations

import torch
from torch import nn

from training.config import OptimizerConfig


def build_optimizer(
    module: nn.Module, no_decay: set[str], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, in two groups.

    Tensors with fewer than two axes and the parameters named in `no_decay` are not decayed.

    Raises:
        ValueError: a name in `no_decay` is no parameter, or nothing is trainable.
    """
    parameters = dict(module.named_parameters())
    unknown = sorted(no_decay - set(parameters))
    if unknown:
        raise ValueError(f"no weight decay was asked for unknown parameters: {unknown[:5]}")
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    plain = {name for name, p in trainable.items() if p.ndim < 2 or name in no_decay}
    decayed = [p for name, p in trainable.items() if name not in plain]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [trainable[name] for name in trainable if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
