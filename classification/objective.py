"""Classification as an objective for the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor

from classification.config import ClassifierConfig
from classification.losses import LOSSES, smooth_targets
from encoders.auxiliary_losses import add_auxiliary_losses, routed_layers, routed_parameters
from encoders.model_size import count_training_flops
from encoders.pixels import Normalize
from encoders.routing_statistics import RoutingMonitor
from encoders.sparse_base import images_routed_together
from encoders.temperature import changing_temperatures, set_training_step, temperature_metrics
from encoders.variants import create_encoder
from training.objective import Batch, Metrics, Objective


def build_classifier(config: ClassifierConfig, num_classes: int) -> Any:
    """A fresh timm model with a head for `num_classes` classes.

    Raises:
        ValueError: timm does not know the name, or the model does not take an argument.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path}
    if config.patch_dropout:
        options["patch_drop_rate"] = config.patch_dropout
    return create_encoder(config.name, config.arguments, "model.arguments", **options)


# What timm has to know of a saved model, of the settings that it keeps of every model.
SETTINGS = (
    "input_size",
    "fixed_input_size",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "pool_size",
    "first_conv",
    "classifier",
)


class ClassificationObjective(Objective):
    """Softmax or sigmoid cross-entropy of a timm model, with timm's mixup and label smoothing.

    The loss includes the auxiliary losses of the model's routed layers, in training.
    Batches hold `image` uint8 (B, 3, H, W) and `label` int64 (B,) or float (B, C).
    `class_names`, in label order, are saved beside the weights.

    Raises:
        ValueError: smoothing or mixup settings out of range.
    """

    def __init__(
        self,
        model: Any,
        config: ClassifierConfig,
        num_classes: int,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.class_names = class_names
        self.model, self.config, self.num_classes = model, config, num_classes
        self._routed_layers = routed_layers(model)
        self._temperatures = changing_temperatures(model)
        self._monitor = RoutingMonitor(model)
        settings = model.pretrained_cfg
        self.normalize = Normalize(settings["mean"], settings["std"])
        self.compute_loss = LOSSES[config.loss]
        self.mixup = None
        if not 0 <= config.label_smoothing < 1 or min(config.mixup, config.cutmix) < 0:
            raise ValueError(
                "model.label_smoothing must be in [0, 1), model.mixup and model.cutmix at least 0"
            )
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
        with self._monitor.watch(self.wants_details) as metrics:
            logits = self.model(images)
        with torch.autocast(images.device.type, enabled=False):
            loss = self.compute_loss(logits, targets)
        metrics |= temperature_metrics(self._temperatures)
        if labels.ndim == 1:
            metrics["batch_accuracy"] = (logits.detach().argmax(-1) == labels).float().mean()
        return add_auxiliary_losses(loss, metrics, self._routed_layers), metrics

    def parameter_groups(self) -> dict[str, set[str]]:
        return routed_parameters(self.model)

    def training_flops(self) -> float | None:
        group = images_routed_together(self.model)
        size = self.model.pretrained_cfg["input_size"]
        return count_training_flops(self.model, lambda: (torch.empty(group, *size),), group)

    def before_step(self, step: int) -> None:
        set_training_step(self._temperatures, step)

    def config_files(self) -> dict[str, dict[str, Any]]:
        """timm's `config.json`, so that `timm.create_model("local-dir:<checkpoint>")` works."""
        settings = self.model.pretrained_cfg
        names = {} if self.class_names is None else {"label_names": list(self.class_names)}
        return {
            "config.json": {
                "architecture": self.config.name,
                "num_classes": self.num_classes,
                "num_features": self.model.num_features,
                "model_args": self.config.arguments,
                **names,
                "pretrained_cfg": {name: settings[name] for name in SETTINGS if name in settings}
                | {"num_classes": self.num_classes},
            }
        }
