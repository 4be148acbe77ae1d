"""Hugging Face text towers: their description for open_clip, weights, and files of a checkpoint.

open_clip's `HFTextEncoder` wraps the model. It masks the id that the model's config calls padding,
so that how far a row is padded does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils import logging

from encoders.hub import hub_folder, hub_name

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
HUB_PATTERNS = ("*.json", "*.txt", "*.model", "model*.safetensors")
# The last one is ours: open_clip has no such pooler and stops with a KeyError.
LAST_TOKEN = "last_token_pooler"
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler", "last": LAST_TOKEN}
# Where a checkpoint keeps the config of the model; the tokenizer is where open_clip looks for it.
TEXT_FOLDER = "text"
Pooling = Literal["mean", "cls", "last"]


class LastTokenPooler(nn.Module):
    """The hidden state of the last token of each row that is not padding."""

    def forward(self, output: Any, attention_mask: Tensor) -> Tensor:
        hidden = output.last_hidden_state
        last = attention_mask.sum(dim=1, keepdim=True).sub(1).clamp(min=0)
        index = last.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index).squeeze(1)


def text_model_folder(source: str | Path) -> Path:
    """The local folder of a model that is given as a path or as a name on the hub.

    Raises:
        ValueError: a name that can be had neither from the hub nor from its cache.
    """
    name = hub_name(str(source))
    return Path(source) if name is None else hub_folder(name, HUB_PATTERNS)


def hugging_face_text_config(
    source: str | Path,
    context_length: int,
    projection: Literal["linear", "mlp"] = "linear",
    pretrained: bool = True,
    pooling: Pooling = "mean",
) -> dict[str, Any]:
    """`text_cfg` of a Hugging Face model, pooled and projected.

    The description names a local folder by its absolute path and a model of the hub by its name, so
    that open_clip opens a checkpoint from any working directory as long as they can be reached. Our
    commands do not need them then: see `checkpoint_files`. open_clip's `create_model` overrides
    `hf_model_pretrained` with its own `pretrained_hf` argument: pass both.

    Args:
        source: a folder as written by `save_pretrained` of a model and its tokenizer, or the name
            of a model on the Hugging Face hub.
        context_length: tokens per caption, padding and special tokens included.
        projection: a linear map, or two with a GELU between, to the joint embedding.
        pretrained: load the weights; false builds the architecture with random ones.
        pooling: mean of the tokens, first token, or last token, padding left out. open_clip cannot
            open a checkpoint with the last one.

    Raises:
        ValueError: the folder is missing or incomplete, its model type cannot be wrapped, the
            weights are not safetensors, or the model has fewer positions than `context_length`.
    """
    if projection not in ("linear", "mlp"):
        raise ValueError(f"projection {projection!r}: choose 'linear' or 'mlp'")
    if pooling not in POOLERS:
        raise ValueError(f"pooling {pooling!r}: choose {', '.join(POOLERS)}")
    folder = text_model_folder(source)
    model = read_model_config(folder)
    if not _has_any(folder, TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer file ({', '.join(TOKENIZER_FILES)}): save the tokenizer "
            "beside the model"
        )
    if pretrained and not _has_any(folder, WEIGHT_FILES):
        raise ValueError(f"{folder} has no {WEIGHT_FILES[0]}: save the model as safetensors")
    _check_positions(folder, model, context_length)
    name = hub_name(str(source)) or str(folder.absolute())
    return {
        "hf_model_name": name,
        "hf_tokenizer_name": name,
        "context_length": context_length,
        "hf_proj_type": projection,
        "hf_pooler_type": POOLERS[pooling],
        "hf_model_pretrained": pretrained,
    }


def build_hugging_face_tokenizer(text_config: dict[str, Any]) -> HFTokenizer:
    """The tokenizer of a `text_cfg`, checked against the model.

    Raises:
        ValueError: tokenizer and model disagree on the padding id, the tokenizer has more entries
            than the model has embeddings, or it pads on the left.
    """
    folder = text_model_folder(text_config["hf_model_name"])
    model = read_model_config(folder)
    place = text_model_folder(text_config["hf_tokenizer_name"])
    wrapper = HFTokenizer(
        str(place), context_length=text_config["context_length"], local_files_only=True
    )
    tokenizer: Any = wrapper.tokenizer
    padding, entries = tokenizer.pad_token_id, len(tokenizer)
    if padding != model.pad_token_id:
        raise ValueError(
            f"the tokenizer in {place} pads with id {padding}, the model in {folder} expects "
            f"{model.pad_token_id}: set pad_token_id in its config.json to the tokenizer's"
        )
    if entries > model.vocab_size:
        raise ValueError(
            f"the tokenizer in {place} has {entries} entries, the model in {folder} "
            f"{model.vocab_size} embeddings: use the tokenizer it was trained with"
        )
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"the tokenizer in {place} pads on the left, where towers expect the first token: set"
            " padding_side in its tokenizer_config.json to right"
        )
    return wrapper


def read_pretrained_text(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a text model by their names in the tower, and what was left out.

    transformers reads them, for it knows shards, prefixes and older names. Left out are poolers and
    the heads of pretraining. A tensor that the architecture of `config.json` has no place for is
    there as a meta tensor, so that whoever loads them sees it.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    options: dict[str, Any] = {"config": config, "local_files_only": True, "dtype": torch.float32}
    if not config.is_encoder_decoder:
        options["add_pooling_layer"] = False
    with _quiet_transformers():
        read: Any = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **options,
        )
    model, info = read
    prefix = "encoder." if config.is_encoder_decoder else ""
    tower = model.encoder if config.is_encoder_decoder else model
    missing = {name.removeprefix(prefix) for name in info["missing_keys"]}
    tensors = {name: value for name, value in tower.state_dict().items() if name not in missing}
    for name, found, _ in info["mismatched_keys"]:
        tensors[name.removeprefix(prefix)] = torch.empty(found, device="meta")
    parts, left_out = {name for name, _ in tower.named_children()}, []
    for name in sorted(info["unexpected_keys"]):
        own = name.removeprefix(f"{model.base_model_prefix}.").removeprefix(prefix)
        if own.partition(".")[0] not in parts:
            left_out.append(name)
        elif not own.endswith("position_ids"):  # kept by old versions of transformers
            tensors[own] = torch.empty(0, device="meta")
    return tensors, left_out


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No table and no bars: what differs is told in one line by whoever loads the tensors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def checkpoint_files(text_config: dict[str, Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """JSON files that make a checkpoint with this tower independent of where the model came from.

    The config of the model goes into a folder of its own, the tokenizer beside
    `open_clip_config.json`, where open_clip looks for it.

    Raises:
        ValueError: the tokenizer cannot be written as `tokenizer.json`.
    """
    folder = text_model_folder(text_config["hf_model_name"])
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = {path.name: _read_json(path) for path in sorted(Path(place).glob("*.json"))}
    if "tokenizer.json" not in files:
        raise ValueError(
            f"the tokenizer of {folder} has no fast version (tokenizer.json), which checkpoints"
            " keep: convert it with transformers and save it"
        )
    # The weights of a checkpoint are float32, whatever the model was published in.
    model = _read_json(folder / "config.json") | {"dtype": "float32"}
    model.pop("torch_dtype", None)
    return files | {f"{TEXT_FOLDER}/config.json": model}


def read_model_config(folder: Path) -> PretrainedConfig:
    """The config of a model that open_clip can wrap.

    Raises:
        ValueError: there is none, or open_clip cannot wrap the model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a saved Hugging Face model")
    model_type = _read_json(path).get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: open_clip cannot wrap model type {model_type!r}; it takes "
            f"{', '.join(MODEL_TYPES)}"
        )
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): save the model again") from error


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _check_positions(folder: Path, model: PretrainedConfig, context_length: int) -> None:
    positions = getattr(model, "max_position_embeddings", None)  # mt5 has relative positions
    if positions is not None and model.model_type in OFFSET_POSITIONS:
        positions -= model.pad_token_id + 1
    if context_length < 1 or (positions is not None and context_length > positions):
        raise ValueError(
            f"context_length {context_length} does not fit {folder}: choose 1 to {positions or 512}"
        )
