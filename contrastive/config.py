"""Settings of the dual encoder and its loss: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ImageTowerConfig:
    """The image tower: a model registered in `encoders.variants`, with a linear projection."""

    name: str = "soft_moe_vit_small_patch16_224"
    """Any timm name works; ours begin with `soft_moe_vit_`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model, as model.arguments of pretraining, such as {router:
    tokens_choice, num_experts: 32, img_size: 64}. With any, open_clip 3.3 cannot open the run; our
    commands can."""
    pooling: Literal["avg", "token", "map"] = "avg"
    """What the head reads: mean of the tokens, class token, or the model's attention pool."""
    projection: Literal["linear", "mlp"] = "linear"
    """Head on the model: a linear map, or two with a GELU between."""
    init_from: str | None = None
    """Initial weights: a run directory or a checkpoint of either training command, a safetensors
    file, a timm or open_clip folder, or hf-hub:owner/name (docs/towers.md)."""
    init_allow: list[str] = field(default_factory=list)
    """Parameters that init_from may lack, have in excess or have in another shape: regular
    expressions, each of which must match the whole name of one."""
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
    """The text tower: open_clip's transformer, a Hugging Face model, or a bag of words."""

    kind: Literal["open_clip", "hugging_face", "bag_of_words"] = "open_clip"
    """A bag of words (the mean of word embeddings) has no heads, layers or order; for a few
    thousand short captions. Stock open_clip cannot open it; our commands can."""
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
    quick_gelu: bool = False
    """For open_clip: the activation of OpenAI's weights, x * sigmoid(1.702 x), in place of GELU."""
    folder: str = ""
    """For hugging_face: a local folder with model and tokenizer, or the model's name on the hub."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """For hugging_face: mean of the tokens, first or last token. Stock open_clip cannot open the
    last; our commands can."""
    projection: Literal["linear", "mlp"] = "linear"
    """Head on a Hugging Face model."""
    init_from: str | None = None
    """Initial weights of the text tower: an open_clip folder, a contrastive run or a checkpoint of
    one, or hf-hub:owner/name; null takes those of folder, for hugging_face (docs/towers.md)."""
    init_allow: list[str] = field(default_factory=list)
    """As image.init_allow."""
    frozen: bool = False
    """Keep the text tower as it is, but for its projection, which is always trained."""
    trainable: int | list[str] | None = None
    """Train part of a pretrained text tower, as image.trainable."""


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
