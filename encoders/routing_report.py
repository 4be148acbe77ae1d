"""What the Soft MoE router does, to look at: slot maps (see `encoders.routing_statistics`).

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
from matplotlib.figure import Figure, FigureBase
from torch import Tensor, nn

from encoders.routing_statistics import relative_entropy

# Pale at the low end, so that weak patches fade into the grey picture below.
HEAT = "YlOrRd"


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
    They are returned in the order of their numbers.

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
    score = 1 - relative_entropy(weights, 1).mean(0)
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
    return sorted(chosen)


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
    width, height = 1.2 * (len(slots) + 1) + 0.9, 1.2 * len(images) + 0.35
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    fill_slot_maps(figure, images, dispatch, slots, slots_per_expert)
    if path is not None:
        figure.savefig(path)
    return figure


def fill_slot_maps(
    canvas: FigureBase,
    images: Tensor,
    dispatch: Tensor,
    slots: Sequence[int],
    slots_per_expert: int = 1,
) -> None:
    """Draw the slot maps into a figure or a part of one; see `draw_slot_maps`.

    Args:
        canvas: where to draw.
        images: uint8 (N, 3, H, W), at the model's size.
        dispatch: (N, M, S), of the same images.
        slots: which of the S to draw, a column each.
        slots_per_expert: P, to tell the experts of the slots.

    Raises:
        ValueError: shapes that do not fit one another.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {images.shape}")
    if len(images) != len(dispatch):
        raise ValueError(f"{len(images)} images but dispatch weights of {len(dispatch)}")
    tokens = dispatch.shape[1]
    grid = patch_grid(images.shape[2], images.shape[3], tokens)
    heat = slot_maps(dispatch.detach().float().cpu(), grid)[:, list(slots)] * tokens
    # A few very hot patches must not bleach the rest; the pointed colour bar says so.
    top = max(1.1, heat.flatten().quantile(0.99).item())
    norm = LogNorm(1.0, top, clip=True)
    pictures = images.cpu().permute(0, 2, 3, 1)
    rows, columns = len(images), len(slots) + 1
    axes = canvas.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        _show(axes[row, 0], pictures[row])
        for column in range(1, columns):
            _overlay(axes[row, column], pictures[row], heat[row, column - 1], norm)
    axes[0, 0].set_title("image", fontsize=7)
    for axis, slot in zip(axes[0, 1:], slots, strict=True):
        axis.set_title(f"slot {slot} · expert {slot // slots_per_expert}", fontsize=7)
    _add_scale(canvas, axes, top)


def patch_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """Rows and columns of square patches, `tokens` in all, on a picture of height x width pixels.

    Raises:
        ValueError: the tokens are no such grid.
    """
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


def _add_scale(canvas: FigureBase, axes: Any, top: float) -> None:
    """A colour bar labelled in multiples of the uniform weight."""
    bar = canvas.colorbar(
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
