"""The dual encoder: open_clip's own model class around our timm-registered image tower."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import nn

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.trainable import parts_to_freeze
from encoders.text_towers import (
    build_clip,
    hugging_face_text_config,
    open_clip_text_config,
    route_text_blocks,
)
from encoders.variants import input_size
from training.checkpoint import CheckpointError, load_tensors, load_weights, newest_checkpoint


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
    if text.kind == "open_clip":
        text_config = open_clip_text_config(
            text.width, text.heads, text.layers, text.context_length
        )
        text_config = route_text_blocks(
            text_config,
            text.moe_blocks,
            text.num_experts,
            text.slots_per_expert,
            text.slot_block_size,
        )
    elif text.moe_blocks:
        raise ValueError("text.moe_blocks needs text.kind open_clip: set it to 0, or change kind")
    else:
        text_config = hugging_face_text_config(text.folder, text.context_length, text.projection)
    vision_config: dict[str, Any] = {
        "timm_model_name": image.name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": input_size(image.name),
    }
    if image.drop_path:
        vision_config["timm_drop_path"] = image.drop_path
    if image.patch_dropout:
        vision_config["patch_dropout"] = image.patch_dropout
    config: dict[str, Any] = {
        "embed_dim": contrastive.embed_dim,
        "vision_cfg": vision_config,
        "text_cfg": text_config,
        "custom_text": True,
    }
    return config | _initial_logits(contrastive, batch_size)


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
    for name, tower in (("image", image), ("text", text)):
        if tower.frozen and tower.trainable is not None:
            raise ValueError(
                f"{name}.frozen trains nothing, {name}.trainable {tower.trainable} a part: set one"
            )
    setting, off = ("frozen", "false") if image.frozen else ("trainable", "null")
    if (image.frozen or image.trainable is not None) and image.init_from is None:
        raise ValueError(
            f"image.{setting} would keep random weights: set image.init_from to a classification"
            f" checkpoint, or image.{setting} to {off}"
        )
    setting, off = ("frozen", "false") if text.frozen else ("trainable", "null")
    if (text.frozen or text.trainable is not None) and text.kind == "open_clip":
        raise ValueError(
            f"text.{setting} would keep random weights, for text.kind open_clip loads none: set"
            f" text.kind to hugging_face and text.folder, or text.{setting} to {off}"
        )


def build_dual_encoder(config: dict[str, Any]) -> Any:
    """A fresh model from `model_config`, whose calls return a dict of features."""
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
    if text.frozen:
        parts += (model.text.transformer,)
    elif text.trainable is not None:
        parts += parts_to_freeze(model.text.transformer, text.trainable, "text.trainable")
    return parts


def load_image_trunk(model: Any, source: str) -> None:
    """Load a classification checkpoint into the image trunk; its classifier is left out.

    Args:
        source: a run directory, a checkpoint folder, or a safetensors file.

    Raises:
        CheckpointError: nothing there, or parameters differ from the trunk's.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        newest, _ = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"image.init_from '{source}' holds no complete checkpoint")
        path = newest
    if path.is_dir():
        _refuse_arguments(path / "config.json")
        path = path / "model.safetensors"
    tensors = load_tensors(path)
    trunk = model.visual.trunk
    named = trunk.pretrained_cfg.get("classifier") or ()  # two names with a distillation head
    names = (named,) if isinstance(named, str) else named
    # All of a head that the trunk lacks, for "head.fc" may stand beside a norm of either side.
    heads, kept = tuple(f"{name.partition('.')[0]}." for name in names), trunk.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in kept or not k.startswith(heads)}
    load_weights(trunk, tensors, str(path))


def _refuse_arguments(path: Path) -> None:
    """Weights of another router can fit by name and shape and still be another function."""
    arguments = (
        json.loads(path.read_text(encoding="utf-8")).get("model_args") if path.is_file() else None
    )
    if arguments:
        raise CheckpointError(
            f"{path.parent} was trained with model.arguments {arguments}, which dual encoders do"
            " not take yet: pretrain a registered model (encoders/variants.py) without arguments"
        )
