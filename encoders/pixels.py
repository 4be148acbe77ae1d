"""Normalisation of pixels on the device, so that batches travel as uint8."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.transforms import v2


class Normalize(nn.Module):
    """uint8 (B, 3, H, W) to float: (x / 255 - mean) / std, on the batch's own device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = v2.Normalize(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalize(images.float() / 255)
