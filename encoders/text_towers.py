"""Text towers for open_clip's model factory, and the tokenizers that belong to them.

Two kinds: open_clip's own transformer, trained from scratch on the CLIP byte-pair vocabulary, and a
Hugging Face model in a local folder, frozen or trained. Each is described by the `text_cfg` part of
an open_clip model config, so that a checkpoint opens in open_clip as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from transformers import AutoConfig, PretrainedConfig

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
