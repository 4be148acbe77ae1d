"""Contrastive training as an objective for the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from contrastive.cached_towers import encode
from contrastive.config import ContrastiveConfig
from contrastive.gather import CountCheck, gather_rows, rank, world_size
from contrastive.grad_cache import EMBEDDINGS, Features, Head, cached_part_losses
from contrastive.losses import check_features, normalize_features
from contrastive.ring import ring_siglip_loss
from contrastive.targets import Targets
from contrastive.tiled_losses import tiled_clip_loss, tiled_siglip_loss
from encoders.auxiliary_losses import add_auxiliary_losses, routed_layers, routed_parameters
from encoders.model_size import count_training_flops
from encoders.pixels import Normalize
from encoders.routed_layer import RoutedLayer
from encoders.routing_statistics import RoutingMonitor
from encoders.sparse_base import images_routed_together
from encoders.temperature import changing_temperatures, set_training_step, temperature_metrics
from training.objective import Batch, Metrics, Objective

# Position embeddings of text towers: open_clip's transformer, BERT and RoBERTa, and T5.
POSITIONS = ("positional_embedding", "position_embeddings", "relative_attention_bias")


def _projections_of_frozen_towers(model: Any) -> dict[str, nn.Module]:
    """The projections on towers without a trained parameter, by what they read."""
    towers = {EMBEDDINGS[0]: (model.visual.trunk, model.visual.head)}
    if isinstance(model.text, HFTextEncoder):
        towers[EMBEDDINGS[1]] = (model.text.transformer, model.text.proj)
    return {
        name: projection
        for name, (tower, projection) in towers.items()
        if not any(parameter.requires_grad for parameter in tower.parameters())
    }


@contextmanager
def _inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with what modules are called with."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class ContrastiveObjective(Objective):
    """CLIP or SigLIP loss of a dual encoder over the global batch.

    Batches hold `image` uint8 (b, 3, H, W), `text` int64 (b, L) and optionally `group` int64 (b,)
    and `weight` float (b,), the `groups` and `weights` of `contrastive.targets`; a frozen tower's
    embeddings may take the place of what it would read (see `contrastive.cached_towers`). Every
    process contributes its own rows and sees everybody's columns, so that gradients equal those of
    one process with the whole batch. In training the loss includes the auxiliary losses of the
    routed layers of both towers. A batch that is split has the gradient of the whole one (see
    `contrastive.grad_cache`).

    Args:
        model: an open_clip dual encoder.
        model_config: its description, saved with every checkpoint as `open_clip_config.json`.
        config: the loss.
        mean: of the image tower's pixels, by channel.
        std: of the image tower's pixels, by channel.
        frozen: modules and parameters that are not trained; they get no gradient, and such modules
            stay in eval mode.
        files: more JSON files of each checkpoint, such as those of a tokenizer.
        cached: the sides, of image and text, whose embeddings the batches hold.

    Raises:
        ValueError: the clip loss is to go round a ring.
    """

    weights_file = "open_clip_model.safetensors"

    def __init__(
        self,
        model: Any,
        model_config: dict[str, Any],
        config: ContrastiveConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        frozen: tuple[nn.Module | nn.Parameter, ...] = (),
        files: dict[str, dict[str, Any]] | None = None,
        cached: Collection[str] = (),
    ) -> None:
        super().__init__()
        if config.exchange == "ring" and config.loss != "siglip":
            raise ValueError(
                "contrastive.exchange ring serves the siglip loss alone: set it to gather, or"
                " contrastive.loss to siglip"
            )
        self.model = model
        self.model_config, self.config = model_config, config
        self.files, self.cached = files or {}, frozenset(cached)
        self._routed_layers = routed_layers(model)
        self._temperatures = changing_temperatures(model)
        self._monitor = RoutingMonitor(getattr(model.visual, "trunk", model.visual))
        self.mean, self.std = mean, std
        self.normalize = Normalize(mean, std)
        for part in frozen:
            part.requires_grad_(False)
        self._check_counts = CountCheck()
        self._frozen = tuple(part for part in frozen if isinstance(part, nn.Module))
        self._projections = _projections_of_frozen_towers(model)
        self.train()

    def train(self, mode: bool = True) -> ContrastiveObjective:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def forward(self, batch: Batch, head: Head | None = None) -> tuple[Tensor, Metrics]:
        """Loss and metrics; `head` takes the place of the loss of the features.

        Raises:
            RuntimeError: called past its distributed wrapper, or processes differ in batch size.
        """
        self._check_wrapped()
        first = head is not None and not torch.is_grad_enabled()
        # A pass for features alone is done again but for frozen towers; the last run of one tells.
        last = not first or "image_embedding" in self._projections
        with (
            self._monitor.watch(self.wants_details and last) as routing,
            _inputs_of(self._projections if first else {}) as embeddings,
        ):
            features = encode(self.model, batch, self.normalize) | embeddings
        with torch.autocast(features["logit_scale"].device.type, enabled=False):
            for name in ("image_features", "text_features"):
                features[name] = normalize_features(features[name])
            if head is None:
                loss, metrics = self.loss(features, batch)
            else:
                loss, metrics = head(features)
            metrics |= temperature_metrics(self._temperatures)
            metrics |= routing
            return add_auxiliary_losses(loss, metrics, self._routed_layers), metrics

    def _check_wrapped(self) -> None:
        if not (self.training and torch.is_grad_enabled() and world_size() > 1):
            return
        if isinstance(self, FSDPModule):  # is its own wrapper
            return
        if DistributedDataParallel._get_active_ddp_module() is None:
            raise RuntimeError(
                "the objective was called past its DistributedDataParallel wrapper, so the"
                " gradients of the processes would drift apart: call the wrapped module"
            )

    def check_accumulation(self, parts: int, global_batch: int) -> str:
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ValueError(
                    f"train.accumulation must be 1, got {parts}: '{name}' normalises over the"
                    " batch, so that parts would not add up to it; choose a tower without batch"
                    " norm, or freeze it"
                )
        rows, group = global_batch // (parts * world_size()), images_routed_together(self.model)
        if rows % group:
            raise ValueError(
                f"train.accumulation makes parts of {rows} samples, no multiple of the {group} that"
                " the towers route as one group: change it, train.batch_size or group_size"
            )
        return f"gradient caching; negatives of each pair are the global batch's {global_batch - 1}"

    def part_losses(
        self, forward: Callable[..., tuple[Tensor, Metrics]], parts: Sequence[Batch]
    ) -> Iterator[tuple[Tensor, Metrics]]:
        if len(parts) == 1:
            return super().part_losses(forward, parts)
        batch = {
            name: torch.cat([part[name] for part in parts])
            for name in ("group", "weight")
            if name in parts[0]
        }
        return cached_part_losses(forward, lambda features: self.loss(features, batch), parts)

    def loss(self, features: Features, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of unit rows (b, D) of this process; `batch` may hold marks and weights.

        Raises:
            RuntimeError: processes differ in batch size.
            ValueError: a feature is not finite, if that is looked at.
        """
        image, text = features["image_features"], features["text_features"]
        self._check_counts(image)
        if self.config.check_features:
            check_features(image, text)
        groups = batch.get("group")
        targets = Targets(
            groups,
            None if groups is None else gather_rows(groups),
            self.config.same_group,
            self.config.label_smoothing,
            batch.get("weight"),
        )
        scale, offset = features["logit_scale"], rank() * len(image)
        tile_rows = self.config.tile_rows
        metrics = {"logit_scale": scale.detach()}
        if self.config.loss == "clip":
            columns = gather_rows(image), gather_rows(text)
            loss, found = tiled_clip_loss(image, text, *columns, scale, offset, targets, tile_rows)
        else:
            bias = features["logit_bias"]
            metrics["logit_bias"] = bias.detach()
            if self.config.exchange == "ring":
                loss, found = ring_siglip_loss(image, text, scale, bias, targets, tile_rows)
            else:
                columns = gather_rows(text)
                loss, found = tiled_siglip_loss(
                    image, columns, scale, bias, offset, targets, tile_rows
                )
        metrics["batch_accuracy"] = found.image_accuracy
        if found.text_accuracy is not None:
            metrics["batch_accuracy_text"] = found.text_accuracy
        metrics["positive_logit"] = found.positive_logit
        metrics["negative_logit"] = found.negative_logit
        return loss, metrics

    def parameter_groups(self) -> dict[str, set[str]]:
        return routed_parameters(self.model)

    def training_flops(self) -> float | None:
        """Of both towers; the logits come on top. Towers whose embeddings are cached cost nothing,
        frozen ones a forward pass."""
        rows = images_routed_together(self.model)
        size = self.model_config["vision_cfg"]["image_size"]
        length = self.model_config["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)

        def inputs() -> tuple[Tensor | None, Tensor | None]:
            images = torch.empty(rows, 3, size, size)
            texts = torch.ones(rows, length, dtype=torch.int64)
            return (
                None if "image" in self.cached else images,
                None if "text" in self.cached else texts,
            )

        return count_training_flops(self.model, inputs, rows)

    def compiled_parts(self) -> Sequence[nn.Module]:
        return [self.model.visual, self.model.text]

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
        description = {"model_cfg": self.model_config, "preprocess_cfg": preprocess}
        return {"open_clip_config.json": description} | self.files
