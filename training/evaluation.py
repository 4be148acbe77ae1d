"""Running evaluators in the middle of training, which goes on as if they had not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from training.checkpoint import restore_random_state
from training.ema import WeightAverage
from training.objective import Evaluator, Objective

Figures = dict[str, float | None]


class Evaluation:
    """Figures of all evaluators, of the present weights and of the averaged ones.

    Args:
        average: whose weights are evaluated too, with names that begin with `ema/`; or None.
        leaves: makes the context in which evaluators may be interrupted.
    """

    def __init__(
        self,
        objective: Objective,
        evaluators: Sequence[Evaluator],
        accelerator: Accelerator,
        average: WeightAverage | None,
        leaves: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.objective, self.evaluators, self.accelerator = objective, evaluators, accelerator
        self.average, self.leaves = average, leaves

    def __call__(self, outside: dict[str, torch.Tensor]) -> Figures:
        """Evaluate in eval mode, and restore the mode and the generators' states `outside`."""
        was_training = self.objective.training
        self.objective.eval()
        try:
            figures = self._figures("")
            if self.average is not None:
                with self.average.in_place():
                    figures |= self._figures("ema/")
        finally:
            restore_random_state(outside)
            self.objective.train(was_training)
        return figures

    def _figures(self, prefix: str) -> Figures:
        with self.leaves(), torch.inference_mode(), self.accelerator.autocast():
            return {
                f"{prefix}{evaluator.name}/{name}": value
                for evaluator in self.evaluators
                for name, value in evaluator(self.objective.model).items()
            }
