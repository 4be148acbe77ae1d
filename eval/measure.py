"""Measuring all tasks of one set: embed once, then one measurement for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval.embedding import EmbeddedSet, embed
from eval.evaluation_sets import PlannedSet
from eval.measurement import Measurement
from eval.records import make_record
from eval.tasks import (
    TASKS,
    ProbeOptions,
    measure_probe,
    measure_retrieval,
    measure_zero_shot,
)


@dataclass
class Outcome:
    """A measured task with its record."""

    planned: PlannedSet
    task: str
    measured: Measurement
    found: EmbeddedSet
    record: dict[str, Any]


def measure_set(
    planned: PlannedSet,
    options: ProbeOptions,
    model: tuple[str, str | None],
    workers: int = 0,
    cache: str | None = None,
) -> list[Outcome]:
    """Measure every task of a set; called by every process, and the same on each.

    Args:
        model: its name and its open_clip weights tag, for the records.
        cache: folder of embeddings, or None.
    """
    subject, size = planned.subject, planned.config.batch_size
    kinds = set().union(*(TASKS[task] for task in planned.tasks))
    found = embed(subject, planned.test, kinds, size, workers, cache)
    train = None
    if planned.train is not None:
        train = embed(subject, planned.train, {"feature"}, size, workers, cache)
    outcomes = []
    for task in planned.tasks:
        measured = _measure(task, planned, found, train, options)
        record = make_record(*model, planned, task, measured, found)
        if train is not None and planned.train is not None and "feature" in TASKS[task]:
            record |= {"n_train": len(train.keys), "train": planned.train.fingerprint()}
        outcomes.append(Outcome(planned, task, measured, found, record))
    return outcomes


def _measure(
    task: str,
    planned: PlannedSet,
    found: EmbeddedSet,
    train: EmbeddedSet | None,
    options: ProbeOptions,
) -> Measurement:
    config, encode_text = planned.config, planned.subject.encode_text
    if task == "retrieval":
        return measure_retrieval(found, config.recall_ks)
    if task == "zero_shot_classification" and encode_text is not None:
        return measure_zero_shot(
            found, encode_text, planned.prompts, planned.classnames, config.label_kind,
            config.batch_size,
        )  # fmt: skip
    if train is None:
        raise ValueError(f"{task} needs a training split")
    return measure_probe(task, train, found, planned.classnames, options)
