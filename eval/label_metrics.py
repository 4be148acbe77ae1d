"""Figures of classification from class scores: single, several acceptable and multiple labels.

Names are CLIP_benchmark's. Of equal scores the class with the smaller index ranks first.

Shape legend: N samples, C classes, L most labels of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.measurement import Interval, Measurement
from eval.statistics import bootstrap_class_mean
from eval.zero_shot import class_ranks

CHUNK = 4096
LABELS = "label"  # of each sample, beside the values that figures are means of
WORST = 10
MAX_CONFUSION = 200  # classes up to which the whole matrix is written


def measure_labels(
    scores: Tensor, labels: Tensor, classnames: Sequence[str], topk: Sequence[int] = (1, 5)
) -> Measurement:
    """Top-k accuracy, mean per-class recall, confusion matrix and worst classes.

    Args:
        scores: (N, C) floating point, higher is nearer.
        labels: int64, (N,) in [0, C), or (N, L) padded with -1: any of them is right, as in
            ImageNet-ReaL, and samples without one are left out. Then there is no per-class recall.
        classnames: C names.
        topk: the k; an accuracy beyond the number of classes is None.

    Returns:
        `acc{k}`, `mean_per_class_recall`, and details.

    Raises:
        ValueError: labels out of range, more or fewer than scores, or no sample with a label.
    """
    if len(labels) != len(scores):
        raise ValueError(f"{len(labels)} labels do not belong to the scores of {len(scores)}")
    several = labels.ndim == 2
    sets = labels if several else labels[:, None]
    check_labels(sets, scores.shape[1])
    kept = (sets >= 0).any(1)
    if not kept.any():
        raise ValueError("no sample has a label: nothing can be measured")
    scores, sets = scores[kept], sets[kept]
    ranks = label_ranks(scores, sets).numpy()
    measured = Measurement()
    classes = scores.shape[1]
    measured.add_means({f"acc{k}": ranks < k for k in topk if k <= classes})
    measured.metrics |= {f"acc{k}": None for k in topk if k > classes}
    if several:
        measured.details["n_without_label"] = int((~kept).sum())
        return measured
    truth = sets[:, 0].numpy()
    hits = ranks < 1
    measured.metrics["mean_per_class_recall"] = float(per_class_recall(hits, truth, classes)[1])
    measured.intervals.append(lambda: {"mean_per_class_recall": bootstrap_class_mean(hits, truth)})
    measured.samples[LABELS] = truth.astype(np.float64)
    measured.details |= _details(scores.argmax(1).numpy(), truth, classnames)
    return measured


def check_labels(sets: Tensor, classes: int) -> None:
    """Raise ValueError if a label is not below the number of classes."""
    highest = int(sets.max()) if sets.numel() else -1
    if highest >= classes:
        raise ValueError(
            f"a sample has label {highest}, but there are {classes} class names: give the names"
            " that belong to the labels"
        )


def label_ranks(scores: Tensor, sets: Tensor) -> Tensor:
    """0-based rank (N,) of the best of each sample's labels (N, L), padded with -1."""
    columns = torch.arange(scores.shape[1])
    ranks = [
        class_ranks(part, (own[:, :, None] == columns).any(1))
        for part, own in zip(scores.split(CHUNK), sets.split(CHUNK), strict=True)
    ]
    return torch.cat(ranks)


def per_class_recall(
    hits: NDArray[np.bool_], truth: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], float]:
    """Recall of each class (C,), NaN where it does not occur, and the mean over the others."""
    total = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[hits], minlength=classes)
    recall = np.full(classes, np.nan)
    np.divide(right, total, out=recall, where=total > 0)
    return recall, float(np.nanmean(recall))


def confusion_matrix(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """(C, C) counts: rows are the true classes, columns the predicted ones."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _details(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], classnames: Sequence[str]
) -> dict[str, object]:
    classes = len(classnames)
    recall, _ = per_class_recall(predicted == truth, truth, classes)
    present = np.flatnonzero(~np.isnan(recall))
    worst = present[np.argsort(recall[present], kind="stable")][:WORST]
    found: dict[str, object] = {
        "worst_classes": [
            {
                "class": classnames[label],
                "recall": float(recall[label]),
                "n": int((truth == label).sum()),
                "taken_for": classnames[_mode(predicted[(truth == label) & (predicted != label)])]
                if recall[label] < 1
                else None,
            }
            for label in worst
        ]
    }
    if classes <= MAX_CONFUSION:
        found["confusion_matrix"] = confusion_matrix(predicted, truth, classes).tolist()
    return found


def _mode(values: NDArray[np.int64]) -> int:
    return int(np.bincount(values).argmax())


def measure_multilabel(scores: Tensor, labels: Tensor, classnames: Sequence[str]) -> Measurement:
    """Mean over classes of the average precision of ranking the samples.

    A class without a sample counts 0, as in CLIP_benchmark; a sample of the class that ties with
    others ranks behind them.

    Args:
        scores: (N, C).
        labels: (N, L) int64, padded with -1.
        classnames: C names.

    Returns:
        `mean_average_precision`, with the average precision of each class in the details.

    Raises:
        ValueError: labels out of range or none.
    """
    classes = scores.shape[1]
    check_labels(labels, classes)
    if not (labels >= 0).any():
        raise ValueError("no sample has a label: nothing can be measured")
    truth = (labels[:, :, None] == torch.arange(classes)).any(1).numpy()
    values = scores.double().numpy()
    order = np.stack([np.lexsort((truth[:, c], -values[:, c])) for c in range(classes)], axis=1)
    sorted_truth = np.take_along_axis(truth, order, axis=0)
    each = _weighted_precision(sorted_truth, order, np.ones(len(values)))
    measured = Measurement({"mean_average_precision": float(each.mean())})
    measured.intervals.append(
        lambda: {"mean_average_precision": _precision_interval(sorted_truth, order)}
    )
    worst = np.argsort(each, kind="stable")[:WORST]
    measured.details["worst_classes"] = [
        {"class": classnames[c], "average_precision": float(each[c]), "n": int(truth[:, c].sum())}
        for c in worst
    ]
    return measured


def _precision_interval(truth: NDArray[np.bool_], order: NDArray[np.int64]) -> Interval:
    """95 % bootstrap interval of the mean over classes; arguments as `_weighted_precision`."""
    rng, size = np.random.default_rng(0), len(truth)
    draws = [
        _weighted_precision(
            truth, order, rng.multinomial(size, np.ones(size) / size).astype(np.float64)
        ).mean()
        for _ in range(_resamples(truth.size))
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _resamples(size: int) -> int:
    """1000, and fewer where they would take minutes, but never under 200."""
    return max(200, min(1000, 2_000_000_000 // max(size, 1)))


def _weighted_precision(
    truth: NDArray[np.bool_], order: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision (C,) of sorted truths (N, C) whose samples count `weights` (N,) times."""
    counts = weights[order].astype(np.float64)
    right = counts * truth
    seen = counts.cumsum(0)
    precision = np.divide(right.cumsum(0), seen, out=np.zeros_like(seen), where=seen > 0)
    total = right.sum(0)
    return np.divide((right * precision).sum(0), total, out=np.zeros(len(total)), where=total > 0)
