"""What tests compare with: arrays of public implementations, numbers of launched operators."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parents[1] / "golden"
FLAX_EXPERTS = {
    "experts.fc1_weight": "Mlp/Dense_0/kernel",
    "experts.fc1_bias": "Mlp/Dense_0/bias",
    "experts.fc2_weight": "Mlp/Dense_1/kernel",
    "experts.fc2_bias": "Mlp/Dense_1/bias",
}


class Golden:
    """Reference files, later ones over earlier ones: arrays as tensors, settings as a dict."""

    def __init__(self, *names: str) -> None:
        self.arrays: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}
        for name in names:
            with np.load(GOLDEN / f"{name}.npz") as arrays:
                self.settings |= json.loads(str(arrays["settings"]))
                self.arrays |= {k: torch.from_numpy(arrays[k]) for k in arrays if k != "settings"}

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def leaf(self, key: str) -> Tensor:
        return self.arrays[key].clone().requires_grad_()


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Largest difference, relative to the largest expected element.

    A 0-D array is a sum of many signed terms of order one, so its error is relative to one.
    """
    assert actual is not None, name
    assert actual.shape == expected.shape, name
    scale = expected.detach().abs().max().clamp_min(1e-6 if expected.ndim else 1.0)
    error = ((actual.detach() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


class OperatorCount(TorchDispatchMode):
    """Counts the operators that reach the backend."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
