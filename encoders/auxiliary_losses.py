"""Auxiliary losses of sparse routers: how they are computed, and how they reach the training loss.

A routed layer offers weighted terms in `RoutedLayer.auxiliary_losses` during a forward pass in
training. An objective calls `add_auxiliary_losses` right after the forward pass of its model.

The formulas are those of google-research/vmoe (`vmoe/nn/routing.py`; V-MoE paper, arXiv
2106.05974, appendix A) and, for the z-loss, of ST-MoE (arXiv 2202.08906, equation 5). Each is
computed per group and averaged over groups. Shape legend: G groups, S tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from encoders.experts import ExpertMLP
from encoders.routed_layer import RoutedLayer


def importance_loss(gates: Tensor) -> Tensor:
    """Squared coefficient of variation over experts of the summed gates (G, S, E)."""
    return _squared_variation(gates.sum(1)).mean()


def load_loss(clean_logits: Tensor, noisy_logits: Tensor, top_k: int, sigma: float) -> Tensor:
    """Squared coefficient of variation over experts of the expected load.

    The expected load of an expert is the probability, averaged over tokens, that its clean logit
    with fresh noise exceeds the token's `top_k`-th largest noisy logit. Gradients flow through
    that threshold too.

    Args:
        clean_logits: (G, S, E), before the noise.
        noisy_logits: (G, S, E), after the noise.
        top_k: experts that a token chooses.
        sigma: standard deviation of the noise, positive.
    """
    threshold = noisy_logits.topk(top_k, dim=-1).values[..., -1:]
    chosen = torch.special.ndtr((clean_logits - threshold) / sigma)
    return _squared_variation(chosen.mean(1)).mean()


def gshard_loss(gates: Tensor) -> Tensor:
    """GShard (arXiv 2006.16668, algorithm 1): E * sum of mean gate times share of first choices.

    Gates are (G, S, E); the loss is 1 when balanced. Only the mean gates carry a gradient.
    """
    groups, tokens, experts = gates.shape
    first = gates.argmax(-1)
    share = gates.new_zeros(groups, experts).scatter_add_(
        1, first, gates.new_full((1, 1), 1 / tokens).expand_as(first)
    )
    return (gates.mean(1) * share).sum(-1).mean() * experts


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared logarithm of the softmax normaliser of logits (G, S, E); keeps them small."""
    return logits.logsumexp(-1).square().mean()


def _squared_variation(x: Tensor) -> Tensor:
    """(population std / mean)^2 along the last axis."""
    return x.var(-1, correction=0) / x.mean(-1).square()


def routed_layers(model: nn.Module) -> tuple[RoutedLayer, ...]:
    """All routed layers of `model`, in the order of `model.modules()`."""
    return tuple(module for module in model.modules() if isinstance(module, RoutedLayer))


def routed_parameters(model: nn.Module) -> dict[str, set[str]]:
    """Names of the parameters of routed layers, by kind.

    Returns:
        "experts": kernels and biases of all banks; "phi": what the routers know by, Soft MoE's Phi,
        or the kernels and embeddings in its place; "scale": their parameters without axes.
    """
    found: dict[str, set[str]] = {"experts": set(), "phi": set(), "scale": set()}
    for prefix, layer in model.named_modules():
        if isinstance(layer, RoutedLayer):
            banks = [module for module in layer.modules() if isinstance(module, ExpertMLP)]
            experts = {parameter for bank in banks for parameter in bank.parameters()}
            for name, parameter in layer.named_parameters(prefix):
                own = "phi" if parameter.ndim else "scale"
                found["experts" if parameter in experts else own].add(name)
    return found


def collect_auxiliary_losses(model: nn.Module | Iterable[RoutedLayer]) -> dict[str, Tensor]:
    """Take the terms of the latest forward pass: name to the sum over layers, 0-D.

    The layers give the terms away, so that no call ever returns the same term again.

    Args:
        model: a model, or the layers found once by `routed_layers`, which spares the walk.

    Raises:
        RuntimeError: a term has lost the gradient of a router that is trained.
    """
    sums: dict[str, Tensor] = {}
    for layer in routed_layers(model) if isinstance(model, nn.Module) else model:
        terms, layer.auxiliary_losses = layer.auxiliary_losses, {}
        for name, term in terms.items():
            if torch.is_grad_enabled() and not term.requires_grad and _trains(layer):
                raise RuntimeError(
                    f"the auxiliary loss '{name}' has no gradient: collect it under no_grad if the"
                    " forward pass ran there, and use checkpointing with use_reentrant=False"
                )
            sums[name] = sums[name] + term if name in sums else term
    return sums


def add_auxiliary_losses(
    loss: Tensor, metrics: dict[str, Tensor], layers: Iterable[RoutedLayer]
) -> Tensor:
    """The loss plus all collected terms; `metrics` gets each, detached, as `auxiliary/<name>`."""
    for name, term in collect_auxiliary_losses(layers).items():
        metrics[f"auxiliary/{name}"] = term.detach()
        loss = loss + term
    return loss


def _trains(layer: RoutedLayer) -> bool:
    """Whether the layer's own parameters, those of its router, are trained."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
