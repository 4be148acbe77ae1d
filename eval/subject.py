"""The model that is evaluated, wherever it comes from: one adapter for each kind of source."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.transforms import eval_transform
from encoders.pixels import Normalize
from eval.embedder import PROBES
from eval.image_tower import TIMM_FILE, ImageTower, open_image_tower
from eval.open_model import OpenedModel, open_model

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PADDED_TO_THE_END = {"siglip", "siglip2"}  # model types that were trained on full-length texts


class Identity:
    """Hashes of a model, made when they are asked for, and once.

    Args:
        model: the module with the weights.
        settings: whatever embeddings depend on besides the modules and the inputs, as JSON.
    """

    def __init__(self, model: nn.Module, settings: list[Any]) -> None:
        self.model, self.settings = model, settings

    @cached_property
    def weights_sha256(self) -> str:
        """Of the weights alone."""
        return weights_hash(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, architecture, pixels and tokens."""
        modules = re.sub(" at 0x[0-9a-f]+", "", str(self.model))  # functions show their addresses
        content = [self.weights_sha256, modules, self.settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Subject:
    """A model behind three functions, which run in its precision and answer float32 on the CPU.

    `for_set` chooses how pictures are resized; before it, `transform` and `preprocess` are those
    of a transformers model, or empty. `transform` makes uint8 (3, H, W) what `encode_image` and
    `features` take in batches;
    `encode_image` and `encode_text` answer (B, d), `features` (B, f) before the projection;
    both encoders are None for an image encoder.
    """

    name: str
    source: str
    identity: Identity
    precision: str
    preprocess: dict[str, Any]
    transform: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    encode_image: Callable[[Tensor], Tensor] | None = None
    encode_text: Callable[[list[str]], Tensor] | None = None
    resize: Callable[[str | None], tuple[Callable[[Tensor], Tensor], dict[str, Any]]] | None = None

    def for_set(self, resize_mode: str | None) -> Subject:
        """The subject with the transform for a set that overrides the model's resize mode, or not.

        Raises:
            ValueError: a resize mode that is not supported.
        """
        if self.resize is None:
            if resize_mode is not None:
                raise ValueError("resize_mode cannot be set: transformers models bring their own")
            return self
        transform, preprocess = self.resize(resize_mode)
        return replace(self, transform=transform, preprocess=preprocess)


def _identity(image: Tensor) -> Tensor:
    return image


def open_subject(
    model: str,
    pretrained: str | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    adjust: Callable[[Any, str], None] | None = None,
) -> Subject:
    """Open one of our runs and exports, an open_clip, transformers or timm model.

    Args:
        model: a run directory, a checkpoint or export folder, a transformers folder (its
            `config.json` has a `model_type`), an open_clip name, `hf-hub:...`, or
            `transformers:NAME` for what the Hugging Face cache or hub has.
        pretrained: open_clip's weights tag or file, for names.
        precision: fp32, bf16 or fp16, by autocast.
        adjust: called with the opened model and its source, to put other weights in.

    Raises:
        ValueError: nothing that can be opened, an unknown precision, or a transformers model that
            is to be adjusted.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown: choose {', '.join(PRECISIONS)}")
    call = Caller(torch.device(device), PRECISIONS[precision])
    folder, _, name = model.rpartition("transformers:")
    if model.startswith("transformers:") and not folder:
        _refuse_adjusting(model, adjust)
        return _transformers_subject(name, call, precision)
    if Path(model).is_dir():
        config = Path(model) / TIMM_FILE
        settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if "model_type" in settings:
            _refuse_adjusting(model, adjust)
            return _transformers_subject(model, call, precision)
        if "architecture" in settings or _is_classification_run(Path(model)):
            tower = open_image_tower(model)
            if adjust is not None:
                adjust(tower.model, tower.source)
            tower.model.to(call.device)
            return from_tower(model, tower, call, precision)
    opened = open_model(model, pretrained)
    if adjust is not None:
        adjust(opened.model, opened.source)
    opened.model.to(call.device)
    return from_opened(model, opened, call, precision)


def _refuse_adjusting(model: str, adjust: object) -> None:
    if adjust is not None:
        raise ValueError(f"'{model}' is a transformers model: it has one state of weights")


def _is_classification_run(folder: Path) -> bool:
    newest = sorted((folder / "checkpoints").glob("step_*"))
    return bool(newest) and (newest[-1] / TIMM_FILE).is_file()


class Caller:
    """Runs functions of a model on its device, in its precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, function: Callable[..., Any], *inputs: Any, **named: Any) -> Tensor:
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
        with torch.inference_mode(), autocast:
            return function(*inputs, **named).float().cpu()


def from_opened(name: str, opened: OpenedModel, call: Caller, precision: str) -> Subject:
    """The subject of a model that `open_model` has opened, or that is in training, where it lies:
    what is divided among processes cannot be moved."""
    model = opened.model
    normalize = Normalize(opened.mean, opened.std).to(call.device)
    trunk = getattr(model.visual, "trunk", None)  # of open_clip's own towers there is none

    def features(images: Tensor) -> Tensor:
        return call((trunk or model.encode_image), normalize(images.to(call.device)))

    def encode_image(images: Tensor) -> Tensor:
        return call(model.encode_image, normalize(images.to(call.device)))

    def encode_text(texts: list[str]) -> Tensor:
        return call(model.encode_text, opened.tokenizer(texts).to(call.device))

    resize = _Resize(
        opened.image_size, opened.resize_mode, opened.interpolation, opened.mean, opened.std
    )
    tokens = opened.tokenizer(PROBES).tolist()
    return Subject(
        name,
        opened.source,
        Identity(model, [opened.description, tokens, opened.mean, opened.std]),
        precision,
        {},
        _identity,
        features,
        encode_image,
        encode_text,
        resize,
    )


def from_tower(name: str, tower: ImageTower, call: Caller, precision: str) -> Subject:
    """The subject of a timm model, where it lies: its pooled features, without its classifier."""
    model = tower.model
    normalize = Normalize(tower.mean, tower.std).to(call.device)

    def pooled(images: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)

    def features(images: Tensor) -> Tensor:
        return call(pooled, normalize(images.to(call.device)))

    resize = _Resize(tower.image_size, "squash", "bicubic", tower.mean, tower.std)
    identity = Identity(model, [tower.name, tower.arguments, tower.mean, tower.std])
    return Subject(name, tower.source, identity, precision, {}, _identity, features, resize=resize)


def _transformers_subject(name: str, call: Caller, precision: str) -> Subject:
    """CLIP, SigLIP or a VisionTextDualEncoder, with its own processor."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        model: Any = AutoModel.from_pretrained(name).eval().to(call.device)
        processor: Any = AutoImageProcessor.from_pretrained(name)
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"transformers cannot open '{name}': {reason}") from error
    if not hasattr(model, "get_image_features"):
        raise ValueError(f"'{name}' is a {type(model).__name__}: it has no image and text towers")
    text_config = getattr(model.config, "text_config", model.config)
    length = min(getattr(text_config, "max_position_embeddings", 77), 512)
    padding = "max_length" if model.config.model_type in PADDED_TO_THE_END else True

    def transform(image: Tensor) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def encode_image(images: Tensor) -> Tensor:
        return call(
            lambda x: _tensor(model.get_image_features(pixel_values=x)), images.to(call.device)
        )

    def features(images: Tensor) -> Tensor:
        return call(
            lambda x: model.vision_model(pixel_values=x).pooler_output, images.to(call.device)
        )

    def encode_text(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
        ).to(call.device)
        return call(lambda: _tensor(model.get_text_features(**tokens)))

    settings = {"processor": type(processor).__name__, **processor.to_dict()}
    kept = {k: v for k, v in settings.items() if isinstance(v, str | int | float | list | dict)}
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    tokens = tokenizer(PROBES, truncation=True, max_length=length)["input_ids"]
    return Subject(
        name,
        name,
        Identity(model, [config, tokens, padding]),
        precision,
        kept,
        transform,
        features,
        encode_image,
        encode_text,
    )


def _tensor(output: Any) -> Tensor:
    """Embeddings, which newer transformers put into an output object."""
    return output if isinstance(output, Tensor) else output.pooler_output


@dataclass(frozen=True)
class _Resize:
    """What a set's resize mode, or else the model's own, makes of pictures."""

    size: int
    mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, mode: str | None) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
        mode = mode or self.mode
        transform = eval_transform(self.size, mode, self.interpolation)
        return transform, {
            "size": self.size,
            "resize_mode": mode,
            "interpolation": self.interpolation,
            "antialias": True,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, shapes, types and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        content = tensor.detach().cpu().contiguous()
        digest.update(content.view(-1).view(torch.uint8).numpy().data if content.numel() else b"")
    return digest.hexdigest()
