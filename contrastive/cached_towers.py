"""Frozen towers whose embeddings were computed before: what is cached, and the rest of the model.

Cached is what the trained projection of a tower reads: the output of the image trunk, and the
pooled output of a Hugging Face text model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contrastive.config import ImageTowerConfig, TextTowerConfig
from encoders.clip_model import ARGUMENTS
from encoders.hugging_face_text import TOKENIZER_FILES, text_model_folder
from encoders.sparse_base import images_routed_together
from training.objective import Batch

# What a tokenizer reads besides its vocabulary.
TOKENIZER_SETTINGS = (
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def refuse_trained(
    image: ImageTowerConfig, text: TextTowerConfig, cached_image: bool, cached_text: bool
) -> None:
    """Raise ValueError for cached embeddings of a tower that is trained, in whole or in part."""
    for side, tower, cached in (("image", image, cached_image), ("text", text, cached_text)):
        if cached and not tower.frozen:
            raise ValueError(
                f"data.cached_{side} holds embeddings of a tower that never changes: set"
                f" {side}.frozen to true, or do without data.cached_{side}"
            )
    if cached_text:
        refuse_uncached_kind(text)


def refuse_uncached_kind(text: TextTowerConfig) -> None:
    """Raise ValueError for a text tower that has no projection apart to feed embeddings to."""
    if text.kind != "hugging_face":
        raise ValueError(
            f"text embeddings are cached for text.kind hugging_face, not {text.kind}: run that"
            " tower live (leave out data.cached_text; --towers '[image]' when caching)"
        )


def encode(model: Any, batch: Batch, normalize: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Features of a dual encoder, with its logit scale and bias.

    Args:
        model: as `build_dual_encoder` returns it.
        batch: `image` uint8 (b, 3, H, W) or `image_embedding` (b, d), and `text` int64 (b, L) or
            `text_embedding` (b, d); embeddings in any floating-point type.
        normalize: pixels to what the image tower reads.
    """
    cached = batch.get("image_embedding"), batch.get("text_embedding")
    pixels = None if cached[0] is not None else normalize(batch["image"])
    features = model(pixels, None if cached[1] is not None else batch["text"])
    if cached[0] is not None:
        features["image_features"] = _project(model.visual.head, cached[0])
    if cached[1] is not None:
        features["text_features"] = _project(model.text.proj, cached[1])
    return features


def _project(projection: nn.Module, embeddings: Tensor) -> Tensor:
    return projection(embeddings.to(next(projection.parameters()).dtype))


def refuse_mixed_pictures(trunk: nn.Module) -> None:
    """Raise ValueError for a trunk whose output for a picture depends on the others of a batch."""
    if images_routed_together(trunk) > 1:
        raise ValueError(
            "image embeddings cannot be cached: the tower routes several pictures as one group, so"
            " they depend on each other; pretrain it with router_options group_size 1"
        )


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """What the projection of the image tower reads: normalised (b, 3, H, W) to (b, d)."""
    return model.visual.trunk(pixels)


def text_embeddings(model: Any, tokens: Tensor) -> Tensor:
    """What the projection of a Hugging Face text tower reads: int64 (b, L) to (b, d)."""
    found: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Tensor]) -> None:
        found.append(arguments[0])

    with model.text.proj.register_forward_pre_hook(catch):
        model.text(tokens)
    return found[0]


def tower_fingerprint(
    model: Any, model_config: dict[str, Any], side: Literal["image", "text"]
) -> dict[str, str]:
    """What a frozen tower's embeddings depend on: its function, weights and input format.

    Args:
        model: with the weights it is to have.
        model_config: its description.
    """
    if side == "image":
        trunk = model.visual.trunk
        refuse_mixed_pictures(trunk)
        settings = trunk.pretrained_cfg
        return {
            "tower": model_config["vision_cfg"]["timm_model_name"],
            "arguments": json.dumps(model_config["vision_cfg"].get(ARGUMENTS, {}), sort_keys=True),
            "weights": _hash_weights(trunk),
            "image_size": str(model_config["vision_cfg"]["image_size"]),
            "mean": str(tuple(settings["mean"])),
            "std": str(tuple(settings["std"])),
        }
    description = model_config["text_cfg"]
    architecture = model.text.config.to_diff_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        architecture.pop(name, None)
    return {
        "tower": _hash(json.dumps(architecture, sort_keys=True, default=str).encode()),
        "weights": _hash_weights(model.text.transformer),
        "pooling": description["hf_pooler_type"],
        "tokenizer": _hash_files(text_model_folder(description["hf_tokenizer_name"])),
        "context_length": str(description["context_length"]),
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in sorted((*TOKENIZER_FILES, *TOKENIZER_SETTINGS)):
        if (folder / name).is_file():
            digest.update(f"{name}\n".encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:16]
