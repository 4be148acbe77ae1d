"""Accuracy of a classifier on one set of labelled pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from data_pipelines.evaluation import EvaluationSet
from encoders.pixels import Normalize
from eval.config import EvaluationSetConfig
from eval.gather import gather_counts, gather_variable, process
from eval.zero_shot import accuracy_from_ranks, class_ranks


class ClassificationEvaluator:
    """Top-1, top-5 and mean per-class recall from the logits of `model(images)`.

    Labels that are names are looked up in `classnames`, which are in the order of the logits.
    `workers` loader processes decode; with 0 this one does.

    Raises:
        ShardError: missing or unsuitable shards, or a label that is none of the classes.
    """

    def __init__(
        self,
        config: EvaluationSetConfig,
        image_size: int,
        classnames: Sequence[str],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int = 0,
    ) -> None:
        self.config, self.num_classes, self.workers = config, len(classnames), workers
        self.name = config.name or Path(config.shards).parent.name
        self.normalize = Normalize(mean, std)
        self.dataset = EvaluationSet(
            config.shards,
            image_size,
            image_keys=config.image_keys,
            label_key=config.label_key,
            classnames=classnames,
            resize_mode=config.resize_mode or "squash",
            exif_orientation=config.exif_orientation,
        )
        if not self.dataset.remote:  # at the start, and not hours later
            self.dataset.check_labels()

    @torch.inference_mode()
    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        rank, world = process()
        device = next(model.parameters()).device
        normalize = self.normalize.to(device)
        ranks, labels = [], []
        skipped: Counter[str] = Counter()
        for batch in self.dataset.batches(self.config.batch_size, rank, world, self.workers):
            skipped.update(batch.pop("skipped"))
            if not batch:
                continue
            logits = model(normalize(batch["image"].to(device))).float().cpu()
            own = torch.tensor(batch["label"])
            ranks.append(class_ranks(logits, own[:, None] == torch.arange(self.num_classes)))
            labels.append(own)
        empty = torch.empty(0, dtype=torch.int64)
        all_ranks = gather_variable(torch.cat([empty, *ranks]))
        all_labels = gather_variable(torch.cat([empty, *labels]))
        figures = accuracy_from_ranks(all_ranks, all_labels, self.num_classes)
        skipped = gather_counts(skipped)
        if skipped:
            figures["skipped"] = float(sum(skipped.values()))
        return figures
