"""What is exported: a dual encoder or a timm model, with what their inputs need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from encoders.clip_model import ARGUMENTS


class ExportError(ValueError):
    """A model that the chosen library cannot hold; the message says why, and what can."""


@dataclass(frozen=True)
class DualEncoder:
    """An open_clip model in eval mode, and what it takes to describe it elsewhere.

    Args:
        model: `open_clip.model.CustomTextCLIP`, as `encoders.clip_model.build_clip` makes it.
        config: `model_cfg` of its `open_clip_config.json`.
        preprocess: `preprocess_cfg` of the same: mean, std, interpolation, resize_mode.
        image_size: pixels per side.
        tokenizer: list of strings to int64 (B, L).
        text_model: the `config.json` of a Hugging Face text tower, None for other towers.

    Raises:
        ExportError: towers that this project does not train.
    """

    model: Any
    config: dict[str, Any]
    preprocess: dict[str, Any]
    image_size: int
    tokenizer: Any
    text_model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        vision, text = self.config["vision_cfg"], self.config["text_cfg"]
        if not vision.get("timm_model_name"):
            raise ExportError(
                "the image tower is open_clip's own, not a timm model: it opens in open_clip as it"
                " is, and nothing here exports it"
            )
        if ("hf_model_name" in text) != (self.text_model is not None):
            raise ExportError(
                "the config of the Hugging Face text tower is not beside the weights, in"
                " text/config.json: export a checkpoint of scripts.train_contrastive"
            )
        if "hf_tokenizer_name" in text and self.text_model is None:
            raise ExportError("texts of open_clip's transformer with a Hugging Face tokenizer")

    @property
    def sigmoid(self) -> bool:
        """Whether it was trained with the sigmoid loss, whose logits have a bias."""
        return self.model.logit_bias is not None

    @property
    def context_length(self) -> int:
        """Tokens per text, marks and padding included."""
        return self.config["text_cfg"]["context_length"]


@dataclass(frozen=True)
class ImageModel:
    """A timm model in eval mode.

    Args:
        model: with or without a classifier.
        name: of the timm model.
        arguments: of its constructor, without the number of classes.
        preprocess: mean, std, interpolation, resize_mode, and crop_pct where a part is cut out.
        image_size: pixels per side.
        classes: names of the classes in order; empty if they are not known or there are none.
    """

    model: Any
    name: str
    arguments: dict[str, Any]
    preprocess: dict[str, Any]
    image_size: int
    classes: tuple[str, ...] = ()


def image_tower(encoder: DualEncoder) -> ImageModel:
    """The image tower of a dual encoder, without its projection to the joint space.

    Raises:
        ExportError: timm cannot build the tower by its name and arguments.
    """
    vision, trunk = encoder.config["vision_cfg"], encoder.model.visual.trunk
    name, pooling = vision["timm_model_name"], vision.get("timm_pool", "avg")
    arguments = dict(vision.get(ARGUMENTS) or {}) | {"global_pool": pooling}
    # Towers get their pooling after they are built, where the norm of vision transformers stays
    # before it; timm would move it behind.
    for options in (arguments, arguments | {"fc_norm": False}):
        if _builds(name, options, trunk):
            return ImageModel(trunk, name, options, encoder.preprocess, encoder.image_size)
    raise ExportError(
        f"timm does not build a {name} as it was trained here, with pooling '{pooling}': choose"
        " --to open_clip or transformers"
    )


def _builds(name: str, arguments: dict[str, Any], trunk: nn.Module) -> bool:
    """Whether timm makes a model with the parameters of `trunk` from its name and arguments."""
    try:
        with torch.device("meta"):
            built: Any = timm.create_model(name, num_classes=0, **arguments)
    except TypeError:  # it has no such argument
        return False
    shapes, expected = (
        {key: value.shape for key, value in module.state_dict().items()}
        for module in (built, trunk)
    )
    return shapes == expected


def save_weights(module: nn.Module, path: Path) -> None:
    """All tensors of a module as safetensors; those that share memory are written out each."""
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in module.state_dict().items()
    }
    path.touch()
    mode = path.stat().st_mode  # safetensors makes files that only their owner can read
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def save_json(content: Any, path: Path) -> None:
    """Write JSON as people read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
