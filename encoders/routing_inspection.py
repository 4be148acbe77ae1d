"""One figure about a trained router, after the inspection appendices of the Soft MoE paper.

Where slots look (arXiv 2308.00951, appendix H), how much weight tokens and experts get (appendix
G), and how alike the slots of a block are (appendix I).

Shape legend: B images, M tokens, S slots, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from encoders.routing_report import choose_slots, fill_slot_maps
from encoders.routing_statistics import STARVED_TOKEN, relative_entropy, soft_only
from encoders.soft_moe import l2_normalize

# Tokens with more than this times the average token's weight (appendix G).
FED_TOKEN = 2.0
INK, FAINT, COLD, WARM = "#33302c", "#d9d4ca", "#2c6fa6", "#c2541c"


@dataclass(frozen=True)
class InspectedLayer:
    """Routing of one layer over all measured images.

    `block` is its number, `dispatch` and `combine` (B, M, S) without tokens that are no patches,
    `num_experts` E, and `phi` (d, S), the slots' parameters, where there are any.
    """

    block: int
    dispatch: Tensor
    combine: Tensor
    num_experts: int
    phi: Tensor | None

    def token_weight(self) -> Tensor:
        """Summed dispatch weight of every token over that of the average token, (B, M)."""
        weight = self.dispatch.sum(2)
        return weight / weight.mean()

    def expert_weight(self) -> Tensor:
        """Combine weight that each expert collects over that of the average expert, (E,)."""
        weight = self.combine.sum((0, 1)).view(self.num_experts, -1).sum(1)
        return weight / weight.mean()

    def slot_correlation(self) -> Tensor:
        """Cosines between slots (S, S): of their parameters, else of their dispatch maps."""
        if self.phi is not None:
            slots = self.phi
        else:
            slots = (self.dispatch - 1 / self.dispatch.shape[1]).flatten(0, 1)
        slots = l2_normalize(slots.double(), 0)
        return slots.T @ slots


def inspected_layers(model: Any, routing: Mapping[str, Any]) -> list[InspectedLayer]:
    """Layers with slots, in the order of blocks; class and register tokens left out.

    Args:
        model: a timm vision transformer with routed layers.
        routing: of `collect_routing(model, images)`; layers without slots are passed over.
    """
    layers = []
    for name, weights in soft_only(routing).items():
        layer: Any = model.get_submodule(name)
        patches = slice(model.num_prefix_tokens, None)
        phi = getattr(layer, "phi", None)
        layers.append(
            InspectedLayer(
                block=int(name.split(".")[1]),
                dispatch=weights.dispatch[:, patches],
                combine=weights.combine[:, patches],
                num_experts=layer.num_experts,
                phi=None if phi is None else phi.detach().flatten(1),
            )
        )
    return layers


def choose_layer(layers: Sequence[InspectedLayer]) -> int:
    """Index of the layer whose slots look at the fewest places, the first of equal ones."""
    spread = [round(relative_entropy(layer.dispatch, 1).mean().item(), 6) for layer in layers]
    return spread.index(min(spread))


def draw_inspection(
    images: Tensor,
    layers: Sequence[InspectedLayer],
    shown: int,
    *,
    rows: int = 4,
    columns: int = 7,
    title: str = "",
) -> Figure:
    """Slot maps of one layer above four panels about all layers.

    Args:
        images: uint8 (B, 3, H, W), as the model saw them before normalisation.
        layers: of one model, on the CPU.
        shown: index of the layer for slot maps and slot correlation.
        rows: images to draw, at most B.
        columns: slots to draw, at most S; `choose_slots` picks them.
        title: above everything.

    Raises:
        ValueError: a number is out of range, or tokens are no grid of square patches.
    """
    layer = layers[shown]
    rows, columns = min(rows, len(images)), min(columns, layer.dispatch.shape[2])
    slots = choose_slots(layer.dispatch, columns)
    picks = torch.arange(rows) * len(images) // rows
    height = 1.3 * rows + 0.5
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 9, "text.color": INK}):
        figure = Figure(figsize=(11.5, height + 3.3), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, 2.8])
        top, bottom = parts
        top.suptitle(
            f"Where slots of block {layer.block} take their input from",
            x=0.012, ha="left", fontsize=9,
        )  # fmt: skip
        per_expert = layer.dispatch.shape[2] // layer.num_experts
        fill_slot_maps(top, images[picks], layer.dispatch[picks], slots, per_expert)
        _fill_panels(bottom.subplots(1, 4, width_ratios=[1, 1, 1, 1.15]), layers, layer)
    return figure


def _fill_panels(
    panels: Sequence[Axes], layers: Sequence[InspectedLayer], layer: InspectedLayer
) -> None:
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.88, len(layers)))
    for item, colour in zip(layers, colours, strict=True):
        label = f"block {item.block}" if item in (layers[0], layers[-1]) else None
        tokens = item.token_weight().flatten().sort().values.numpy()
        share = (np.arange(len(tokens)) + 1) / len(tokens)
        panels[0].plot(tokens, share, color=colour, linewidth=1.3, label=label)
        experts = item.expert_weight().sort(descending=True).values.numpy()
        panels[1].plot(
            np.arange(1, len(experts) + 1), experts, color=colour, linewidth=1.3, label=label
        )
    _finish_tokens(panels[0])
    _finish_experts(panels[1])
    _draw_shares(panels[2], layers)
    _draw_correlation(panels[3], layer)


def _finish_tokens(axis: Axes) -> None:
    axis.set(xscale="log", ylim=(0, 1), title="Weight of tokens")
    axis.set(xlabel="summed dispatch weight, times average", ylabel="share of tokens below")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, STARVED_TOKEN / 2), max(high, 2 * FED_TOKEN))
    for mark in (STARVED_TOKEN, FED_TOKEN):
        axis.axvline(mark, color=FAINT, linewidth=1, zorder=0)
    ticks = [STARVED_TOKEN, 1, FED_TOKEN]
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    _plain(axis)


def _finish_experts(axis: Axes) -> None:
    axis.set(yscale="log", title="Weight of experts", xlabel="experts, by weight")
    axis.set_ylabel("combine weight, times average")
    low, high = axis.get_ylim()
    low, high = min(low, 0.45), max(high, 2.2)
    axis.axhline(1, color=FAINT, linewidth=1, zorder=0)
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low < tick < high]
    axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_ylim(low, high)
    axis.minorticks_off()
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=7, handlelength=1.2)
    _plain(axis)


def _draw_shares(axis: Axes, layers: Sequence[InspectedLayer]) -> None:
    """Shares of tokens with hardly any and with much weight, as bars per block."""
    place = np.arange(len(layers))
    starved = [(item.token_weight() < STARVED_TOKEN).double().mean().item() for item in layers]
    fed = [(item.token_weight() > FED_TOKEN).double().mean().item() for item in layers]
    names = (f"below {STARVED_TOKEN:g}x", f"above {FED_TOKEN:g}x")
    for shift, shares, colour, name in zip(
        (-0.2, 0.2), (starved, fed), (COLD, WARM), names, strict=True
    ):
        axis.bar(place + shift, [100 * share for share in shares], 0.36, color=colour, label=name)
    axis.set(title="Tokens far from the average", xlabel="block", ylabel="% of tokens")
    axis.set_ylim(0, max(1.0, 125 * max(starved + fed)))
    if not any(starved + fed):
        axis.text(0.5, 0.45, "none", transform=axis.transAxes, ha="center", color="#8a847a")
    step = max(1, len(layers) // 8)
    axis.set_xticks(place[::step], labels=[str(item.block) for item in layers[::step]])
    axis.legend(frameon=False, fontsize=7, handlelength=0.8, ncols=2, loc="upper left")
    _plain(axis)


def _draw_correlation(axis: Axes, layer: InspectedLayer) -> None:
    kind = "maps" if layer.phi is None else "parameters"
    picture: Any = axis.imshow(
        layer.slot_correlation().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
    )
    axis.set(title=f"Cosine of slot {kind}, block {layer.block}", xlabel="slot", ylabel="slot")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelcolor=INK)
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_locator(MaxNLocator(6, integer=True))
    bar = axis.figure.colorbar(picture, ax=axis, shrink=0.75, aspect=18, pad=0.02)
    bar.set_ticks([-1, 0, 1])
    bar.outline.set_visible(False)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.tick_params(which="both", color=FAINT, labelcolor=INK)
