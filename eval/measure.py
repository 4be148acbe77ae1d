"""Measuring all tasks of all sets: embed each once, then one measurement for each task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from eval.embedding import EmbeddedSet, embed
from eval.evaluation_sets import PlannedSet
from eval.measurement import Measurement
from eval.records import make_record
from eval.tasks import (
    TASKS,
    FewShotOutcomes,
    ProbeOptions,
    few_shot_outcomes,
    measure_probe,
    measure_retrieval,
    measure_zero_shot,
    settle_few_shot,
)


@dataclass
class Outcome:
    """A measured task with its record."""

    planned: PlannedSet
    task: str
    measured: Measurement
    found: EmbeddedSet
    record: dict[str, Any]


def measure_sets(
    planned: Iterable[PlannedSet],
    options: ProbeOptions,
    model: tuple[str, str | None],
    workers: int = 0,
    cache: str | None = None,
) -> list[Outcome]:
    """Measure every task of all sets; called by every process, and the same on each.

    Args:
        model: its name and its open_clip weights tag, for the records.
        cache: folder of embeddings, or None.
    """
    works = measure_tasks(planned, options, workers, cache)
    return [_outcome(work, model) for work in works]


@dataclass
class Work:
    """A measured task of a set."""

    planned: PlannedSet
    task: str
    found: EmbeddedSet
    train: EmbeddedSet | None
    measured: Measurement
    few_shot: FewShotOutcomes | None = None


def measure_tasks(
    planned: Iterable[PlannedSet],
    options: ProbeOptions,
    workers: int = 0,
    cache: str | None = None,
) -> list[Work]:
    """As `measure_sets`, without records, for which weights are hashed."""
    works = [work for item in planned for work in _measure_set(item, options, workers, cache)]
    # The strength of the few-shot probe is chosen over all sets, so its figures come last.
    few = [work for work in works if work.few_shot is not None]
    settled = settle_few_shot([w.few_shot for w in few if w.few_shot is not None], options)
    for work, measured in zip(few, settled, strict=True):
        work.measured = measured
    return works


def _measure_set(
    planned: PlannedSet, options: ProbeOptions, workers: int, cache: str | None
) -> list[Work]:
    subject, size = planned.subject, planned.config.batch_size
    kinds = set().union(*(TASKS[task] for task in planned.tasks))
    found = embed(subject, planned.test, kinds, size, workers, cache)
    train = None
    if planned.train is not None:
        train = embed(subject, planned.train, {"feature"}, size, workers, cache)
    return [_measure(task, planned, found, train, options) for task in planned.tasks]


def _measure(
    task: str,
    planned: PlannedSet,
    found: EmbeddedSet,
    train: EmbeddedSet | None,
    options: ProbeOptions,
) -> Work:
    config, encode_text = planned.config, planned.subject.encode_text
    work = Work(planned, task, found, train, Measurement())
    if task == "retrieval":
        work.measured = measure_retrieval(found, config.recall_ks)
    elif task == "zero_shot_classification" and encode_text is not None:
        work.measured = measure_zero_shot(
            found, encode_text, planned.prompts, planned.classnames, config.label_kind,
            config.batch_size,
        )  # fmt: skip
    elif train is None:
        raise ValueError(f"{task} needs a training split")
    elif task == "few_shot":
        work.few_shot = few_shot_outcomes(train, found, planned.classnames, options)
    else:
        work.measured = measure_probe(task, train, found, planned.classnames, options)
    return work


def _outcome(work: Work, model: tuple[str, str | None]) -> Outcome:
    planned, train = work.planned, work.train
    record = make_record(*model, planned, work.task, work.measured, work.found)
    if train is not None and planned.train is not None and "feature" in TASKS[work.task]:
        record |= {
            "n_train": len(train.keys),
            "train": planned.train.fingerprint(),
            "train_content_sha256": train.content(captions=False),
        }
    return Outcome(planned, work.task, work.measured, work.found, record)
