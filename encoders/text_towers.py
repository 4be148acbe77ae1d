"""Descriptions of text towers for open_clip's model factory, and their tokenizers.

Three kinds: open_clip's own transformer on the CLIP byte-pair vocabulary, a bag of words on the
same (see `encoders.bag_of_words`), and a Hugging Face model (see `encoders.hugging_face_text`).
Each is described by the `text_cfg` part of an open_clip model config, from which
`encoders.clip_model.build_clip` builds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

from encoders.hugging_face_text import build_hugging_face_tokenizer
from encoders.vision_transformer import resolve_moe_blocks

# Where a `text_cfg` describes routed blocks; open_clip refuses the key as an unknown argument.
ROUTED_BLOCKS = "causal_soft_moe"
# Where it says that the tower is a bag of words, which open_clip does not know either.
BAG_OF_WORDS = "bag_of_words"
CLIP_VOCABULARY = 49408


def open_clip_text_config(
    width: int,
    heads: int,
    layers: int,
    context_length: int,
    vocab_size: int = CLIP_VOCABULARY,
) -> dict[str, Any]:
    """`text_cfg` of open_clip's own text transformer.

    Raises:
        ValueError: a size is not positive or `heads` does not divide `width`.
    """
    config = {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "width": width,
        "heads": heads,
        "layers": layers,
    }
    for name, value in config.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} heads: change one of them")
    return config


def bag_of_words_config(width: int, context_length: int) -> dict[str, Any]:
    """`text_cfg` of a bag of words on the CLIP vocabulary, which `build_clip` understands."""
    return {
        "context_length": context_length,
        "vocab_size": CLIP_VOCABULARY,
        "width": width,
        BAG_OF_WORDS: True,
    }


def route_text_blocks(
    text_config: dict[str, Any],
    moe_blocks: int | Sequence[int],
    num_experts: int,
    slots_per_expert: int = 1,
    block_size: int = 1,
) -> dict[str, Any]:
    """`text_cfg` of `open_clip_text_config` with causal Soft MoE in place of some blocks' MLPs.

    Stock open_clip cannot load a checkpoint of such a model and says that it does not know the key
    `causal_soft_moe`; `build_clip` builds the model that the weights belong to.

    Args:
        text_config: of open_clip's own transformer.
        moe_blocks: indices of the routed blocks; an int N means the last N.
        num_experts: E of `encoders.causal_soft_moe.CausalSoftMoE`.
        slots_per_expert: P.
        block_size: positions that share slots.

    Raises:
        ValueError: a Hugging Face model, a block that does not exist, or a size below 1.
    """
    if "hf_model_name" in text_config:
        raise ValueError("moe_blocks need open_clip's text transformer, not a Hugging Face model")
    sizes = {
        "num_experts": num_experts,
        "slots_per_expert": slots_per_expert,
        "block_size": block_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    blocks = resolve_moe_blocks(moe_blocks, text_config["layers"])
    if not blocks:
        return text_config
    return text_config | {ROUTED_BLOCKS: {"blocks": list(blocks), **sizes}}


def build_tokenizer(text_config: dict[str, Any]) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer of a `text_cfg`; it maps strings to int64 (B, context_length).

    Raises:
        ValueError: a Hugging Face tokenizer that does not suit its model.
    """
    if "hf_model_name" in text_config:
        return build_hugging_face_tokenizer(text_config)
    return SimpleTokenizer(context_length=text_config.get("context_length", DEFAULT_CONTEXT_LENGTH))
