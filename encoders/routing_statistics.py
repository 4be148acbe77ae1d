"""What routers do, in numbers: one path for scalars of any routed layer, in training or after.

A routed layer takes part when it has `route(x)`. `RoutingWeights` (Soft MoE, its ablations and the
fixed routers), `SparseRouting`, and plain weights (B, M, E) of mixtures each have their figures.

Shape legend: B images, M tokens, S slots, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from encoders.routed_layer import RoutedLayer
from encoders.soft_moe import RoutingWeights
from encoders.sparse_base import SparseRouting

# A token that gives the slots less than this part of the average token's S / M is hardly processed.
# With as many slots as tokens it is the share of the paper's appendix G.
STARVED_TOKEN = 0.25


class RoutingMonitor:
    """Scalars of all routed layers of `model`, from forward passes that happen anyway.

    The layers are found once. A pass that is not watched costs nothing; a watched one costs each
    layer a second run of its router and a few sums, without gradients and without waiting for the
    device. The router runs in eval mode, so the figures are those of the clean router and no
    random number is drawn: training goes on as if nobody had watched.

    Watching adds forward hooks. A model that torch.compile has compiled without them skips them, so
    that nothing is recorded, unless `torch._dynamo.config.skip_nnmodule_hook_guards` is False; then
    watched and unwatched passes are compiled apart. Hooks that stay would be copied and saved with
    the model.

    Args:
        model: any module. Names of layers are relative to it, without the final ".mlp".
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name.removesuffix(".mlp"): layer for name, layer in _routers(model).items()}

    @contextmanager
    def watch(self, active: bool = True) -> Iterator[dict[str, Tensor]]:
        """Fill a dict with `routing/<layer>/<figure>`, 0-D on the device, in passes inside."""
        figures: dict[str, Tensor] = {}

        def record(name: str, layer: Any, routing: Any) -> None:
            for key, value in routing_scalars(layer, routing).items():
                figures[f"routing/{name}/{key}"] = value

        with _recording(self._layers if active else {}, record):
            yield figures


@torch.no_grad()
def collect_routing(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Run `model` on a batch and return the routing of every routed layer.

    The model runs in eval mode, so without router noise; afterwards every module is back in the
    mode it had, which matters when one tower is frozen in eval mode and another trains.

    Args:
        model: any module that accepts `images`.
        images: a normalised float batch (B, 3, H, W) on the model's device.

    Returns:
        What each layer's `route` returned, by module name, in the order of execution.

    Raises:
        ValueError: the model has no routed layer.
    """
    layers = _routers(model)
    if not layers:
        raise ValueError("the model has no routed layer: build it with moe_blocks of at least 1")
    routing: dict[str, Any] = {}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with _recording(layers, lambda name, _, found: routing.update({name: found})):
            model(images)
    finally:
        for module, training in modes:
            module.training = training
    return routing


def collect_soft_routing(model: nn.Module, images: Tensor) -> dict[str, RoutingWeights]:
    """`collect_routing` of the layers with slots: Soft MoE, its ablations and the fixed routers.

    Raises:
        ValueError: the model has no such layer.
    """
    routing = soft_only(collect_routing(model, images))
    if not routing:
        raise ValueError("the model has no layer with slots: build it with a soft or fixed router")
    return routing


def soft_only(routing: Mapping[str, Any]) -> dict[str, RoutingWeights]:
    """The layers with slots among what `collect_routing` returned."""
    return {name: found for name, found in routing.items() if isinstance(found, RoutingWeights)}


@torch.no_grad()
def layer_statistics(model: nn.Module, routing: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures (see `routing_scalars`) of what `collect_routing` returned, by module name.

    One transfer from the device.
    """
    scalars = {
        name: routing_scalars(model.get_submodule(name), found) for name, found in routing.items()
    }
    flat = torch.stack([value for layer in scalars.values() for value in layer.values()]).tolist()
    values = iter(flat)
    return {name: {key: next(values) for key in layer} for name, layer in scalars.items()}


def routing_scalars(layer: Any, routing: Any) -> dict[str, Tensor]:
    """Figures of one layer from what its `route` returned, 0-D tensors on the device.

    Those of `soft_scalars` for layers with slots, of `SparseMoE.routing_scalars` for sparse ones,
    and for mixtures, whose tokens weigh experts and see all of them, those of `soft_scalars` that
    look at combine weights.
    """
    if isinstance(routing, SparseRouting):
        return layer.routing_scalars(routing)
    if isinstance(routing, RoutingWeights):
        return soft_scalars(routing, layer.num_experts)
    return _combine_scalars(routing, routing.shape[2])


@torch.no_grad()
def soft_scalars(weights: RoutingWeights, num_experts: int) -> dict[str, Tensor]:
    """Figures of a layer with slots, 0-D tensors on the device.

    Args:
        weights: routing of one layer, (B, M, S).
        num_experts: E; slot s belongs to expert s // (S / E).

    Returns:
        `dispatch_max`, `combine_max`: mean of the largest weight of a slot, of a token;
        `dispatch_entropy`, `combine_entropy`: mean entropy, 1 for uniform and 0 for one-hot;
        `expert_importance_cv`: standard deviation over mean of the combine weight each expert
        collects, 0 when balanced;
        `starved_tokens`: share of tokens whose dispatch weights sum to less than a quarter of the
        average token's, S / M.

    Raises:
        ValueError: S is no multiple of `num_experts`.
    """
    dispatch = weights.dispatch
    tokens, slots = dispatch.shape[1:]
    if num_experts < 1 or slots % num_experts:
        raise ValueError(
            f"{slots} slots cannot belong to {num_experts} experts: pass the layer's E"
        )
    return {
        "dispatch_max": dispatch.amax(1).mean(),
        "dispatch_entropy": relative_entropy(dispatch, 1).mean(),
        "starved_tokens": (dispatch.sum(2) < STARVED_TOKEN * slots / tokens).float().mean(),
        **_combine_scalars(weights.combine, num_experts),
    }


def routing_statistics(weights: RoutingWeights, num_experts: int) -> dict[str, float]:
    """`soft_scalars` as numbers; one transfer from the device."""
    values = soft_scalars(weights, num_experts)
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def relative_entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy along `dim` over its maximum, log(size); 1 where there is only one choice."""
    size = weights.shape[dim]
    entropy = torch.special.entr(weights).sum(dim)
    return entropy / math.log(size) if size > 1 else torch.ones_like(entropy)


def _combine_scalars(combine: Tensor, num_experts: int) -> dict[str, Tensor]:
    importance = combine.sum((0, 1)).view(num_experts, -1).sum(1)
    return {
        "combine_max": combine.amax(2).mean(),
        "combine_entropy": relative_entropy(combine, 2).mean(),
        "expert_importance_cv": importance.std(correction=0) / importance.mean(),
    }


def _routers(model: nn.Module) -> dict[str, Any]:
    """Routed layers with a router that can be asked, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedLayer) and callable(getattr(module, "route", None))
    }


@contextmanager
def _recording(layers: dict[str, Any], record: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call `record(name, layer, routing)` whenever a layer has run."""
    handles = []
    try:
        for name, layer in layers.items():

            @torch.no_grad()
            def ask(layer: Any, args: tuple[Any, ...], _: Any, name: str = name) -> None:
                training, layer.training = layer.training, False  # so without noise
                try:
                    record(name, layer, layer.route(args[0]))
                finally:
                    layer.training = training

            handles.append(layer.register_forward_hook(ask))
        yield
    finally:
        for handle in handles:
            handle.remove()
