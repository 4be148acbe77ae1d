"""The tasks: what each asks of a model and a set, and what it measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eval.embedding import EmbeddedSet
from eval.few_shot import L2_DEFAULT, best_l2, few_shot_hits, sparse_classes
from eval.label_metrics import measure_labels, measure_multilabel
from eval.measurement import Interval, Measurement
from eval.probes import linear_probe, neighbour_scores
from eval.retrieval import retrieval_ranks
from eval.zero_shot import class_scores, class_vectors

TASKS = {  # what of the pictures is embedded
    "zero_shot_classification": {"image"},
    "retrieval": {"image", "text"},
    "few_shot": {"feature"},
    "linear_probe": {"feature"},
    "knn": {"feature"},
}
NAMES = {"zero_shot_classification": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
NEED_TRAIN = {"few_shot", "linear_probe", "knn"}
NEED_TEXT = {"zero_shot_classification", "retrieval"}
QUICK_PROBES = ("few_shot", "knn")  # the linear probe learns for long


def figure_name(task: str, metric: str) -> str:
    """Name of a figure among those of all tasks of a set: where probes and zero-shot classification
    give metrics of one name, those of probes begin with the probe, as in `knn_acc1`."""
    return f"{task}_{metric}" if task in ("linear_probe", "knn") else metric


@dataclass(frozen=True)
class ProbeOptions:
    """Shots, seeds and strengths of the probes."""

    shots: Sequence[int] = (10,)
    seeds: Sequence[int] = (0, 1, 2)
    l2s: Sequence[float] = L2_DEFAULT
    neighbours: int = 20


def measure_zero_shot(
    found: EmbeddedSet,
    encode_text: Callable[[list[str]], Tensor],
    prompts: list[list[str]],
    classnames: list[str],
    label_kind: str = "single",
    batch_size: int = 256,
) -> Measurement:
    """Cosine of pictures and class vectors; `label_kind` is single, any (ReaL) or multi."""
    vectors = class_vectors(encode_text, prompts, batch_size).cpu()
    scores = class_scores(found.rows["image"], vectors)
    if label_kind == "multi":
        return measure_multilabel(scores, found.labels, classnames)
    labels = found.labels if label_kind == "any" else single_labels(found)
    return measure_labels(scores, labels, classnames)


def single_labels(found: EmbeddedSet) -> Tensor:
    """(N,) labels.

    Raises:
        ValueError: a sample has none.
    """
    if (found.labels[:, 0] < 0).any():
        raise ValueError("a sample has no label: give label_key, or label_kind any or multi")
    return found.labels[:, 0]


def measure_retrieval(found: EmbeddedSet, ks: Sequence[int] = (1, 5, 10)) -> Measurement:
    """Recall at every k, average precision, median and mean rank both ways, with intervals.

    A k beyond the pool is the whole pool, and the details say so.

    Raises:
        ValueError: a k below 1, no caption, or as `retrieval_ranks`.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every k must be at least 1, got {list(ks)}")
    if "text" not in found.rows:
        raise ValueError("the set has no captions: retrieval cannot be measured")
    ranks = retrieval_ranks(found.rows["image"], found.rows["text"], found.owners)
    measured = Measurement()
    directions = {"text": ranks.image_to_text.numpy(), "image": ranks.text_to_image.numpy()}
    precision = {"text": ranks.average_precision, "image": 1 / (ranks.text_to_image + 1)}
    for side, values in directions.items():
        name = f"{side}_retrieval"
        columns: dict[str, np.ndarray] = {f"{name}_recall@{k}": values < k for k in ks}
        columns[f"{name}_mean_rank"] = values + 1
        columns[f"{name}_average_precision"] = np.asarray(precision[side])
        measured.add_means(columns)
        measured.metrics[f"{name}_median_rank"] = float(np.median(values)) + 1
        measured.intervals.append(partial(_median_interval, f"{name}_median_rank", values + 1))
        pool = len(directions["image" if side == "text" else "text"])
        beyond = [k for k in ks if k > pool]
        if beyond:
            measured.details[f"{side}_k_beyond_pool_of_{pool}"] = beyond
    measured.details |= {
        "n_images": len(found.keys),
        "n_texts": len(found.captions),
        "duplicate_captions": len(found.captions) - len(set(found.captions)),
    }
    measured.details["examples"] = {
        side: {
            "best": np.argsort(v, kind="stable")[:6].tolist(),
            "worst": np.argsort(-v, kind="stable")[:6].tolist(),
        }
        for side, v in directions.items()
    }
    return measured


def _median_interval(name: str, values: np.ndarray) -> dict[str, Interval]:
    """95 % interval of the median from order statistics, as the bootstrap's but without draws."""
    ordered = np.sort(values)
    half = 1.96 * np.sqrt(len(ordered)) / 2
    low, high = int(len(ordered) / 2 - half), int(np.ceil(len(ordered) / 2 + half))
    return {name: (float(ordered[max(low, 0)]), float(ordered[min(high, len(ordered) - 1)]))}


def probe_splits(
    train: EmbeddedSet, test: EmbeddedSet, classes: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Features and labels of both splits.

    Raises:
        ValueError: a sample without a label, or one beyond the classes.
    """
    pool = train.rows["feature"], single_labels(train)
    target = test.rows["feature"], single_labels(test)
    if max(int(pool[1].max()), int(target[1].max())) >= classes:
        raise ValueError(f"labels reach beyond the {classes} class names")
    return pool, target


def measure_probe(
    task: str, train: EmbeddedSet, test: EmbeddedSet, classnames: list[str], options: ProbeOptions
) -> Measurement:
    """few_shot, linear_probe or knn on the features of a training and a test split."""
    if task == "few_shot":
        return settle_few_shot([few_shot_outcomes(train, test, classnames, options)], options)[0]
    pool, (features, truth) = probe_splits(train, test, len(classnames))
    if task == "knn":
        scores = neighbour_scores(pool, features, len(classnames), options.neighbours)
        measured = measure_labels(scores, truth, classnames)
        measured.details["k"] = options.neighbours
    else:
        probe = linear_probe(pool, features, len(classnames))
        measured = measure_labels(probe.scores, truth, classnames)
        measured.details |= probe.details
    return measured


@dataclass(frozen=True)
class FewShotOutcomes:
    """Of one set, by the number of shots: which test pictures are named right, (seeds, strengths,
    M) bool, and the classes that have fewer pictures."""

    hits: dict[int, NDArray[np.bool_]]
    sparse: dict[int, list[int]]


def few_shot_outcomes(
    train: EmbeddedSet, test: EmbeddedSet, classnames: list[str], options: ProbeOptions
) -> FewShotOutcomes:
    """The few-shot probe for all shots, seeds and strengths."""
    classes = len(classnames)
    pool, target = probe_splits(train, test, classes)
    hits = {
        shots: np.stack(
            [
                few_shot_hits(pool, target, classes, shots, seed, options.l2s)
                for seed in options.seeds
            ]
        )
        for shots in options.shots
    }
    sparse = {shots: sparse_classes(pool[1], classes, shots) for shots in options.shots}
    return FewShotOutcomes(hits, sparse)


def settle_few_shot(sets: Sequence[FewShotOutcomes], options: ProbeOptions) -> list[Measurement]:
    """Figures of every set, at one strength for each number of shots.

    Of several strengths the one with the best mean rank over all sets is taken, by their test
    accuracies, which is the rule of the reference. A figure is the mean over seeds; its interval
    resamples the test pictures.
    """
    if not sets:
        return []
    chosen = {
        shots: best_l2(np.stack([found.hits[shots].mean((0, 2)) for found in sets]))
        for shots in options.shots
    }
    measurements = []
    for found in sets:
        measured, columns = Measurement(), {}
        for shots, best in chosen.items():
            hits = found.hits[shots]
            sweep = zip(options.l2s, hits.mean((0, 2)), strict=True)
            columns[f"{shots}shot_acc1"] = hits[:, best].mean(0)
            measured.details[f"{shots}shot"] = {
                "l2": float(options.l2s[best]),
                "by_seed": hits[:, best].mean(1).tolist(),
                "sweep": {f"{l2:g}": float(accuracy) for l2, accuracy in sweep},
                "l2_selected_on_test": len(options.l2s) > 1,
                "classes_with_fewer_pictures": found.sparse[shots],
            }
        measured.add_means(columns)
        measured.details |= {"seeds": list(options.seeds), "sets_that_chose_l2": len(sets)}
        measurements.append(measured)
    return measurements
