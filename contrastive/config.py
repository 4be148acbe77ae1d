"""Settings of the dual encoder and its loss: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ImageTowerConfig:
    """The image tower: a model registered in `encoders.variants`, with a linear projection."""

    name: str = "soft_moe_vit_small_patch16_224"
    """Any timm name works; ours begin with `soft_moe_vit_`."""
    init_from: str | None = None
    """Classification checkpoint (or run directory) whose trunk weights are loaded."""
    frozen: bool = False
    """Keep the trunk as it is; the projection is still trained."""
    trainable: int | list[str] | None = None
    """Train part of the trunk: so many of its last blocks and what follows them, or the parameters
    whose whole name in the trunk one of these regular expressions matches (`blocks\\.11\\..*`);
    null trains all that is not frozen."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block."""
    patch_dropout: float = 0.0
    """Share of patches dropped in training."""


@dataclass
class TextTowerConfig:
    """The text tower: open_clip's transformer, or a Hugging Face model from a local folder."""

    kind: Literal["open_clip", "hugging_face"] = "open_clip"
    width: int = 512
    heads: int = 8
    layers: int = 12
    moe_blocks: int | list[int] = 0
    """Causal Soft MoE in the MLP's place, for open_clip: so many of the last blocks, or indices.
    Stock open_clip cannot open such a model; our commands can."""
    num_experts: int = 8
    """Experts of a routed block; each runs slots_per_expert / slot_block_size times per token."""
    slots_per_expert: int = 1
    slot_block_size: int = 1
    """Successive tokens that share slots: 1 is exact, more is as much cheaper."""
    context_length: int = 77
    """Tokens per caption; longer captions are cut."""
    folder: str = ""
    """Local folder with model and tokenizer, for hugging_face."""
    projection: Literal["linear", "mlp"] = "linear"
    """Head on a Hugging Face model; it is trained even when the model is frozen."""
    frozen: bool = False
    """Keep the text tower (of a Hugging Face model: all but its projection) as it is."""
    trainable: int | list[str] | None = None
    """Train part of a Hugging Face model, as image.trainable; its projection is always trained."""


@dataclass
class ContrastiveConfig:
    """Embedding width and loss."""

    embed_dim: int = 512
    """Width of the space that images and texts share."""
    loss: Literal["clip", "siglip"] = "clip"
    """clip: softmax over the batch in both directions; siglip: one sigmoid per pair."""
    logit_scale: float | None = None
    """Initial logit scale; null is 1 / 0.07 for clip and 10 for siglip."""
    logit_bias: float | Literal["batch"] | None = None
    """Initial logit bias for siglip; null is -10. batch is -ln(batch size - 1): at scale 0 one
    positive and the negatives of its image then weigh the same. clip has none."""
    max_logit_scale: float = 100.0
    """The logit scale is clamped to this after every step; 0 turns the clamp off."""
    same_group: Literal["mask", "positive"] = "mask"
    """Pairs of a batch with the same group mark (of streams that have marks) are left out of each
    other's negatives, or are positives too."""
    label_smoothing: float = 0.0
    """Share of the targets that is spread evenly, for clip over the columns and for siglip over
    yes and no."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes see one another's texts, for siglip: gathered, or passed on from process to
    process, which takes less memory where they are many. Gradients are the same; clip gathers."""
    tile_rows: int = 256
    """Rows whose logits exist at a time; fewer need less memory, more keep a GPU busier."""
    check_features: bool = False
    """Stop with the side and row of the first feature that is not finite; waits for the device."""
