"""Towers of transformers checkpoints by the names that timm and open_clip give their parameters.

ViT, CLIP and SigLIP keep one matrix each for queries, keys and values where timm and open_clip have
one for the three; otherwise the parameters are the same under other names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Rules = Sequence[tuple[str, str]]
PROJECTIONS = ("q", "k", "v")
VIT: Rules = (
    (r"(?:vit\.)?embeddings\.cls_token", "cls_token"),
    (r"(?:vit\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)\w+\.(\w+)",
     r"blocks.\1.attn.\2.\3"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)",
     r"blocks.\1.attn.proj.\2"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"(?:vit\.)?layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(\w+)", r"head.\1"),
)  # fmt: skip
CLIP_VISION: Rules = (
    (r"(?:vision_model\.)?embeddings\.class_embedding", "cls_token"),
    (r"(?:vision_model\.)?embeddings\.position_embedding\.weight", "pos_embed"),
    (r"(?:vision_model\.)?embeddings\.patch_embedding\.(\w+)", r"patch_embed.proj.\1"),
    (r"(?:vision_model\.)?pre_layrnorm\.(\w+)", r"norm_pre.\1"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj\.(\w+)",
     r"blocks.\1.attn.\2.\3"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)",
     r"blocks.\1.attn.proj.\2"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
    (r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.(\w+)\.(\w+)", r"blocks.\1.mlp.\2.\3"),
    (r"(?:vision_model\.)?post_layernorm\.(\w+)", r"norm.\1"),
    # The attention pool of SigLIP.
    (r"(?:vision_model\.)?head\.probe", "attn_pool.latent"),
    (r"(?:vision_model\.)?head\.attention\.in_proj_(\w+)", r"attn_pool.qkv.\1"),
    (r"(?:vision_model\.)?head\.attention\.out_proj\.(\w+)", r"attn_pool.proj.\1"),
    (r"(?:vision_model\.)?head\.layernorm\.(\w+)", r"attn_pool.norm.\1"),
    (r"(?:vision_model\.)?head\.mlp\.(\w+)\.(\w+)", r"attn_pool.mlp.\1.\2"),
)  # fmt: skip
CLIP_TEXT: Rules = (
    (r"(?:text_model\.)?embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"(?:text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj\.(\w+)",
     r"transformer.resblocks.\1.attn.\2.\3"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)",
     r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.layer_norm(\d)\.(\w+)",
     r"transformer.resblocks.\1.ln_\2.\3"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)",
     r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"(?:text_model\.)?encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)",
     r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"(?:text_model\.)?final_layer_norm\.(\w+)", r"ln_final.\1"),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A tower by timm's or open_clip's names.

    `left_out` are parameters that such towers do not have, such as poolers; `pool` is timm's name
    for how an image tower pools; `hidden` are settings that shapes do not show.
    """

    tensors: Mapping[str, Tensor]
    whole: bool
    left_out: tuple[str, ...] = ()
    pool: str | None = None
    hidden: Mapping[str, Any] = field(default_factory=dict)


def image_names(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Converted | None:
    """The image tower of a ViT, CLIP or SigLIP checkpoint, by the names of open_clip's tower.

    Args:
        tensors: of the checkpoint.
        config: its whole config, defaults included.

    Returns:
        None for any other model.
    """
    kind = config.get("model_type")
    vision = config.get("vision_config", config)
    if kind == "vit":
        rules, pool = VIT, "token"
    elif kind in ("clip", "clip_vision_model"):
        rules, pool = CLIP_VISION, "token"
    elif kind in ("siglip", "siglip_vision_model"):
        rules, pool = CLIP_VISION, "map"
    else:
        return None
    found, rest = _rename(tensors, rules)
    found = _fuse(found, r"(blocks\.\d+\.attn)\.q\.(weight|bias)", "{0}.{1}.{2}", "{0}.qkv.{2}")
    for name in ("cls_token", "pos_embed"):
        if name in found:
            found[name] = found[name].reshape(1, -1, found[name].shape[-1])
    for part in ("weight", "bias"):
        fused = found.pop(f"attn_pool.qkv.{part}", None)
        if fused is not None:
            width = len(fused) // 3
            found[f"attn_pool.q.{part}"], found[f"attn_pool.kv.{part}"] = (
                fused[:width].clone(),
                fused[width:].clone(),
            )
    named = {f"trunk.{name}": value for name, value in found.items()}
    projection = tensors.get("visual_projection.weight")
    if projection is not None:
        named["head.proj.weight"] = projection
    left_out = [n for n in rest if not n.startswith(("text_", "logit_", "visual_projection"))]
    # Epsilons differ, too, but all are too small to matter.
    hidden = {name: vision[name] for name in ("num_attention_heads", "hidden_act")}
    return Converted(named, projection is not None, tuple(left_out), pool, hidden)


def text_names(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The text tower of a CLIP checkpoint by open_clip's names, and its `model_cfg`.

    Returns:
        None for any other model.
    """
    if config.get("model_type") not in ("clip", "clip_text_model"):
        return None
    text = config.get("text_config", config)
    found, _ = _rename(tensors, CLIP_TEXT)
    for part in ("weight", "bias"):
        found = _fuse(
            found,
            rf"(transformer\.resblocks\.\d+\.attn)\.q\.({part})",
            "{0}.{1}.{2}",
            f"{{0}}.in_proj_{part}",
        )
    if "text_projection.weight" in tensors:
        found["text_projection"] = tensors["text_projection.weight"].T.contiguous()
    described = {"heads": text["num_attention_heads"]}
    return found, {"text_cfg": described, "quick_gelu": text["hidden_act"] == "quick_gelu"}


def _rename(tensors: Mapping[str, Tensor], rules: Rules) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that a rule names, by their new names, and the names of the others."""
    found: dict[str, Tensor] = {}
    rest: list[str] = []
    for name, value in tensors.items():
        for pattern, replacement in rules:
            match = re.fullmatch(pattern, name)
            if match is not None:
                found[match.expand(replacement)] = value
                break
        else:
            if not name.endswith("position_ids"):  # kept by old versions
                rest.append(name)
    return found, rest


def _fuse(
    tensors: dict[str, Tensor], pattern: str, separate: str, together: str
) -> dict[str, Tensor]:
    """Put queries, keys and values, in this order, into one tensor."""
    for name in [name for name in tensors if re.fullmatch(pattern, name)]:
        match = re.fullmatch(pattern, name)
        assert match is not None
        place, part = match.groups()
        names = [separate.format(place, projection, part) for projection in PROJECTIONS]
        if all(other in tensors for other in names):  # what is missing is told by who loads them
            values = [tensors.pop(other) for other in names]
            tensors[together.format(place, "", part)] = torch.cat(values)
    return tensors
