"""A timm VisionTransformer whose chosen blocks carry a Soft MoE instead of an MLP.

The arrangement is that of google-research/vmoe (`projects/soft_moe/configs/common.py`): no class
token, learned position embedding, LayerNorm on queries and keys with a scale and no bias, tanh
GELU, LayerNorm epsilon 1e-6, mean pooling after the final norm, zero head kernel with bias
-log(classes). Everything timm expects of a model (feature extraction, input size changes, layer
groups, patch dropout, gradient checkpointing) is inherited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, LayerNorm, Mlp, lecun_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from encoders.experts import ExpertMLP
from encoders.routed_layer import RoutedLayer
from encoders.soft_moe import SoftMoE

LAYER_NORM_EPS = 1e-6


class BiasFreeQKNormAttention(Attention):
    """timm's attention with LayerNorm (scale, no bias) over the head width of q and k."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        kwargs["norm_layer"] = partial(LayerNorm, eps=LAYER_NORM_EPS, bias=False)
        super().__init__(dim, **kwargs)


class SoftMoEVisionTransformer(VisionTransformer):
    """Vision transformer with Soft MoE in the blocks `moe_blocks`; images (B, 3, H, W) in.

    Args:
        moe_blocks: indices of the routed blocks; an int N means the last N (the paper routes the
            second half); an empty sequence gives the dense twin.
        num_experts, slots_per_expert: see `encoders.soft_moe.SoftMoE`.
        router_noise_std: noise on router logits in training.
        identical_experts: start the experts of a layer equal.
        pos_embed_std: standard deviation of the initial position embedding. The reference's 0.02
            hides positions from the first steps: short runs on small data want them visible.
        **kwargs: timm's VisionTransformer arguments (img_size, patch_size, embed_dim, depth,
            num_heads, mlp_ratio, num_classes, drop_path_rate, patch_drop_rate, ...).

    Raises:
        ValueError: a block index that does not exist, or sizes SoftMoE refuses.
    """

    def __init__(
        self,
        moe_blocks: int | Sequence[int] = (),
        num_experts: int = 128,
        slots_per_expert: int = 1,
        router_noise_std: float = 0.0,
        identical_experts: bool = True,
        pos_embed_std: float = 0.02,
        depth: int = 12,
        **kwargs: Any,
    ) -> None:
        routed = resolve_moe_blocks(moe_blocks, depth)

        def soft_moe(
            in_features: int, hidden_features: int, drop: float, **options: Any
        ) -> SoftMoE:
            return SoftMoE(
                in_features,
                num_experts,
                slots_per_expert,
                hidden_features,
                noise_std=router_noise_std,
                identical_experts=identical_experts,
                dropout=drop,
                device=options.get("device"),
                dtype=options.get("dtype"),
            )

        def block(depth: int, **options: Any) -> Block:
            if depth in routed:
                options["mlp_layer"] = soft_moe
            return Block(depth=depth, **options)

        defaults: dict[str, Any] = {
            "block_fn": block,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "qk_norm": True,
            "norm_layer": partial(LayerNorm, eps=LAYER_NORM_EPS),
            "act_layer": "gelu_tanh",
            "attn_layer": BiasFreeQKNormAttention,
        }
        self.pos_embed_std = pos_embed_std  # timm's constructor calls init_weights
        super().__init__(depth=depth, **(defaults | kwargs))
        self.moe_blocks = routed

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the reference's initial values.

        Args:
            mode: one of timm's schemes, not used.
            needs_reset: also redraw what initialises itself on construction (norms, Soft MoE), as
                a model that was materialised from the meta device needs.
        """
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=self.pos_embed_std)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and isinstance(module, RoutedLayer | ExpertMLP):
                module.init_weights()
            elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        for module in self.modules():  # after the loop above: it visits parents before children
            if isinstance(module, Attention):
                # One Xavier draw per projection: the fused kernel has three outputs per input.
                for projection in module.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(projection)
            elif isinstance(module, Mlp):
                for bias in (module.fc1.bias, module.fc2.bias):
                    if bias is not None:
                        nn.init.normal_(bias, std=1e-6)
        lecun_normal_(self.patch_embed.proj.weight)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, -math.log(self.num_classes))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameter names without weight decay: position embedding and all router parameters."""
        names = set(super().no_weight_decay())
        for prefix, module in self.named_modules():
            if isinstance(module, RoutedLayer):
                names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names


def resolve_moe_blocks(moe_blocks: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Turn "last N" or explicit indices into sorted block indices, or raise ValueError."""
    if isinstance(moe_blocks, int):
        if not 0 <= moe_blocks <= depth:
            raise ValueError(f"moe_blocks={moe_blocks}: choose 0 to {depth} of the last blocks")
        return tuple(range(depth - moe_blocks, depth))
    wrong = sorted(set(moe_blocks) - set(range(depth)))
    if wrong:
        raise ValueError(f"moe_blocks {wrong} do not exist: the model has blocks 0 to {depth - 1}")
    return tuple(sorted(set(moe_blocks)))
