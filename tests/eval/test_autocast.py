"""Measuring in a training run of low precision: figures are made as they are without autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.embedding import EmbeddedSet
from eval.few_shot import few_shot_hits, ridge_scores
from eval.probes import linear_probe, neighbour_scores
from eval.tasks import (
    ProbeOptions,
    measure_probe,
    measure_retrieval,
    measure_zero_shot,
)

COUNT, WIDTH, CLASSES = 60, 8, 4
NAMES = [f"class {label}" for label in range(CLASSES)]


def embedded(seed: int) -> EmbeddedSet:
    """Noise around four corners that lie close together, so that rounding changes ranks."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(COUNT) % CLASSES
    corners = torch.ones(CLASSES, WIDTH) + 0.02 * torch.eye(CLASSES, WIDTH)

    def rows() -> Tensor:
        return corners[labels] + 0.01 * torch.randn(COUNT, WIDTH, generator=rng)

    numbers = list(range(COUNT))
    return EmbeddedSet(
        {"image": rows(), "feature": rows(), "text": rows()}, labels[:, None], torch.arange(COUNT),
        list(map(str, numbers)), list(map(str, numbers)), numbers, [""] * COUNT,
    )  # fmt: skip


TRAIN, TEST = embedded(0), embedded(1)
POOL, FEATURES = (TRAIN.rows["feature"], TRAIN.labels[:, 0]), TEST.rows["feature"]
PROMPTS = [[f"{name} {number}" for number in range(3)] for name in NAMES]
TEXTS = dict(zip([text for own in PROMPTS for text in own], TRAIN.rows["text"], strict=False))
OPTIONS = ProbeOptions(shots=(2,), neighbours=5)


def encode_text(texts: list[str]) -> Tensor:
    return torch.stack([TEXTS[text] for text in texts])


CALLS: dict[str, Callable[[], Any]] = {
    "linear probe, solved": lambda: linear_probe(POOL, FEATURES, CLASSES, small=1000).scores,
    "linear probe, descended": lambda: linear_probe(POOL, FEATURES, CLASSES, small=0).scores,
    "neighbours": lambda: neighbour_scores(POOL, FEATURES, CLASSES, 5),
    "ridge": lambda: ridge_scores(*POOL, FEATURES, CLASSES, [1.0, 1024.0]),
    "few-shot": lambda: few_shot_hits(POOL, (FEATURES, TEST.labels[:, 0]), CLASSES, 2).tolist(),
    "retrieval": lambda: measure_retrieval(TEST).metrics,
    "zero-shot": lambda: measure_zero_shot(TEST, encode_text, PROMPTS, NAMES).metrics,
} | {
    task: lambda task=task: measure_probe(task, TRAIN, TEST, NAMES, OPTIONS).metrics
    for task in ("few_shot", "linear_probe", "knn")
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_figure(name: str) -> None:
    expected = CALLS[name]()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as training evaluates
        assert (FEATURES @ FEATURES.T).dtype == torch.bfloat16
        torch.testing.assert_close(CALLS[name](), expected, rtol=0, atol=0)
