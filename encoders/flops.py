"""Floating-point operations per image, in closed form.

Convention: two operations per multiply-accumulate of convolutions and matrix products, forward pass
only; softmaxes, norms, activations and plain means are not counted. That is the convention of
torch's `FlopCounterMode`, which these figures equal, and of the paper's GFLOP per image (Tables 1
and 8), which they meet within 0.6 % from below.

Shape legend: M tokens, d width, h hidden width of an MLP, E experts, P slots per expert.
"""

from __future__ import annotations

import math
from typing import Any

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from encoders.soft_moe import SoftMoE
from encoders.sparse_moe import CAPACITY_MULTIPLE

SOFT_ROUTERS = ("soft", "soft_uniform", "uniform_soft")
MIXTURES = ("token_mixture", "image_mixture", "hierarchical_mixture")


def expert_rows(
    router: str,
    tokens: int,
    num_experts: int = 1,
    *,
    slots_per_expert: int = 1,
    capacity_factor: float = 1.0,
    top_k: int = 1,
    group_size: int = 1,
    capacity_multiple: int | None = None,
) -> float:
    """Rows that all experts together process per image; a dense MLP processes M.

    This is what a routed layer costs: E * P slots for Soft MoE whatever E is, top_k *
    capacity_factor * M for Tokens Choice, capacity_factor * M for Experts Choice (with `group_size`
    images sharing buffers and capacities rounded up to a multiple of `capacity_multiple`, that
    layer's default when None, hence a fraction), and E * M for the token mixtures, where every
    expert sees every token.

    Raises:
        ValueError: no formula for this router.
    """
    group = group_size * tokens
    match router:
        case "dense":
            return tokens
        case "soft" | "soft_uniform" | "uniform_soft" | "identity":
            return num_experts * slots_per_expert
        case "uniform":  # the slots of an expert are equal
            return num_experts
        case "tokens_choice":
            capacity = math.ceil(group * top_k * capacity_factor / num_experts)
            capacity += -capacity % (capacity_multiple or CAPACITY_MULTIPLE)
            return num_experts * capacity / group_size
        case "experts_choice":
            capacity = round(group * capacity_factor / num_experts)
            capacity = min(group, capacity + -capacity % (capacity_multiple or 1))
            return num_experts * capacity / group_size
        case _ if router in MIXTURES:
            return num_experts * tokens
    raise ValueError(f"router '{router}' has no closed form here: count with FlopCounterMode")


def mlp_flops(
    router: str, tokens: int, dim: int, hidden_dim: int, num_experts: int = 1, **routing: Any
) -> int:
    """Operations per image of one dense MLP (router "dense") or routed layer.

    Of the mixtures this is the form that weighs outputs by scores of expert embeddings; scores of
    groups, or of a router with its own layers, come on top.

    Args:
        router: "dense" or a name in `encoders.routers.ROUTERS`.
        tokens: M.
        dim: d.
        hidden_dim: h.
        num_experts: E.
        **routing: see `expert_rows`.

    Raises:
        ValueError: no formula for this router.
    """
    rows = expert_rows(router, tokens, num_experts, **routing)
    experts = round(4 * rows * dim * hidden_dim)
    if router in SOFT_ROUTERS:  # logits, dispatch and combine
        return experts + 6 * tokens * dim * round(rows)
    if router in ("dense", "identity", "uniform"):
        return experts
    scored = 1 if router == "image_mixture" else tokens
    experts += 2 * scored * dim * num_experts
    # Mixtures weigh E outputs per token by a product, the sparse routers gather rows.
    return experts + (2 * tokens * num_experts * dim if router in MIXTURES else 0)


def attention_flops(tokens: int, dim: int) -> int:
    """Operations per image of self-attention: four d x d projections and two M x M products."""
    return 8 * tokens * dim * dim + 4 * tokens * tokens * dim


def image_flops(
    model: VisionTransformer, image_size: tuple[int, int] | None = None
) -> dict[str, int]:
    """Operations per image of a dense or Soft MoE vision transformer, by part; also on "meta".

    Args:
        model: a timm VisionTransformer or ours, with plain blocks and patch embedding, and pooling
            that has no parameters. Patch dropout is not considered: these are the operations of
            inference.
        image_size: (H, W); what the model was built for when None.

    Returns:
        "patch_embed", "attention", "mlp" (dense blocks), "routed" (Soft MoE blocks) and "head".

    Raises:
        ValueError: a part that this count does not know: a stem (hybrid models), a block, an
            attention, a layer in place of an MLP, a pooling, or another image size.
    """
    _check_known(model, image_size)
    patches, dim = model.patch_embed.num_patches, model.embed_dim
    tokens = patches + model.num_prefix_tokens
    kernel = model.patch_embed.proj.weight
    counts = {"patch_embed": 2 * patches * kernel.numel(), "attention": 0, "mlp": 0, "routed": 0}
    for index, block in enumerate(model.blocks):
        counts["attention"] += attention_flops(tokens, dim)
        mlp: Any = block.mlp
        if isinstance(mlp, SoftMoE):
            _, experts, slots = mlp.phi.shape
            hidden = mlp.experts.fc1_weight.shape[-1]
            counts["routed"] += mlp_flops(
                "soft", tokens, dim, hidden, experts, slots_per_expert=slots
            )
        elif isinstance(mlp, Mlp):
            width: Any = mlp.fc1.out_features
            counts["mlp"] += mlp_flops("dense", tokens, dim, width)
        else:
            raise ValueError(
                f"blocks.{index}.mlp: no closed form for {type(mlp).__name__}; add up"
                " mlp_flops of its router, or count with FlopCounterMode"
            )
    after = [layer for name, layer in model.named_modules() if not name.startswith("blocks.")]
    counts["head"] = sum(2 * m.weight.numel() for m in after if isinstance(m, nn.Linear))
    return counts


def _check_known(model: VisionTransformer, image_size: tuple[int, int] | None) -> None:
    """Raise ValueError where anything but an MLP differs from what `image_flops` adds up."""
    if model.attn_pool is not None:
        raise ValueError(f"global_pool='{model.global_pool}': no closed form for this pooling")
    embed: Any = model.patch_embed
    if type(embed) is not PatchEmbed:
        raise ValueError(f"patch_embed: no closed form for {type(embed).__name__}")
    size: Any = embed.img_size
    if image_size not in (None, size) or embed.dynamic_feat_size(size) != embed.grid_size:
        raise ValueError(
            f"image_size={image_size}: the closed form is that of {size} without padding"
        )
    dim = model.embed_dim
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise ValueError(f"blocks.{index}: no closed form for {type(block).__name__}")
        attention = block.attn
        linear = [tuple(m.weight.shape) for m in attention.modules() if isinstance(m, nn.Linear)]
        if not isinstance(attention, Attention) or linear != [(3 * dim, dim), (dim, dim)]:
            raise ValueError(f"blocks.{index}.attn: no closed form for {type(attention).__name__}")
