"""The evaluators of `scripts.evaluate` on schedule, on the model that is being trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from eval.config import EvaluationSetConfig
from eval.evaluation_sets import plan_set
from eval.measure import measure_tasks
from eval.subject import Subject
from eval.tasks import ProbeOptions, figure_name


class ScheduledEvaluator:
    """Measures the tasks of one set; the processes share the embedding.

    Figures have the names that `figure_name` gives them.

    Args:
        config: the set; everything that can be refused is refused here.
        subject_of: makes a subject of the model, where it lies at that moment.
        model: as it is before training.
        options: of the probes.

    Raises:
        ShardError, ValueError: what cannot be measured, and why.
    """

    def __init__(
        self,
        config: EvaluationSetConfig,
        subject_of: Callable[[nn.Module], Subject],
        model: nn.Module,
        options: ProbeOptions | None = None,
    ) -> None:
        self.subject_of, self.options = subject_of, options or ProbeOptions()
        self.planned = plan_set(config, subject_of(model))
        self.name = self.planned.name

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        """Figures of a model in eval mode."""
        subject = self.subject_of(model).for_set(self.planned.config.resize_mode)
        works = measure_tasks([replace(self.planned, subject=subject)], self.options)
        figures = {
            figure_name(work.task, metric): value
            for work in works
            for metric, value in work.measured.metrics.items()
        }
        skipped = works[0].found.skipped.total()
        return figures | ({"skipped": float(skipped)} if skipped else {})
