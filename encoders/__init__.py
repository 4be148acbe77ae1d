"""Image and text encoders: what turns pixels or token ids into vectors.

Importing the package, or any part of it, makes the image towers known to timm. The names below are
the public ones; what needs timm, open_clip or transformers is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from encoders.causal_soft_moe import CausalSoftMoE
from encoders.experts import ExpertMLP
from encoders.fixed_routing import (
    IdentityRouting,
    SoftUniformRouting,
    UniformRouting,
    UniformSoftRouting,
)
from encoders.routed_layer import RoutedLayer
from encoders.routers import ROUTERS, build_routed_layer
from encoders.soft_moe import SoftMoE
from encoders.sparse_moe import ExpertsChoice, TokensChoice
from encoders.timm_registration import register_with_timm
from encoders.token_mixture import HierarchicalMixture, ImageMixture, TokenMixture

if TYPE_CHECKING:
    from encoders.clip_model import build_clip
    from encoders.transformers_clip import SoftMoEClipModel, SoftMoESiglipModel
    from encoders.variants import DENSE_TWINS, VARIANTS, create_encoder
    from encoders.vision_transformer import SoftMoEVisionTransformer

__all__ = [
    "DENSE_TWINS",
    "ROUTERS",
    "VARIANTS",
    "CausalSoftMoE",
    "ExpertMLP",
    "ExpertsChoice",
    "HierarchicalMixture",
    "IdentityRouting",
    "ImageMixture",
    "RoutedLayer",
    "SoftMoE",
    "SoftMoEClipModel",
    "SoftMoESiglipModel",
    "SoftMoEVisionTransformer",
    "SoftUniformRouting",
    "TokenMixture",
    "TokensChoice",
    "UniformRouting",
    "UniformSoftRouting",
    "build_clip",
    "build_routed_layer",
    "create_encoder",
]

_LATER = {
    "DENSE_TWINS": "encoders.variants",
    "SoftMoEClipModel": "encoders.transformers_clip",
    "SoftMoESiglipModel": "encoders.transformers_clip",
    "SoftMoEVisionTransformer": "encoders.vision_transformer",
    "VARIANTS": "encoders.variants",
    "build_clip": "encoders.clip_model",
    "create_encoder": "encoders.variants",
}
register_with_timm("encoders.variants")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'encoders' has no attribute '{name}'")
