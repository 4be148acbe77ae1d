"""Opening an image encoder: a run, a checkpoint of either training command, or a timm name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from encoders.clip_model import ARGUMENTS, build_clip
from encoders.variants import input_size
from eval.open_model import CONFIG_FILE, open_model

TIMM_FILE = "config.json"
# Only the image tower is looked at, so the smallest text tower will do.
TEXT: Any = {"context_length": 1, "vocab_size": 1, "width": 64, "heads": 1, "layers": 1}

IMAGE = ("embed_dim", "vision_cfg")


@dataclass(frozen=True)
class ImageTower:
    """A timm model, what its pixels need, its timm name with the arguments that it was built with,
    and whether it has trained weights."""

    model: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    arguments: dict[str, Any]
    trained: bool
    source: str


def open_image_tower(model: str, weights: bool = True) -> ImageTower:
    """Open the image encoder that `model` names, in eval mode.

    Args:
        model: a run directory (its newest checkpoint), a checkpoint folder of a classification or
            contrastive run, or a timm name, whose weights are fresh.
        weights: false builds the model on the "meta" device, in seconds for any size.

    Raises:
        ValueError: nothing that can be opened.
    """
    folder = _find_folder(model)
    if folder is None:
        input_size(model)  # refuses names that timm does not know
        with torch.device("cpu" if weights else "meta"):
            tower = timm.create_model(model)
        return _describe(tower, model, {}, False, model)
    contrastive = (folder / CONFIG_FILE).is_file()
    try:
        settings = json.loads((folder / (CONFIG_FILE if contrastive else TIMM_FILE)).read_text())
        if contrastive:
            vision = settings["model_cfg"]["vision_cfg"]
            name, arguments = vision["timm_model_name"], vision.get(ARGUMENTS) or {}
            tower = _contrastive_tower(folder, settings["model_cfg"], weights)
        else:
            name, arguments = settings["architecture"], settings.get("model_args") or {}
            with torch.device("cpu" if weights else "meta"):
                tower = timm.create_model(f"local-dir:{folder}", pretrained=weights)
    except (RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"model '{model}' cannot be opened: {error}") from error
    return _describe(tower, name, arguments, weights, str(folder))


def _contrastive_tower(folder: Path, config: dict[str, Any], weights: bool) -> Any:
    if weights:
        return open_model(str(folder)).model.visual.trunk
    with torch.device("meta"):
        model: Any = build_clip({name: config[name] for name in IMAGE} | {"text_cfg": TEXT})
    return model.visual.trunk


def _describe(
    tower: Any, name: str, arguments: dict[str, Any], trained: bool, source: str
) -> ImageTower:
    settings = tower.pretrained_cfg
    size, mean, std = settings["input_size"][-1], settings["mean"], settings["std"]
    return ImageTower(tower.eval(), size, tuple(mean), tuple(std), name, arguments, trained, source)


def _find_folder(model: str) -> Path | None:
    """The checkpoint folder, or None when `model` is no folder."""
    path = Path(model)
    if not path.is_dir():
        if path.is_absolute() or model.startswith(("./", "runs/")):
            raise ValueError(f"model '{model}' does not exist")
        return None
    folders = [path, *sorted((path / "checkpoints").glob("step_*"), reverse=True)]
    for folder in folders:
        if (folder / CONFIG_FILE).is_file() or (folder / TIMM_FILE).is_file():
            return folder
    raise ValueError(f"model '{model}' holds no {CONFIG_FILE}, no {TIMM_FILE} and no checkpoint")
