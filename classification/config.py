"""Settings of the classification objective: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ClassifierConfig:
    """Model and loss."""

    name: str = "soft_moe_vit_small_patch16_224"
    """Any timm name works; ours begin with `soft_moe_vit_`."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax cross-entropy, or the paper's sigmoid cross-entropy summed over classes."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Alpha of mixup's beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix's beta distribution; 0 is off."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block."""
    patch_dropout: float = 0.0
    """Share of patches dropped in training."""
