"""What the Soft MoE router does: scalars to log and slot maps to look at.

Shape legend: B or N images, M tokens, S slots, E experts, h x w the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from encoders.soft_moe import RoutingWeights, SoftMoE

# A token that gives the slots less than this part of the average token's S / M is hardly processed.
# With as many slots as tokens it is the share of the paper's appendix G.
STARVED_TOKEN = 0.25
# Pale at the low end, so that weak patches fade into the grey picture below.
HEAT = "YlOrRd"


@torch.no_grad()
def collect_routing(model: nn.Module, images: Tensor) -> dict[str, RoutingWeights]:
    """Run `model` on a batch and return the routing of every Soft MoE layer.

    The model runs in eval mode, so without router noise; afterwards every module is back in the
    mode it had, which matters when one tower is frozen in eval mode and another trains.

    Args:
        model: any module that holds `SoftMoE` layers and accepts `images`.
        images: a normalised float batch (B, 3, H, W) on the model's device.

    Returns:
        Routing weights (B, M, S) by module name, in the order of execution.

    Raises:
        ValueError: the model has no Soft MoE layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SoftMoE)}
    if not layers:
        raise ValueError("the model has no SoftMoE layer: build it with moe_blocks of at least 1")
    routing: dict[str, RoutingWeights] = {}
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for name, layer in layers.items():

            def record(module: SoftMoE, args: tuple[Tensor, ...], _: Any, name: str = name) -> None:
                routing[name] = module.route(args[0])

            handles.append(layer.register_forward_hook(record))
        model.eval()
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return routing


@torch.no_grad()
def routing_statistics(weights: RoutingWeights, num_experts: int) -> dict[str, float]:
    """Cheap scalars about one layer; one transfer from the device.

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
    _, dispatch, combine = weights
    tokens, slots = dispatch.shape[1:]
    if num_experts < 1 or slots % num_experts:
        raise ValueError(
            f"{slots} slots cannot belong to {num_experts} experts: pass the layer's E"
        )
    importance = combine.sum((0, 1)).view(num_experts, -1).sum(1)
    values = {
        "dispatch_max": dispatch.amax(1).mean(),
        "combine_max": combine.amax(2).mean(),
        "dispatch_entropy": _relative_entropy(dispatch, 1).mean(),
        "combine_entropy": _relative_entropy(combine, 2).mean(),
        "expert_importance_cv": importance.std(correction=0) / importance.mean(),
        "starved_tokens": (dispatch.sum(2) < STARVED_TOKEN * slots / tokens).float().mean(),
    }
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def slot_maps(dispatch: Tensor, grid: tuple[int, int]) -> Tensor:
    """Dispatch weights (B, M, S) as one picture per slot, (B, S, h, w).

    Raises:
        ValueError: the grid does not have M cells.
    """
    batch, tokens, slots = dispatch.shape
    height, width = grid
    if height * width != tokens:
        raise ValueError(f"grid {height}x{width} does not hold {tokens} tokens")
    return dispatch.transpose(1, 2).reshape(batch, slots, height, width)


def choose_slots(dispatch: Tensor, count: int) -> list[int]:
    """Pick slots that look at few places, and at different ones.

    Greedy and deterministic: the next slot has the largest product of concentration (1 minus the
    relative entropy of its map, averaged over images) and dissimilarity (1 minus the largest
    cosine to a chosen slot, of the maps' departures from uniform). The lowest index wins a tie.

    Args:
        dispatch: (B, M, S).
        count: how many, 1 to S.

    Raises:
        ValueError: `count` is out of range.
    """
    tokens, slots = dispatch.shape[1:]
    if not 1 <= count <= slots:
        raise ValueError(f"count={count}: choose 1 to {slots} slots")
    weights = dispatch.detach().double().cpu()
    score = 1 - _relative_entropy(weights, 1).mean(0)
    maps = (weights - 1 / tokens).permute(2, 0, 1).flatten(1)
    maps = nn.functional.normalize(maps, dim=1)
    similarity = (maps @ maps.T).clamp_min(0)
    nearest = torch.zeros(slots, dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(count):
        value = score * (1 - nearest)
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
        nearest = torch.maximum(nearest, similarity[chosen[-1]])
    return chosen


def draw_slot_maps(
    images: Tensor,
    dispatch: Tensor,
    slots: Sequence[int],
    path: str | Path | None = None,
    *,
    slots_per_expert: int = 1,
) -> Figure:
    """Draw where slots take their input from: one row per image, one column per slot.

    Colour is the dispatch weight in multiples of the uniform weight 1/M, on one logarithmic scale
    for the whole figure that ends at the 99th percentile; patches at or below uniform stay grey.

    Args:
        images: uint8 (N, 3, H, W), as the model saw them before normalisation.
        dispatch: (N, M, S), tokens in row order over square patches.
        slots: the slots to draw, see `choose_slots`.
        path: where to save the figure (PNG, PDF or SVG by suffix); None to only return it.
        slots_per_expert: P, for the titles.

    Raises:
        ValueError: images are no uint8 pictures, numbers of images differ, or the tokens are no
            grid of square patches.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {images.shape}")
    if len(images) != len(dispatch):
        raise ValueError(f"{len(images)} images but dispatch weights of {len(dispatch)}")
    tokens = dispatch.shape[1]
    grid = _patch_grid(images.shape[2], images.shape[3], tokens)
    heat = slot_maps(dispatch.detach().float().cpu(), grid)[:, list(slots)] * tokens
    # A few very hot patches must not bleach the rest; the pointed colour bar says so.
    top = max(1.1, heat.flatten().quantile(0.99).item())
    norm = LogNorm(1.0, top, clip=True)
    pictures = images.cpu().permute(0, 2, 3, 1)
    rows, columns = len(images), len(slots) + 1
    width, height = 1.2 * columns + 0.9, 1.2 * rows + 0.35
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        _show(axes[row, 0], pictures[row])
        for column in range(1, columns):
            _overlay(axes[row, column], pictures[row], heat[row, column - 1], norm)
    axes[0, 0].set_title("image", fontsize=7)
    for axis, slot in zip(axes[0, 1:], slots, strict=True):
        axis.set_title(f"slot {slot} · expert {slot // slots_per_expert}", fontsize=7)
    _add_scale(figure, axes, top)
    if path is not None:
        figure.savefig(path)
    return figure


def _relative_entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy along `dim` over its maximum, log(size); 1 where there is only one choice."""
    size = weights.shape[dim]
    entropy = torch.special.entr(weights).sum(dim)
    return entropy / math.log(size) if size > 1 else torch.ones_like(entropy)


def _patch_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    patch = math.sqrt(height * width / tokens)
    grid = round(height / patch), round(width / patch)
    if grid[0] * grid[1] != tokens or height * grid[1] != width * grid[0]:
        raise ValueError(
            f"{tokens} tokens are no grid of square patches on {height}x{width} pixels: leave "
            "class and register tokens out, and pass the images at the model's size"
        )
    return grid


def _show(axis: Axes, picture: Tensor, **options: Any) -> None:
    axis.imshow(picture.numpy(), **options)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="0.85", linewidth=0.5)


def _overlay(axis: Axes, picture: Tensor, heat: Tensor, norm: LogNorm) -> None:
    """The picture in pale grey, and over it the heat, the more opaque the hotter."""
    grey = picture.float() @ torch.tensor([0.299, 0.587, 0.114])
    _show(axis, 110 + 0.57 * grey, cmap="gray", vmin=0, vmax=255)
    height, width = grey.shape
    axis.imshow(
        heat.numpy(),
        cmap=HEAT,
        norm=norm,
        alpha=0.75 * norm(heat.numpy()).filled(0.0) ** 0.5,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
    )


def _add_scale(figure: Figure, axes: Any, top: float) -> None:
    """A colour bar labelled in multiples of the uniform weight."""
    bar = figure.colorbar(
        ScalarMappable(LogNorm(1.0, top), HEAT),
        ax=axes,
        aspect=20,
        pad=0.02,
        shrink=0.6,
        extend="max",
    )
    ticks = [1.0, math.sqrt(top), top]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}x" for tick in ticks], fontsize=6)
    bar.minorticks_off()
    bar.set_label("dispatch weight, times uniform", fontsize=6)
    bar.outline.set_visible(False)
