"""Named sizes, registered with timm. `import encoders` makes them known to timm and open_clip.

Names read `soft_moe_vit_<size>_patch<P>_<image size>`, and `dense_vit_...` for the dense twin built
by the same code. The second half of the blocks is routed and every expert has one slot, as in the
paper (Table 8). Widths and depths from tiny to huge are ViT's; nano and micro are ours, for small
machines and small images; test, like timm's own test models, only shows that things fit together.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
from timm.models import build_model_with_cfg, register_model
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import checkpoint_filter_fn

if TYPE_CHECKING:
    from encoders.vision_transformer import SoftMoEVisionTransformer


class Size(NamedTuple):
    """Token width, number of blocks, attention heads, deviation of the first positions."""

    embed_dim: int
    depth: int
    num_heads: int
    pos_embed_std: float = 0.02


# Made for minutes on a CPU: positions are visible from the first step (see docs/results.md).
NANO = Size(128, 2, 2, pos_embed_std=1.0)
TEST = Size(32, 2, 2)
MICRO = Size(192, 6, 3)
TINY = Size(192, 12, 3)
SMALL = Size(384, 12, 6)
BASE = Size(768, 12, 12)
LARGE = Size(1024, 24, 16)
HUGE = Size(1280, 32, 16)

# Size, pixels per patch, pixels per image, experts in each routed block (0: no block is routed).
# From small on, the numbers of experts are the paper's (Tables 8 and 9; it has H/14 with 128, too).
VARIANTS: dict[str, tuple[Size, int, int, int]] = {
    "soft_moe_vit_nano_patch8_16": (NANO, 8, 16, 8),
    "soft_moe_vit_nano_patch4_16": (NANO, 4, 16, 16),
    "soft_moe_vit_nano_patch4_32": (NANO, 4, 32, 16),
    "soft_moe_vit_nano_patch8_32": (NANO, 8, 32, 16),
    "soft_moe_vit_micro_patch8_48": (MICRO, 8, 48, 16),
    "soft_moe_vit_micro_patch8_64": (MICRO, 8, 64, 16),
    "soft_moe_vit_test_patch16_64": (TEST, 16, 64, 4),
    "soft_moe_vit_tiny_patch16_224": (TINY, 16, 224, 8),
    "soft_moe_vit_small_patch32_224": (SMALL, 32, 224, 32),
    "soft_moe_vit_small_patch16_224": (SMALL, 16, 224, 128),
    "soft_moe_vit_small_patch14_224": (SMALL, 14, 224, 256),
    "soft_moe_vit_small_patch8_224": (SMALL, 8, 224, 512),
    "soft_moe_vit_base_patch32_224": (BASE, 32, 224, 32),
    "soft_moe_vit_base_patch16_224": (BASE, 16, 224, 128),
    "soft_moe_vit_large_patch32_224": (LARGE, 32, 224, 32),
    "soft_moe_vit_large_patch16_224": (LARGE, 16, 224, 128),
    "soft_moe_vit_huge_patch14_224": (HUGE, 14, 224, 256),
}
# The dense model with the same blocks, by the name of the routed one.
DENSE_TWINS = {name: name.replace("soft_moe", "dense") for name in VARIANTS}
VARIANTS |= {twin: (*VARIANTS[name][:3], 0) for name, twin in DENSE_TWINS.items()}


# What timm.create_model takes besides arguments of the model: where weights come from, and pictures
# that are not of three channels.
FOREIGN_ARGUMENTS = (
    "cache_dir",
    "checkpoint_path",
    "features_only",
    "in_chans",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


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
    {name: _default_cfg(image_size) for name, (_, _, image_size, _) in VARIANTS.items()}
)


def input_size(name: str, arguments: Mapping[str, Any] | None = None) -> int:
    """Pixels per side that the named timm model expects, when built with `arguments`.

    Raises:
        ValueError: timm does not know the name (the message has the nearest ones), or `img_size`
            among the arguments is no number of pixels.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"model '{name}' is unknown to timm{hint}")
    chosen = (arguments or {}).get("img_size")
    if chosen is not None:
        if not isinstance(chosen, int) or isinstance(chosen, bool) or chosen < 1:
            raise ValueError(f"img_size must be a number of pixels, got {chosen!r}")
        return chosen
    config = timm.get_pretrained_cfg(name)
    if config is None or config.input_size is None:
        raise ValueError(f"model '{name}' does not say which image size it expects")
    return config.input_size[-1]


def create_encoder(
    name: str, arguments: Mapping[str, Any], setting: str = "arguments", **fixed: Any
) -> Any:
    """A timm model with fresh weights, whose `pretrained_cfg` tells its true image size.

    Args:
        arguments: the user's, of the model's constructor.
        setting: what messages call them.
        **fixed: arguments that the user's must not repeat.

    Raises:
        ValueError: timm does not know the name, or the model does not take the arguments.
    """
    size = input_size(name, arguments)
    taken = sorted(arguments.keys() & {*fixed, *FOREIGN_ARGUMENTS})
    if taken:
        raise ValueError(f"{setting} must not set {', '.join(taken)}: other settings do")
    try:
        model: Any = timm.create_model(name, **fixed, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{setting} do not suit {name}: {error}") from error
    if "img_size" in arguments:  # timm leaves the size of the name
        model.pretrained_cfg["input_size"] = (3, size, size)
    return model


def _entry_point(name: str) -> Callable[..., SoftMoEVisionTransformer]:
    """The function that timm calls to build the named variant."""
    size, patch_size, image_size, num_experts = VARIANTS[name]
    defaults: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch_size,
        "moe_blocks": size.depth // 2 if num_experts else 0,
        **size._asdict(),
    }
    if num_experts:
        defaults["num_experts"] = num_experts

    def create(pretrained: bool = False, **kwargs: Any) -> SoftMoEVisionTransformer:
        # Late, for that module imports timm, at which moment this one may be imported.
        from encoders.vision_transformer import SoftMoEVisionTransformer

        return build_model_with_cfg(
            SoftMoEVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(defaults | kwargs),
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build {name}; `kwargs` are arguments of SoftMoEVisionTransformer."
    return create


# timm registers a function under its name and lists it in this module's __all__.
globals().update({name: register_model(_entry_point(name)) for name in VARIANTS})
