"""Updates whose loss or gradient norm stands far above those before them."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128


class SpikeWindow:
    """Losses and gradient norms of the last 128 accepted steps, on the device.

    Nothing is called a spike before the window is full. The rule is that of OLMo-core's and
    levanter's optimizers that skip steps.

    Args:
        sigmas: standard deviations above the mean from which on a value is a spike.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.values = torch.zeros(2, WINDOW, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def is_spike(self, pair: Tensor) -> Tensor:
        """Whether loss or norm, (2,), is one: 0-D bool on the device."""
        limit = self.values.mean(1) + self.sigmas * self.values.std(1, correction=0)
        return (self.count >= WINDOW) & (pair > limit).any()

    def add(self, pair: Tensor, accepted: Tensor) -> None:
        """Move the window on by `pair`, (2,), where the 0-D `accepted` is true."""
        moved = torch.cat([self.values[:, 1:], pair[:, None]], 1)
        self.values = torch.where(accepted, moved, self.values)
        self.count += accepted
