"""Contrastive training as an objective for the loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.config import ContrastiveConfig
from contrastive.gather import gather_rows, rank
from contrastive.losses import clip_loss, normalize_features, siglip_loss
from encoders.auxiliary_losses import add_auxiliary_losses, routed_layers
from encoders.pixels import Normalize
from encoders.routed_layer import RoutedLayer
from encoders.routing_statistics import RoutingMonitor
from encoders.temperature import changing_temperatures, set_training_step, temperature_metrics
from training.objective import Batch, Metrics, Objective

# Position embeddings of text towers: open_clip's transformer, BERT and RoBERTa, and T5.
POSITIONS = ("positional_embedding", "position_embeddings", "relative_attention_bias")


class ContrastiveObjective(Objective):
    """CLIP or SigLIP loss of a dual encoder over the global batch.

    Batches hold `image` uint8 (b, 3, H, W), `text` int64 (b, L) and optionally `group` int64 (b,)
    (see `contrastive.losses`). Every process contributes its own rows and sees everybody's
    columns, so that gradients equal those of one process with the whole batch. In training the loss
    includes the auxiliary losses of the routed layers of both towers.

    Args:
        model: an open_clip dual encoder.
        model_config: its description, saved with every checkpoint as `open_clip_config.json`.
        config: the loss.
        mean, std: pixel normalisation of the image tower.
        frozen: parts that are not trained; they get no gradient and stay in eval mode.
    """

    weights_file = "open_clip_model.safetensors"
    splits_batches = False

    def __init__(
        self,
        model: Any,
        model_config: dict[str, Any],
        config: ContrastiveConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        frozen: tuple[nn.Module, ...] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.model_config, self.config = model_config, config
        self._routed_layers = routed_layers(model)
        self._temperatures = changing_temperatures(model)
        self._monitor = RoutingMonitor(getattr(model.visual, "trunk", model.visual))
        self.mean, self.std = mean, std
        self.normalize = Normalize(mean, std)
        self._frozen = frozen
        for part in frozen:
            part.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> ContrastiveObjective:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        with self._monitor.watch(self.wants_details) as routing:
            features = self.model(self.normalize(batch["image"]), batch["text"])
        with torch.autocast(batch["image"].device.type, enabled=False):
            image = normalize_features(features["image_features"])
            text = normalize_features(features["text_features"])
            loss, metrics = self.loss(image, text, features, batch.get("group"))
            metrics |= temperature_metrics(self._temperatures)
            metrics |= routing
            return add_auxiliary_losses(loss, metrics, self._routed_layers), metrics

    def loss(
        self, image: Tensor, text: Tensor, features: dict[str, Tensor], groups: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics from unit rows (b, D) of this process."""
        all_groups = None if groups is None else gather_rows(groups)
        all_text, offset = gather_rows(text), rank() * len(image)
        scale = features["logit_scale"]
        if self.config.loss == "siglip":
            bias = features["logit_bias"]
            loss = siglip_loss(image, all_text, scale, bias, offset, groups, all_groups)
        else:
            all_image = gather_rows(image)
            loss = clip_loss(image, text, all_image, all_text, scale, offset, groups, all_groups)
        with torch.no_grad():
            own = torch.arange(len(image), device=image.device) + offset
            accuracy = ((image @ all_text.T).argmax(dim=1) == own).float().mean()
        metrics = {"batch_accuracy": accuracy, "logit_scale": scale.detach()}
        if self.config.loss == "siglip":
            metrics["logit_bias"] = features["logit_bias"].detach()
        return loss, metrics

    def no_weight_decay(self) -> set[str]:
        named = getattr(self.model.visual.trunk, "no_weight_decay", set)
        names = {f"visual.trunk.{name}" for name in named()} | {"logit_scale", "logit_bias"}
        for prefix, module in self.model.text.named_modules():
            if isinstance(module, RoutedLayer):
                names |= {f"text.{prefix}.{name}" for name in module.no_weight_decay()}
        return {
            name
            for name, _ in self.model.named_parameters()
            if name in names or any(part in name for part in POSITIONS)
        }

    def before_step(self, step: int) -> None:
        set_training_step(self._temperatures, step)

    def after_step(self) -> None:
        if self.config.max_logit_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=math.log(self.config.max_logit_scale))

    def config_files(self) -> dict[str, dict[str, Any]]:
        preprocess = {
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        }
        return {
            "open_clip_config.json": {
                "model_cfg": self.model_config,
                "preprocess_cfg": preprocess,
            }
        }
