"""The dual encoder: open_clip's own model class around our timm-registered image tower."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.trainable import parts_to_freeze, untrained_parts
from encoders.clip_model import build_clip, vision_config
from encoders.hugging_face_text import hugging_face_text_config
from encoders.text_towers import bag_of_words_config, open_clip_text_config, route_text_blocks


def model_config(
    image: ImageTowerConfig,
    text: TextTowerConfig,
    contrastive: ContrastiveConfig,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The model as open_clip describes it: what goes into `open_clip_config.json`.

    Args:
        batch_size: pairs of a step over all processes, for an initial bias that depends on it.

    Raises:
        ValueError: an unknown image tower, an unusable text tower, a setting out of range, or a
            tower kept as it is, in whole or in part, without trained weights.
    """
    _refuse_frozen_noise(image, text)
    config: dict[str, Any] = {
        "embed_dim": contrastive.embed_dim,
        "vision_cfg": vision_config(
            image.name,
            image.arguments,
            image.drop_path,
            image.patch_dropout,
            image.pooling,
            image.projection,
            setting="image.arguments",
        ),
        "text_cfg": _text_config(text),
        "custom_text": True,
    }
    if text.quick_gelu:  # of the text tower only: timm models have activations of their own
        config["quick_gelu"] = True
    return config | _initial_logits(contrastive, batch_size)


def _text_config(text: TextTowerConfig) -> dict[str, Any]:
    for name in ("moe_blocks", "quick_gelu"):
        if text.kind != "open_clip" and getattr(text, name):
            raise ValueError(f"text.{name} needs text.kind open_clip: leave it out, or change kind")
    if text.kind == "hugging_face":
        return hugging_face_text_config(
            text.folder,
            text.context_length,
            text.projection,
            pretrained=text.init_from is None,
            pooling=text.pooling,
        ) | {"hf_model_pretrained": False}  # see contrastive.initial_weights
    if text.folder or text.pooling != "mean" or text.projection != "linear":
        raise ValueError(
            "text.folder, text.pooling and text.projection are of Hugging Face models: set"
            " text.kind to hugging_face, or leave them out"
        )
    if text.kind == "bag_of_words":
        return bag_of_words_config(text.width, text.context_length)
    return route_text_blocks(
        open_clip_text_config(text.width, text.heads, text.layers, text.context_length),
        text.moe_blocks,
        text.num_experts,
        text.slots_per_expert,
        text.slot_block_size,
    )


def _initial_logits(contrastive: ContrastiveConfig, batch_size: int | None) -> dict[str, float]:
    """Initial scale and bias, by open_clip's names, when all settings of the loss are sound."""
    siglip, scale = contrastive.loss == "siglip", contrastive.logit_scale
    if scale is None:
        scale = 10.0 if siglip else 1 / 0.07
    if scale <= 0:
        raise ValueError(f"contrastive.logit_scale must be positive, got {scale}")
    if contrastive.max_logit_scale < 0:
        raise ValueError("contrastive.max_logit_scale must not be negative; 0 turns it off")
    if not 0 <= contrastive.label_smoothing < 1:
        smoothing = contrastive.label_smoothing
        raise ValueError(f"contrastive.label_smoothing must be in [0, 1), got {smoothing}")
    if contrastive.tile_rows < 1:
        raise ValueError(f"contrastive.tile_rows must be at least 1, got {contrastive.tile_rows}")
    if not siglip:
        return {"init_logit_scale": math.log(scale)}
    bias = contrastive.logit_bias
    if bias is None:
        bias = -10.0
    elif bias == "batch":
        if batch_size is None or batch_size < 2:
            raise ValueError(
                "contrastive.logit_bias batch needs a batch of two pairs at least, got"
                f" {batch_size}: give a number"
            )
        bias = -math.log(batch_size - 1)
    return {"init_logit_scale": math.log(scale), "init_logit_bias": float(bias)}


def _refuse_frozen_noise(image: ImageTowerConfig, text: TextTowerConfig) -> None:
    remedies = {
        "image": "set image.init_from to a checkpoint",
        "text": "set text.init_from to an open_clip checkpoint, text.kind to hugging_face with"
        " text.folder",
    }
    loaded = text.init_from is not None or text.kind == "hugging_face"
    for name, tower, loads in (
        ("image", image, image.init_from is not None),
        ("text", text, loaded),
    ):
        if tower.frozen and tower.trainable is not None:
            raise ValueError(
                f"{name}.frozen trains nothing, {name}.trainable {tower.trainable} a part: set one"
            )
        setting, off = ("frozen", "false") if tower.frozen else ("trainable", "null")
        if (tower.frozen or tower.trainable is not None) and not loads:
            raise ValueError(
                f"{name}.{setting} would keep random weights: {remedies[name]}, or {name}.{setting}"
                f" to {off}"
            )
        if tower.init_allow and not loads:
            raise ValueError(
                f"{name}.init_allow allows differences to nothing: set {name}.init_from"
            )


def build_dual_encoder(config: dict[str, Any]) -> Any:
    """A model with random weights from `model_config`, whose calls return a dict of features."""
    return build_clip(config, output_dict=True)


def frozen_parts(
    model: Any, image: ImageTowerConfig, text: TextTowerConfig
) -> tuple[nn.Module | nn.Parameter, ...]:
    """What settings that `model_config` accepts freeze: pretrained modules, or parts of them, not
    the projections on top of them.

    Raises:
        ValueError: what is to be trained does not exist.
    """
    parts: tuple[nn.Module | nn.Parameter, ...] = ()
    if image.frozen:
        parts += (model.visual.trunk,)
    elif image.trainable is not None:
        parts += parts_to_freeze(model.visual.trunk, image.trainable, "image.trainable")
    whole = text.kind != "hugging_face"  # whose projection is a parameter among those of the tower
    tower = model.text if whole else model.text.transformer
    projection = {"text_projection"} if whole else set()
    if text.frozen:
        parts += untrained_parts(tower, projection)
    elif text.trainable is not None:
        parts += parts_to_freeze(tower, text.trainable, "text.trainable", projection)
    return parts
