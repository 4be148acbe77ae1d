"""Where initial weights of a tower come from; `contrastive.weight_checks` says whether they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor
from transformers import AutoConfig

from contrastive.transformers_names import image_names, text_names
from encoders.clip_model import ARGUMENTS, DESCRIBED
from encoders.hub import HUB_PREFIX, hub_folder
from encoders.hugging_face_text import TEXT_FOLDER
from training.checkpoint import CheckpointError, load_tensors, newest_checkpoint

# Where a dual encoder exported for transformers keeps its description.
MODEL_CONFIG = "model_cfg"
# Of transformers, whose text towers open_clip's transformer can hold.
IMAGE_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit")
TEXT_TYPES = ("clip", "clip_text_model", "soft_moe_clip", "soft_moe_siglip")
LOCAL_PREFIX = "local-dir:"
PIXELS = "pixels"  # where a description of ours keeps mean and std
CLIP_FILE, TIMM_FILE = "open_clip_config.json", "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
TIMM_WEIGHTS = ("model.safetensors",)
INDEX = "model.safetensors.index.json"  # of weights in several files, which transformers writes
SEVERAL = "model-*.safetensors"
# Of the config of a Hugging Face model: what shapes do not show.
HIDDEN = ("hidden_act", "model_type", "num_attention_heads", "num_heads", "position_embedding_type")


@dataclass(frozen=True)
class Source:
    """Tensors by their names in open_clip's tower.

    `whole` says that the projection is among them. `description` is that of the model they are
    from, empty if unknown: a `vision_cfg` for image towers, a `model_cfg` for text towers. `hidden`
    are settings of a Hugging Face model that shapes do not show, `left_out` names of parameters
    that no tower here has.
    """

    name: str
    tensors: Mapping[str, Tensor]
    whole: bool
    description: Mapping[str, Any] = field(default_factory=dict)
    hidden: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def image_source(source: str, setting: str = "image.init_from") -> Source:
    """Read the image encoder of a classification or contrastive run, checkpoint, folder or file.

    Args:
        setting: what messages call it.

    Raises:
        CheckpointError: there is none.
    """
    path = _resolve(source, setting)
    if (path / CLIP_FILE).is_file():
        description = _read_model_config(path)["vision_cfg"]
        description[PIXELS] = _pixels(_read_json(path / CLIP_FILE).get("preprocess_cfg", {}))
        if not description.get("timm_model_name"):
            raise CheckpointError(
                f"{setting}: the image tower of '{path}' is open_clip's own, towers here are"
                " timm's: give timm's version of these weights (hf-hub:timm/...)"
            )
        tensors = load_tensors(_weights(path, CLIP_WEIGHTS))
        return Source(str(path), _inside(tensors, "visual."), True, description)
    tensors = load_tensors(path) if path.is_file() else _read_weights(path)
    settings = _read_transformers(path)
    if any(name.startswith("visual.") for name in tensors):  # a file of a dual encoder's weights
        vision = settings.get(MODEL_CONFIG, {}).get("vision_cfg", {})
        return Source(str(path), _inside(tensors, "visual."), True, vision)
    converted = image_names(tensors, settings)
    if converted is not None:
        described = {"timm_pool": converted.pool, PIXELS: _read_processor(path)}
        return Source(
            str(path), converted.tensors, converted.whole, described, converted.hidden,
            converted.left_out,
        )  # fmt: skip
    named = {f"trunk.{name}": value for name, value in tensors.items()}
    return Source(str(path), named, False, _read_timm_description(path / TIMM_FILE))


def text_source(source: str) -> Source:
    """Read the text tower of an open_clip folder, a contrastive run, checkpoint or file.

    Raises:
        CheckpointError: there is none.
    """
    path = _resolve(source, "text.init_from")
    described = (path / CLIP_FILE).is_file()
    settings = _read_transformers(path)
    if settings.get("model_type") in TEXT_TYPES:
        return _transformers_text_source(path, settings)
    if not described and path.is_dir():
        raise CheckpointError(
            f"text.init_from: '{path}' has no {CLIP_FILE}: give an open_clip folder or a"
            " contrastive run; a Hugging Face model goes into text.folder"
        )
    tensors = load_tensors(_weights(path, CLIP_WEIGHTS) if described else path)
    tower = _inside(convert_to_custom_text_state_dict(tensors), "text.")
    if not tower:
        raise CheckpointError(f"text.init_from: '{path}' holds no text tower")
    # Old versions of transformers kept them.
    tower.pop("transformer.embeddings.position_ids", None)
    config = _read_model_config(path) if described else {}
    return Source(str(path), tower, True, config, read_hidden(path / TEXT_FOLDER))


def _transformers_text_source(path: Path, settings: Mapping[str, Any]) -> Source:
    """The text tower of transformers' CLIP, or of a dual encoder exported for transformers."""
    tensors = _read_weights(path)
    converted = text_names(tensors, settings)
    if converted is None:
        found, described = _inside(tensors, "text."), settings[MODEL_CONFIG]
    else:
        found, described = converted
    return Source(str(path), found, True, described, settings.get("text_model") or {})


def _resolve(source: str, setting: str) -> Path:
    """The folder or file that holds the weights."""
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        told = (CLIP_FILE, TIMM_FILE, *PROCESSORS, f"{TEXT_FOLDER}/config.json")
        described = hub_folder(name, told)
        several = (*TIMM_WEIGHTS, INDEX, SEVERAL)
        weights = CLIP_WEIGHTS if (described / CLIP_FILE).is_file() else several
        return hub_folder(name, (*told, *weights))
    path = Path(source.removeprefix(LOCAL_PREFIX))
    if (path / "checkpoints").is_dir():
        newest, _ = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"{setting} '{source}' holds no complete checkpoint")
        return newest
    if not path.exists():
        raise CheckpointError(f"{setting} '{source}' does not exist")
    if path.name in (*CLIP_WEIGHTS, *TIMM_WEIGHTS):  # what is beside them describes them
        described = any((path.parent / name).is_file() for name in (CLIP_FILE, TIMM_FILE))
        return path.parent if described else path
    return path


def _weights(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"'{folder}' has no {names[0]}; only safetensors are read, because loading other formats"
        " can run code"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors that timm or transformers has written, from one file or from several."""
    if not (folder / INDEX).is_file():
        return load_tensors(_weights(folder, TIMM_WEIGHTS))
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values())):
        if not fnmatch(name, SEVERAL) or "/" in name or not (folder / name).is_file():
            raise CheckpointError(f"'{folder / INDEX}' names '{name}', which is not beside it")
        tensors |= load_tensors(folder / name)
    return tensors


def _read_model_config(folder: Path) -> dict[str, Any]:
    path = folder / CLIP_FILE
    config = _read_json(path).get("model_cfg", {})
    if not {"vision_cfg", "text_cfg"} <= config.keys():
        raise CheckpointError(f"'{path}' describes no open_clip model: it lacks model_cfg")
    return config


def _read_transformers(path: Path) -> dict[str, Any]:
    """The config of a model that transformers saved; empty for anything else."""
    file = path / TIMM_FILE
    if not file.is_file():
        return {}
    content = _read_json(file)
    if content.get("model_type") in IMAGE_TYPES + TEXT_TYPES[:2]:  # files leave defaults out
        return AutoConfig.from_pretrained(path, local_files_only=True).to_dict()
    return {} if "architecture" in content else content


def _read_processor(path: Path) -> dict[str, list[float]]:
    """Mean and deviation of the pixels from the files of a processor, as far as they are told."""
    for name in PROCESSORS:
        if (path / name).is_file():
            content = _read_json(path / name)
            content = content.get("image_processor") or content
            named = {"mean": content.get("image_mean"), "std": content.get("image_std")}
            return _pixels(named)
    return {}


def _read_timm_description(path: Path) -> dict[str, Any]:
    """A timm `config.json` as a `vision_cfg`; nothing where there is none."""
    if not path.is_file():
        return {}
    content = _read_json(path)
    if "architecture" not in content:
        raise CheckpointError(f"'{path}' describes no timm model: it lacks architecture")
    arguments = content.get("model_args") or {}
    description = {
        "timm_model_name": content["architecture"],
        ARGUMENTS: {name: value for name, value in arguments.items() if name not in DESCRIBED},
    }
    pool = arguments.get("global_pool", content.get("global_pool"))
    if pool is not None:
        description["timm_pool"] = pool
    return description | {PIXELS: _pixels(content.get("pretrained_cfg") or {})}


def _pixels(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and standard deviation of the pixels, as far as they are told."""
    return {name: list(settings[name]) for name in ("mean", "std") if settings.get(name)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}") from error


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def read_hidden(folder: Path) -> dict[str, Any]:
    """Of the config of a Hugging Face model, what the function of its weights depends on."""
    path = folder / "config.json"
    content = _read_json(path) if path.is_file() else {}
    return {name: content[name] for name in HIDDEN if name in content}
