"""Intervals: drawn for whoever asks for them, and not for evaluations in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.config import EvaluationSetConfig
from eval.label_metrics import measure_labels, measure_multilabel
from eval.measurement import Measurement
from eval.scheduled import ScheduledEvaluator
from eval.statistics import bootstrap_class_mean, bootstrap_means
from eval.subject import Identity, Subject
from eval.tasks import ProbeOptions

NAMES = ["red", "green", "blue", "white"]


class Colours(nn.Module):
    """Mean colours of pictures, and of the last word of texts."""

    def images(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 255 + 0.01

    def texts(self, texts: list[str]) -> Tensor:
        rows = torch.tensor([[1, 0.1, 0.1], [0.1, 1, 0.1], [0.1, 0.1, 1], [1.0, 1, 1]])
        return torch.stack([rows[next(i for i, n in enumerate(NAMES) if n in t)] for t in texts])


def subject_of(model: Any) -> Subject:
    return Subject(
        "colours", "here", Identity(model, []), "fp32", {}, lambda image: image, model.images,
        model.images, model.texts,
        lambda _: (lambda image: image, {}),
    )  # fmt: skip


def test_evaluations_in_training_draw_no_resamples(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*arguments: object) -> None:
        pytest.fail("resamples were drawn")

    config = EvaluationSetConfig(
        shards=f"{shards}/train-1.tar", train_shards=f"{shards}/train-0.tar",
        classnames=f"{shards}/classnames.txt", caption_key="txt",
        tasks=["zero_shot_classification", "retrieval", "few_shot", "knn"],
    )  # fmt: skip
    evaluator = ScheduledEvaluator(config, subject_of, Colours(), ProbeOptions(shots=(2,)))
    for name in ("_resampled_means", "_resampled_class_means"):
        monkeypatch.setattr(f"eval.statistics.{name}", draw)
    monkeypatch.setattr("eval.label_metrics._precision_interval", draw)
    figures = evaluator(Colours())
    assert figures["acc1"] == figures["knn_acc1"] == 1.0
    assert {"2shot_acc1", "image_retrieval_median_rank"} <= figures.keys()
    scores, labels = torch.rand(6, 4), torch.arange(6)[:, None] % 4
    assert measure_multilabel(scores, labels, NAMES).metrics


def test_intervals_are_the_bootstraps_of_the_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(40, 4, generator=rng), torch.arange(40) % 4
    measured = measure_labels(scores, labels, NAMES, topk=(1, 2))
    columns = np.stack([measured.samples["acc1"], measured.samples["acc2"]], axis=1)
    expected = dict(zip(("acc1", "acc2"), map(tuple, bootstrap_means(columns)), strict=True))
    hits = measured.samples["acc1"].astype(bool)
    expected["mean_per_class_recall"] = bootstrap_class_mean(hits, labels.numpy())
    assert measured.ci95 == expected
    several = measure_multilabel(scores, labels[:, None], NAMES)
    low, high = several.ci95["mean_average_precision"]
    value = several.metrics["mean_average_precision"]
    assert value is not None
    assert low < value < high
    empty = Measurement()
    assert empty.ci95 == {}
    empty.add_means({"later": np.ones(3)})
    assert empty.ci95 == {"later": (1.0, 1.0)}
