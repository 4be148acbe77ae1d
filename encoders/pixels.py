"""Normalisation of pixels on the device, so that batches travel as uint8."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 (B, 3, H, W) to float32: (x / 255 - mean) / std, on the device of this module."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        # Made once, because a fresh tensor would make each call wait for the GPU; and not
        # persistent, because checkpoints hold models as other libraries know them.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to float32 of the same shape."""
        return (images.float() / 255 - self.mean) / self.std
