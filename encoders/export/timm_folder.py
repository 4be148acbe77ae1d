"""A folder that timm opens, and transformers through its wrapper of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoders.export.model import ImageModel, save_json, save_weights

# Of what timm knows of a model, what a loaded one needs.
SETTINGS = ("first_conv", "classifier", "pool_size", "fixed_input_size")


def write_timm(image: ImageModel, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, as timm's own `save_for_hf` lays them out.

    The number of classes stands beside `model_args` and not in it, for transformers passes both.

    Args:
        image: what to write.
        folder: exists, and is empty.
    """
    classes = image.model.num_classes
    known = image.model.pretrained_cfg
    preprocess = image.preprocess
    described: dict[str, Any] = {
        "input_size": [3, image.image_size, image.image_size],
        "mean": preprocess["mean"],
        "std": preprocess["std"],
        "interpolation": preprocess["interpolation"],
        "crop_pct": preprocess.get("crop_pct", 1.0),
        "crop_mode": {"squash": "squash", "longest": "border"}.get(
            preprocess["resize_mode"], "center"
        ),
        "num_classes": classes,
    } | {name: known[name] for name in SETTINGS if name in known}
    config: dict[str, Any] = {
        "architecture": image.name.partition(".")[0],
        "num_classes": classes,
        "num_features": image.model.num_features,
        "model_args": _plain(image.arguments),
        "pretrained_cfg": described,
        "model_type": "timm_wrapper",
    }
    if "global_pool" in image.arguments:
        config["global_pool"] = image.arguments["global_pool"]
    if image.classes:
        config["label_names"] = list(image.classes)
    save_json(config, folder / "config.json")
    save_weights(image.model, folder / "model.safetensors")


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "num_classes"}
