"""A dual encoder as two functions: pictures to vectors, and texts to vectors."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.transforms import eval_transform
from encoders.pixels import Normalize
from eval.open_model import OpenedModel

# What tokenizers differ in: case, punctuation, accents, length.
PROBES = ["a photo of a red Apple, 2nd slice!", "Grüße ☕", "word " * 300]


@dataclass(frozen=True)
class Logits:
    """How cosines become scores: `scale` times them plus `bias`, then a sigmoid for each label
    alone, or a softmax over all."""

    scale: float
    bias: float
    sigmoid: bool


class Embedder:
    """An opened model on its device; several threads may call it, and wait for each other.

    Args:
        opened: from `open_model`.
        device: where it computes.
        batch_size: texts encoded at once.
    """

    def __init__(
        self, opened: OpenedModel, device: torch.device | str = "cpu", batch_size: int = 256
    ) -> None:
        self.opened, self.batch_size = opened, batch_size
        self.model: Any = opened.model.to(device)
        self.normalize = Normalize(opened.mean, opened.std).to(device)
        self.transform = eval_transform(opened.image_size, opened.resize_mode, opened.interpolation)
        self.device = torch.device(device)
        self.lock = threading.Lock()

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S), as `transform` makes them, to float32 (B, d) on the CPU."""
        with self.lock:
            return self.model.encode_image(self.pixels(images)).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Strings, at least one, to float32 (B, d) on the CPU."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.opened.tokenizer(list(texts[start : start + self.batch_size]))
            with self.lock:
                rows.append(self.model.encode_text(tokens.to(self.device)).float().cpu())
        return torch.cat(rows)

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) as the model takes them, float32 on its device."""
        return self.normalize(images.to(self.device))

    def logits(self) -> Logits:
        """From the model's own scale and bias; only models of the sigmoid loss have a bias."""
        bias = getattr(self.model, "logit_bias", None)
        scale = self.model.logit_scale.exp().item()
        return Logits(scale, 0.0 if bias is None else bias.item(), bias is not None)

    def image_trunk(self) -> nn.Module | None:
        """The timm model within, which may have routed layers; None in models of other builds."""
        return getattr(self.model.visual, "trunk", None)

    def fingerprint(self) -> str:
        """Of everything that embeddings depend on besides the inputs: weights, pixels, tokens."""
        opened, digest = self.opened, hashlib.sha256()
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        settings = [
            opened.image_size, opened.mean, opened.std, opened.resize_mode, opened.interpolation,
            re.sub(" at 0x[0-9a-f]+", "", str(self.model)), opened.tokenizer(PROBES).tolist(),
        ]  # fmt: skip
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()
