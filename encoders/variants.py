"""Named sizes, registered with timm. Importing this module makes them known to timm and open_clip.

Names read `soft_moe_vit_<size>_patch<P>_<image size>`; the routed blocks are the second half and
every expert has one slot, as in the paper (Table 8). Widths and depths of S and B are the paper's
and ViT's; nano (width 128) and micro (width 192) are ours, for small machines and small images;
test, like timm's own test models, only shows that things fit together.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models._registry import generate_default_cfgs

from encoders.vision_transformer import SoftMoEVisionTransformer


def _default_cfg(image_size: int) -> dict[str, Any]:
    return {
        "input_size": (3, image_size, image_size),
        "num_classes": 1000,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "soft_moe_vit_nano_patch8_32": _default_cfg(32),
        "soft_moe_vit_micro_patch8_48": _default_cfg(48),
        "soft_moe_vit_micro_patch8_64": _default_cfg(64),
        "soft_moe_vit_small_patch16_224": _default_cfg(224),
        "soft_moe_vit_base_patch16_224": _default_cfg(224),
        "soft_moe_vit_test_patch16_64": _default_cfg(64),
    }
)


def input_size(name: str) -> int:
    """Pixels per side that the named timm model expects.

    Raises:
        ValueError: timm does not know the name; the message has the nearest ones.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"model '{name}' is unknown to timm{hint}")
    config = timm.get_pretrained_cfg(name)
    if config is None or config.input_size is None:
        raise ValueError(f"model '{name}' does not say which image size it expects")
    return config.input_size[-1]


def _create(
    variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> Any:
    return build_model_with_cfg(
        SoftMoEVisionTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(defaults | kwargs),
    )


@register_model
def soft_moe_vit_nano_patch8_32(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """Nano/8 for 32-pixel images: width 128, 2 blocks, the last with 16 experts.

    Made for minutes on a CPU: positions are visible from the first step (see docs/results.md).
    """
    defaults = {
        "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2,
        "moe_blocks": 1, "num_experts": 16, "pos_embed_std": 0.5,
    }  # fmt: skip
    return _create("soft_moe_vit_nano_patch8_32", pretrained, defaults, kwargs)


@register_model
def soft_moe_vit_micro_patch8_48(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """Micro/8 for 48-pixel images: width 192, 6 blocks, the last 3 with 16 experts."""
    defaults = {
        "img_size": 48, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3,
        "moe_blocks": 3, "num_experts": 16,
    }  # fmt: skip
    return _create("soft_moe_vit_micro_patch8_48", pretrained, defaults, kwargs)


@register_model
def soft_moe_vit_micro_patch8_64(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """Micro/8 for 64-pixel images: width 192, 6 blocks, the last 3 with 16 experts."""
    defaults = {
        "img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3,
        "moe_blocks": 3, "num_experts": 16,
    }  # fmt: skip
    return _create("soft_moe_vit_micro_patch8_64", pretrained, defaults, kwargs)


@register_model
def soft_moe_vit_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """S/16, 128 experts, 922,701,166 parameters with 1,000 classes (paper: 933M with JFT's)."""
    defaults = {
        "img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6,
        "moe_blocks": 6, "num_experts": 128,
    }  # fmt: skip
    return _create("soft_moe_vit_small_patch16_224", pretrained, defaults, kwargs)


@register_model
def soft_moe_vit_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """B/16, 128 experts, 3,685,650,670 parameters with 1,000 classes (paper: 3.7B)."""
    defaults = {
        "img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12,
        "moe_blocks": 6, "num_experts": 128,
    }  # fmt: skip
    return _create("soft_moe_vit_base_patch16_224", pretrained, defaults, kwargs)


@register_model
def soft_moe_vit_test_patch16_64(
    pretrained: bool = False, **kwargs: Any
) -> SoftMoEVisionTransformer:
    """Test/16: width 32, 2 blocks, the last one with 4 experts; for tests, not for pictures."""
    defaults = {
        "img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "moe_blocks": 1, "num_experts": 4,
    }  # fmt: skip
    return _create("soft_moe_vit_test_patch16_64", pretrained, defaults, kwargs)
