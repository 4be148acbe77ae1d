"""Whether initial weights belong to the model that is built.

Weights of another activation, router or number of heads can fit by name and shape and still be
another function, so descriptions are compared wherever a source has one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIPTextCfg
from transformers.activations import ACT2FN

from contrastive.weight_sources import PIXELS, Source, read_hidden
from encoders.clip_model import ARGUMENTS
from encoders.hugging_face_text import text_model_folder
from encoders.variants import input_size
from training.checkpoint import CheckpointError

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
        own = read_hidden(text_model_folder(ours["hf_model_name"]))
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


def _arguments(arguments: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """As they come back from JSON, without those that timm notes but that change nothing."""
    plain = json.loads(json.dumps(dict(arguments or {})))
    size = plain.get("img_size")
    if isinstance(size, list) and len(set(size)) == 1:
        plain["img_size"] = size[0]
    # Where the norm stands shows in its name.
    usual = {"img_size": input_size(name), "in_chans": 3, "fc_norm": False}
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
