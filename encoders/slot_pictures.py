"""Slot maps as plain pictures: the image in pale grey, and over it, in colour, where a slot looks.

The same look as the figures of `encoders.routing_report`, for pages that put them together
themselves. Shape legend: M tokens, S slots, h x w the token grid, H x W pixels.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, rgb2hex
from torch import Tensor

from encoders.routing_report import HEAT, slot_maps

STRONGEST = 0.75  # opacity of the hottest patch


def heat_scale(weights: Tensor) -> float:
    """Where the colours end, for maps (M, S) of one layer: the 99th percentile of the weights in
    multiples of the uniform weight 1/M, and at least 1.1."""
    return max(1.1, (weights.float().flatten().quantile(0.99) * len(weights)).item())


def paint_slot(picture: Tensor, weights: Tensor, grid: tuple[int, int], top: float) -> np.ndarray:
    """Lay the map of one slot over the picture it belongs to.

    Args:
        picture: uint8 (3, H, W), of any size; the grid is stretched over it.
        weights: (M,), summing to 1 where all are equal to 1/M: dispatch weights of a slot.
        grid: h, w with h * w = M.
        top: multiple of 1/M that gets the strongest colour, above 1; patches up to 1/M stay grey.

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the grid does not have M cells.
    """
    heat = slot_maps(weights[None, :, None], grid)[0, 0].float().cpu().numpy() * len(weights)
    share = np.asarray(LogNorm(1.0, top, clip=True)(heat).filled(0.0))
    colours = mpl.colormaps[HEAT](share)[..., :3] * 255
    opacity = (STRONGEST * share**0.5)[..., None]
    height, width = picture.shape[1:]
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    colours, opacity = (part[rows][:, columns] for part in (colours, opacity))
    grey = picture.cpu().numpy().transpose(1, 2, 0) @ np.array([0.299, 0.587, 0.114])
    pale = (110 + 0.57 * grey)[..., None]
    return (opacity * colours + (1 - opacity) * pale).clip(0, 255).astype(np.uint8)


def heat_colours(count: int = 6) -> list[str]:
    """The scale's colours from weak to strong, as `#rrggbb`."""
    return [rgb2hex(mpl.colormaps[HEAT](share)) for share in np.linspace(0, 1, count)]
