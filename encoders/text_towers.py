"""Text towers for open_clip's model factory, and the tokenizers that belong to them.

Two kinds: open_clip's own transformer, trained from scratch on the CLIP byte-pair vocabulary, and a
Hugging Face model in a local folder, frozen or trained. Each is described by the `text_cfg` part of
an open_clip model config, so that a checkpoint opens in open_clip as it is. The exception is
open_clip's transformer with Soft MoE in some blocks: open_clip has no such model and refuses its
description, which `build_clip` understands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from encoders.causal_soft_moe import CausalSoftMoE
from encoders.vision_transformer import resolve_moe_blocks

# The architectures that open_clip's HFTextEncoder can wrap (`open_clip/hf_configs.py`).
MODEL_TYPES = ("bert", "m2m_100", "mt5", "roberta", "xlm-roberta")
# RoBERTa numbers positions from the padding id + 1, so that many of them are never used.
OFFSET_POSITIONS = ("roberta", "xlm-roberta")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
# Where a `text_cfg` describes routed blocks; open_clip refuses the key as an unknown argument.
ROUTED_BLOCKS = "causal_soft_moe"


def open_clip_text_config(
    width: int, heads: int, layers: int, context_length: int, vocab_size: int = 49408
) -> dict[str, Any]:
    """`text_cfg` of open_clip's own text transformer; 49,408 is the CLIP vocabulary.

    Raises:
        ValueError: a size is not positive or `heads` does not divide `width`.
    """
    config = {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "width": width,
        "heads": heads,
        "layers": layers,
    }
    for name, value in config.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} heads: change one of them")
    return config


def route_text_blocks(
    text_config: dict[str, Any],
    moe_blocks: int | Sequence[int],
    num_experts: int,
    slots_per_expert: int = 1,
    block_size: int = 1,
) -> dict[str, Any]:
    """`text_cfg` of `open_clip_text_config` with causal Soft MoE in place of some blocks' MLPs.

    Stock open_clip cannot load a checkpoint of such a model and says that it does not know the key
    `causal_soft_moe`; `build_clip` builds the model that the weights belong to.

    Args:
        text_config: of open_clip's own transformer.
        moe_blocks: indices of the routed blocks; an int N means the last N.
        num_experts, slots_per_expert, block_size: see `encoders.causal_soft_moe.CausalSoftMoE`.

    Raises:
        ValueError: a Hugging Face model, a block that does not exist, or a size below 1.
    """
    if "hf_model_name" in text_config:
        raise ValueError("moe_blocks need open_clip's text transformer, not a Hugging Face model")
    sizes = {
        "num_experts": num_experts,
        "slots_per_expert": slots_per_expert,
        "block_size": block_size,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    blocks = resolve_moe_blocks(moe_blocks, text_config["layers"])
    if not blocks:
        return text_config
    return text_config | {ROUTED_BLOCKS: {"blocks": list(blocks), **sizes}}


class RoutedTextBlock(ResidualAttentionBlock):
    """The parts of an open_clip block with another module in place of its MLP."""

    def __init__(self, dense: ResidualAttentionBlock, mlp: CausalSoftMoE) -> None:
        nn.Module.__init__(self)  # the parts exist already
        for name, module in dense.named_children():
            self.add_module(name, mlp if name == "mlp" else module)

    def get_weight_dtype(self) -> torch.dtype:
        mlp: Any = self.mlp
        return mlp.experts.fc1_bias.dtype  # an adapted kernel would be summed up for its type


def build_clip(model_config: dict[str, Any], output_dict: bool = False) -> CustomTextCLIP:
    """A fresh open_clip dual encoder from its description, routed text blocks included.

    Without routed blocks open_clip's own factory builds the same model. The experts of a routed
    block start as the MLP that open_clip has drawn for it, so that the tower starts with
    open_clip's variances; their GELU is the tanh form.

    Args:
        model_config: `model_cfg` of an `open_clip_config.json` with `custom_text`.
        output_dict: whether calls return a dict of features.
    """
    config = {name: value for name, value in model_config.items() if name != "custom_text"}
    text_config = dict(config["text_cfg"])
    routed = text_config.pop(ROUTED_BLOCKS, None)
    model = CustomTextCLIP(**config | {"text_cfg": text_config}, output_dict=output_dict)
    if routed is not None:
        options = {name: value for name, value in routed.items() if name != "blocks"}
        layers: Any = model.text.transformer.resblocks
        for index in routed["blocks"]:
            layers[index] = _route(layers[index], options)
    return model


def _route(block: ResidualAttentionBlock, options: dict[str, Any]) -> RoutedTextBlock:
    dense: Any = block.mlp
    fc1, fc2 = dense.c_fc, dense.c_proj
    layer = CausalSoftMoE(fc1.in_features, hidden_dim=fc1.out_features, **options)
    with torch.no_grad():
        layer.experts.fc1_weight.copy_(fc1.weight.T)
        layer.experts.fc1_bias.copy_(fc1.bias)
        layer.experts.fc2_weight.copy_(fc2.weight.T)
        layer.experts.fc2_bias.copy_(fc2.bias)
    return RoutedTextBlock(block, layer)


def hugging_face_text_config(
    folder: str | Path,
    context_length: int,
    projection: Literal["linear", "mlp"] = "linear",
    pretrained: bool = True,
) -> dict[str, Any]:
    """`text_cfg` of a Hugging Face model in a local folder, mean-pooled and projected.

    The description names the folder by its absolute path, so that a checkpoint opens from any
    working directory; the folder must stay where it is, because the architecture and the
    tokenizer are read from it. Building the tower loads nothing from a network. open_clip's
    `create_model` overrides `hf_model_pretrained` with its own `pretrained_hf` argument: pass both.

    Args:
        folder: as written by `save_pretrained` of a model and its tokenizer.
        context_length: tokens per caption, padding and special tokens included.
        projection: a linear map, or two with a GELU between, to the joint embedding.
        pretrained: load the folder's weights; false builds the architecture with random ones.

    Raises:
        ValueError: the folder is missing or incomplete, its model type cannot be wrapped, the
            weights are not safetensors, or the model has fewer positions than `context_length`.
    """
    folder = Path(folder)
    if projection not in ("linear", "mlp"):
        raise ValueError(f"projection {projection!r}: choose 'linear' or 'mlp'")
    model = _read_model_config(folder)
    if not _has_any(folder, TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer file ({', '.join(TOKENIZER_FILES)}): save the tokenizer "
            "beside the model"
        )
    if pretrained and not _has_any(folder, WEIGHT_FILES):
        raise ValueError(f"{folder} has no {WEIGHT_FILES[0]}: save the model as safetensors")
    _check_positions(folder, model, context_length)
    return {
        "hf_model_name": str(folder.absolute()),
        "hf_tokenizer_name": str(folder.absolute()),
        "context_length": context_length,
        "hf_proj_type": projection,
        "hf_pooler_type": "mean_pooler",
        "hf_model_pretrained": pretrained,
    }


def build_tokenizer(text_config: dict[str, Any]) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer of a `text_cfg`; it maps strings to int64 (B, context_length).

    The tower masks the id its *model* config calls padding, so a tokenizer that pads with another
    id would make it read padding as words: that is refused.

    Raises:
        ValueError: tokenizer and model disagree on the padding id, or the tokenizer has more
            entries than the model has embeddings.
    """
    context_length = text_config.get("context_length", DEFAULT_CONTEXT_LENGTH)
    if "hf_model_name" not in text_config:
        return SimpleTokenizer(context_length=context_length)
    folder = Path(text_config["hf_model_name"])
    model = _read_model_config(folder)
    name = text_config["hf_tokenizer_name"]
    wrapper = HFTokenizer(name, context_length=context_length, local_files_only=True)
    tokenizer: Any = wrapper.tokenizer
    padding, entries = tokenizer.pad_token_id, len(tokenizer)
    if padding != model.pad_token_id:
        raise ValueError(
            f"the tokenizer in {name} pads with id {padding}, the model in {folder} expects "
            f"{model.pad_token_id}: set pad_token_id in its config.json to the tokenizer's"
        )
    if entries > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {name} has {entries} entries, the model in {folder} "
            f"{model.vocab_size} embeddings: use the tokenizer it was trained with"
        )
    return wrapper


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _read_model_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a saved Hugging Face model")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again") from error
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: open_clip cannot wrap model type {model_type!r}; it takes "
            f"{', '.join(MODEL_TYPES)}"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _check_positions(folder: Path, model: PretrainedConfig, context_length: int) -> None:
    positions = getattr(model, "max_position_embeddings", None)  # mt5 has relative positions
    if positions is not None and model.model_type in OFFSET_POSITIONS:
        positions -= model.pad_token_id + 1
    if context_length < 1 or (positions is not None and context_length > positions):
        raise ValueError(
            f"context_length {context_length} does not fit {folder}: choose 1 to {positions or 512}"
        )
