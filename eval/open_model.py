"""Opening a dual encoder for evaluation: a run, a checkpoint, an export, or any open_clip model."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import load_file
from torch import Tensor

from encoders.clip_model import build_clip, opens_in_open_clip
from encoders.hugging_face_text import TEXT_FOLDER
from encoders.text_towers import build_tokenizer

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode with what its inputs need.

    `image_size` in pixels, `mean` and `std` of its pixels, `resize_mode` and `interpolation` as the
    model was trained with, `source`, the folder or name that was opened, and `description`, what
    the model is built from besides its weights.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_mode: str
    interpolation: str
    source: str
    description: str = ""


def open_model(model: str, pretrained: str | None = None) -> OpenedModel:
    """Open `model` with open_clip; what open_clip cannot build is built here.

    Of a checkpoint that carries the config and the tokenizer of its Hugging Face text tower, those
    are used, for the model they came from may be gone.

    Args:
        model: a run directory (its newest checkpoint), a folder with `open_clip_config.json`, or
            a model name that open_clip knows, such as `ViT-B-32` or `hf-hub:...`.
        pretrained: open_clip's weights tag or file, for names.

    Raises:
        ValueError: nothing that can be opened.
    """
    folder = _find_folder(model)
    if folder is None and ":" not in model:
        _check_name(model, pretrained)
    name = model if folder is None else f"local-dir:{folder}"
    description = None if folder is None else _read_description(folder)
    try:
        if (
            folder
            and description
            and (_carries_text(folder) or not opens_in_open_clip(description["model_cfg"]))
        ):
            opened = _open_ours(folder, description)
        else:
            opened = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"model '{model}' cannot be opened: {error}") from error
    opened.eval()
    if description is None:
        tokenizer = open_clip.get_tokenizer(name)
    else:
        tokenizer = build_tokenizer(description["model_cfg"]["text_cfg"])
    settings = open_clip.get_model_preprocess_cfg(opened)
    size = settings["size"]
    # "random" is drawn in training only; open_clip evaluates such models with bicubic.
    interpolation = settings["interpolation"].replace("random", "bicubic")
    return OpenedModel(
        opened,
        tokenizer,
        size if isinstance(size, int) else int(size[0]),
        tuple(settings["mean"]),
        tuple(settings["std"]),
        settings["resize_mode"],
        interpolation,
        str(folder or model),
        model if description is None else json.dumps(description["model_cfg"], sort_keys=True),
    )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): export the model again") from error
    for part in ("text_cfg", "vision_cfg"):
        if part not in description.get("model_cfg", {}):
            raise ValueError(f"{path} describes no open_clip model: it lacks model_cfg.{part}")
    if _carries_text(folder):
        description["model_cfg"]["text_cfg"] |= {
            "hf_model_name": str(folder / TEXT_FOLDER),
            "hf_tokenizer_name": str(folder),
            "hf_model_pretrained": False,
        }
    return description


def _carries_text(folder: Path) -> bool:
    return (folder / TEXT_FOLDER / "config.json").is_file()


def _open_ours(folder: Path, description: dict[str, Any]) -> Any:
    """What open_clip's `create_model` does, for a model that it cannot build."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the weights are read from it")
    model: Any = build_clip(description["model_cfg"])
    model.load_state_dict(load_file(path))
    settings = description["preprocess_cfg"] | {"size": model.visual.image_size}
    open_clip.set_model_preprocess_cfg(model, settings)
    return model


def _missing(path: Path) -> str:
    """What to say of a folder that does not exist; with its neighbours, if it was a checkpoint."""
    beside = sorted(p.name for p in path.parent.glob("step_*") if p.is_dir())
    there = f"; '{path.parent}' holds {', '.join(beside)}" if beside else ""
    return f"model '{path}' does not exist{there}"


def _check_name(model: str, pretrained: str | None) -> None:
    """Raise ValueError unless open_clip knows the name and is told which weights to load."""
    name = model.replace("/", "-")  # as open_clip does
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model '{model}' is no folder here and no model of open_clip{hint}")
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        choice = f"one of {', '.join(tags)}" if tags else "a file of weights"
        raise ValueError(f"model '{model}' needs weights: set --pretrained to {choice}")


def _find_folder(model: str) -> Path | None:
    """The folder with the model's description, or None when `model` is no folder."""
    path = Path(model)
    if not path.is_dir():
        inside = path.parent != Path() and path.parent.is_dir()
        if inside or path.is_absolute() or model.startswith(("./", "runs/")):
            raise ValueError(_missing(path))
        return None
    if (path / CONFIG_FILE).is_file():
        return path
    checkpoints = sorted((path / "checkpoints").glob(f"step_*/{CONFIG_FILE}"))
    if not checkpoints:
        raise ValueError(
            f"model '{model}' holds no {CONFIG_FILE} and no checkpoint of a contrastive run"
        )
    return checkpoints[-1].parent
