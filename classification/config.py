"""Settings of the classification objective: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ClassifierConfig:
    """Model and loss."""

    name: str = "soft_moe_vit_small_patch16_224"
    """Any timm name works; ours begin with `soft_moe_vit_`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model: {router: tokens_choice, num_experts: 32} and whatever else
    `encoders.vision_transformer` takes (docs/routers.md)."""
    init_from: str | None = None
    """Pretrained image encoder to fine-tune: a run directory or checkpoint of either training
    command, a timm or open_clip folder, a safetensors file, or hf-hub:owner/name. Positions are
    resampled to the image size; a head of another number of classes is left out."""
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
