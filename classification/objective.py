"""Classification as an objective for the loop."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import Mixup
from torch import Tensor, nn

import encoders.variants  # noqa: F401  (registers the models with timm)
from classification.config import ClassifierConfig
from classification.losses import LOSSES, smooth_targets
from encoders.pixels import Normalize
from training.objective import Batch, Metrics, Objective


def build_classifier(config: ClassifierConfig, num_classes: int) -> nn.Module:
    """A fresh timm model with a head for `num_classes` classes.

    Raises:
        ValueError: timm does not know the name.
    """
    if not timm.is_model(config.name):
        raise ValueError(f"model '{config.name}' is unknown: see encoders/variants.py for names")
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path}
    if config.patch_dropout:
        options["patch_drop_rate"] = config.patch_dropout
    return timm.create_model(config.name, **options)


class ClassificationObjective(Objective):
    """Softmax or sigmoid cross-entropy of a timm model, with timm's mixup and label smoothing.

    Batches hold `image` uint8 (B, 3, H, W) and `label` int64 (B,) or float (B, C).
    """

    def __init__(self, model: nn.Module, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__()
        self.model, self.config, self.num_classes = model, config, num_classes
        settings = model.pretrained_cfg
        self.normalize = Normalize(settings["mean"], settings["std"])
        self.compute_loss = LOSSES[config.loss]
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=0.0, num_classes=num_classes
            )

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        images, labels = self.normalize(batch["image"]), batch["label"]
        targets = labels
        if self.mixup is not None and self.training and labels.ndim == 1:
            images, targets = self.mixup(images, labels)
        targets = smooth_targets(targets, self.num_classes, self.config.label_smoothing)
        logits = self.model(images)
        with torch.autocast(images.device.type, enabled=False):
            loss = self.compute_loss(logits, targets)
        metrics = {}
        if labels.ndim == 1:
            metrics["batch_accuracy"] = (logits.detach().argmax(-1) == labels).float().mean()
        return loss, metrics

    def config_files(self) -> dict[str, dict[str, Any]]:
        """timm's `config.json`, so that `timm.create_model("local-dir:<checkpoint>")` works."""
        settings = self.model.pretrained_cfg
        return {
            "config.json": {
                "architecture": self.config.name,
                "num_classes": self.num_classes,
                "num_features": self.model.num_features,
                "pretrained_cfg": {
                    name: settings[name]
                    for name in ("input_size", "mean", "std", "interpolation", "crop_pct")
                }
                | {
                    "num_classes": self.num_classes,
                    "first_conv": "patch_embed.proj",
                    "classifier": "head",
                    "pool_size": None,
                },
            }
        }
