"""Where initial weights of a tower come from, and whether they belong to the model that is built.

Weights of another activation, router or number of heads can fit by name and shape and still be
another function, so descriptions are compared wherever a source has one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, convert_to_custom_text_state_dict
from torch import Tensor
from transformers import AutoConfig
from transformers.activations import ACT2FN

from contrastive.transformers_names import image_names, text_names
from encoders.clip_model import ARGUMENTS, DESCRIBED
from encoders.hub import HUB_PREFIX, hub_folder
from encoders.hugging_face_text import TEXT_FOLDER, text_model_folder
from encoders.variants import input_size
from training.checkpoint import CheckpointError, load_tensors, newest_checkpoint

# Where a dual encoder exported for transformers keeps its description.
MODEL_CONFIG = "model_cfg"
# Of transformers, whose text towers open_clip's transformer can hold.
IMAGE_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "vit")
TEXT_TYPES = ("clip", "clip_text_model", "soft_moe_clip", "soft_moe_siglip")
LOCAL_PREFIX = "local-dir:"
PIXELS = "pixels"  # where a description of ours keeps mean and std
CLIP_FILE, TIMM_FILE = "open_clip_config.json", "config.json"
CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
TIMM_WEIGHTS = ("model.safetensors",)
# Of a text config: what shapes show, and what the weights do not depend on.
NOT_COMPARED = {
    "context_length", "hf_model_name", "hf_model_pretrained", "hf_proj_type", "hf_tokenizer_name",
    "layers", "mlp_ratio", "output_tokens", "tokenizer_kwargs", "vocab_size", "width",
}  # fmt: skip
# Settings by what they are called in a text config; towers differ in nothing else.
SETTINGS = {
    "bag_of_words": "text.kind",
    "causal_soft_moe": "text.moe_blocks and its sizes",
    "heads": "text.heads",
    "hf_pooler_type": "text.pooling",
    "quick_gelu": "text.quick_gelu",
}
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
    tensors = load_tensors(path if path.is_file() else _weights(path, TIMM_WEIGHTS))
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
    return Source(str(path), tower, True, config, _hidden(path / TEXT_FOLDER))


def _transformers_text_source(path: Path, settings: Mapping[str, Any]) -> Source:
    """The text tower of transformers' CLIP, or of a dual encoder exported for transformers."""
    tensors = load_tensors(_weights(path, TIMM_WEIGHTS))
    converted = text_names(tensors, settings)
    if converted is None:
        found, described = _inside(tensors, "text."), settings[MODEL_CONFIG]
    else:
        found, described = converted
    return Source(str(path), found, True, described, settings.get("text_model") or {})


def check_image_description(source: Source, vision: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the weights belong to the model of `vision`, a `vision_cfg`."""
    if not source.description:
        return
    _check_pool(source, vision)
    theirs, ours = source.description.get("timm_model_name"), vision["timm_model_name"]
    if theirs is None:  # of transformers, which has no timm names
        return
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        raise CheckpointError(
            f"image.init_from: '{source.name}' is a {theirs}: set image.name to it, not to {ours}"
        )
    needed, given = (
        _arguments(config.get(ARGUMENTS), ours) for config in (source.description, vision)
    )
    if given != needed:
        raise CheckpointError(
            f"image.init_from: '{source.name}' was trained with arguments {json.dumps(needed)},"
            f" image.arguments is {json.dumps(given)}: write --image.arguments"
            f" '{json.dumps(needed)}'"
        )


def _check_pool(source: Source, vision: Mapping[str, Any]) -> None:
    pool = source.description.get("timm_pool", vision["timm_pool"])
    if pool != vision["timm_pool"]:
        raise CheckpointError(
            f"image.init_from: '{source.name}' pools its tokens by '{pool}', the tower here by"
            f" '{vision['timm_pool']}': set image.pooling accordingly, or choose other weights"
        )


def check_text_description(source: Source, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the weights belong to the text tower of `config`."""
    if not source.description:
        return
    theirs, ours = source.description["text_cfg"], config["text_cfg"]
    kinds = ["hugging_face" if "hf_model_name" in text else "open_clip" for text in (theirs, ours)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"text.init_from: the text tower of '{source.name}' is of text.kind {kinds[0]}, not"
            f" {kinds[1]}: set text.kind to it"
        )
    found, built = _visible(source.description), _visible(config)
    if kinds[1] == "hugging_face":
        own = _hidden(text_model_folder(ours["hf_model_name"]))
        found |= {name: value for name, value in source.hidden.items() if name in own}
        built |= {name: value for name, value in own.items() if name in source.hidden}
    for name in sorted(found.keys() | built.keys()):
        if found.get(name) != built.get(name):
            setting = SETTINGS.get(name)
            remedy = "choose other weights" if setting is None else f"set {setting} accordingly"
            raise CheckpointError(
                f"text.init_from: '{source.name}' has {name} {json.dumps(found.get(name))}, the"
                f" tower here {json.dumps(built.get(name))}: {remedy}"
            )


def _resolve(source: str, setting: str) -> Path:
    """The folder or file that holds the weights."""
    if source.startswith(HUB_PREFIX):
        name = source.removeprefix(HUB_PREFIX)
        described = hub_folder(name, (CLIP_FILE, TIMM_FILE))
        weights = CLIP_WEIGHTS if (described / CLIP_FILE).is_file() else TIMM_WEIGHTS
        return hub_folder(name, (CLIP_FILE, TIMM_FILE, *weights))
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
        f"'{folder}' has no {names[0]}; weights are read from safetensors only, for other formats"
        " can run code"
    )


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
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image")):
        if (path / name).is_file():
            content = _read_json(path / name)
            content = content if part is None else content.get("image_processor") or {}
            named = {"mean": content.get("image_mean"), "std": content.get("image_std")}
            return _pixels(named)
    return {}


def check_hidden(source: Source, trunk: Any) -> None:
    """Raise CheckpointError for weights of another number of heads or another activation than a
    timm transformer has, which fit all the same."""
    blocks = getattr(trunk, "blocks", None)
    if not source.hidden or not blocks:
        return
    block: Any = blocks[0]
    probe = torch.linspace(-3, 3, 13)
    activation = getattr(block.mlp, "act", None)
    heads, name = block.attn.num_heads, source.hidden["hidden_act"]
    same = activation is None or torch.allclose(activation(probe), ACT2FN[name](probe), atol=1e-6)
    if heads != source.hidden["num_attention_heads"] or not same:
        raise CheckpointError(
            f"image.init_from: '{source.name}' has {json.dumps(source.hidden)}, the model here"
            f" {heads} heads and {type(activation).__name__}: choose the timm model of these"
            " weights, or set act_layer among image.arguments (quick_gelu, gelu, gelu_tanh)"
        )


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


def check_pixels(
    source: Source, settings: Mapping[str, Any], setting: str = "image.init_from"
) -> None:
    """Raise CheckpointError for weights that were trained on pixels of another normalisation.

    Args:
        settings: with the `mean` and `std` of the tower.
        setting: what the message calls the source.
    """
    for name, needed in source.description.get(PIXELS, {}).items():
        if not all(map(math.isclose, needed, settings[name])):
            raise CheckpointError(
                f"{setting}: '{source.name}' was trained with pixel {name} {needed}, the"
                f" model here has {list(settings[name])}: choose a model and weights that agree"
            )


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


def _arguments(arguments: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """As they come back from JSON, without those that timm notes but that change nothing."""
    plain = json.loads(json.dumps(dict(arguments or {})))
    size = plain.get("img_size")
    if isinstance(size, list) and len(set(size)) == 1:
        plain["img_size"] = size[0]
    usual = {"img_size": input_size(name), "in_chans": 3}
    return {key: value for key, value in plain.items() if (key, value) not in usual.items()}


def _visible(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the function of a text tower depends on besides its weights."""
    text = config["text_cfg"]
    defaults = {item.name: item.default for item in dataclasses.fields(CLIPTextCfg)}
    seen = {n: v for n, v in (defaults | dict(text)).items() if n not in NOT_COMPARED}
    if "hf_model_name" not in text:
        seen["tokenizer"] = text.get("hf_tokenizer_name")
        seen["quick_gelu"] = bool(config.get("quick_gelu"))
    return json.loads(json.dumps(seen))


def _hidden(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    content = _read_json(path) if path.is_file() else {}
    return {name: content[name] for name in HIDDEN if name in content}
