"""AdamW with weight decay on kernels only."""

from __future__ import annotations

import re

import torch
from torch import nn

from training.config import OptimizerConfig


def build_optimizer(
    module: nn.Module, no_decay: set[str], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`, grouped by decay and learning-rate factor.

    Tensors with fewer than two axes and the parameters named in `no_decay` are not decayed.

    Raises:
        ValueError: a name in `no_decay` is no parameter, nothing is trainable, or a learning-rate
            factor is unusable.
    """
    parameters = dict(module.named_parameters())
    unknown = sorted(no_decay - set(parameters))
    if unknown:
        raise ValueError(f"no weight decay was asked for unknown parameters: {unknown[:5]}")
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    plain = {name for name, p in trainable.items() if p.ndim < 2 or name in no_decay}
    factors = learning_rate_factors(list(trainable), config.lr_factors)
    groups: dict[tuple[bool, float], list[torch.Tensor]] = {}
    for name, parameter in trainable.items():
        groups.setdefault((name not in plain, factors[name]), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_factor": factor,
            }
            for (decayed, factor), parameters in sorted(groups.items(), key=lambda g: g[0])[::-1]
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate_factors(names: list[str], rules: dict[str, float]) -> dict[str, float]:
    """Factor of each parameter; names are those of the model, without the objective's prefix.

    Raises:
        ValueError: an expression that is invalid or matches nothing, or a factor below 0.
    """
    factors = dict.fromkeys(names, 1.0)
    unused = set(rules)
    for name in names:
        for expression, factor in rules.items():
            try:
                found = re.fullmatch(expression, name.removeprefix("model."))
            except re.error as error:
                raise ValueError(f"optimizer.lr_factors '{expression}': {error}") from error
            if factor < 0:
                raise ValueError(f"optimizer.lr_factors '{expression}' must not be negative")
            if found:
                factors[name] = factor
                unused.discard(expression)
                break
    if unused:
        raise ValueError(f"optimizer.lr_factors match no trained parameter: {sorted(unused)}")
    return factors
