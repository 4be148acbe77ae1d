"""Running evaluators in the middle of training, which goes on as if they had not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator

from training.checkpoint import restore_random_state
from training.ema import AVERAGED, WeightAverage
from training.objective import Evaluator, Objective
from training.parallel import Layout

Figures = dict[str, float | None]


class Evaluation:
    """Figures of all evaluators, of the present weights and of the averaged ones.

    Args:
        average: whose weights are evaluated too, with names that begin with `ema/`; or None.
        layout: how parameters lie on the processes.
        leaves: makes the context in which evaluators may be interrupted.
    """

    def __init__(
        self,
        objective: Objective,
        evaluators: Sequence[Evaluator],
        accelerator: Accelerator,
        average: WeightAverage | None,
        layout: Layout,
        leaves: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.objective, self.evaluators, self.accelerator = objective, evaluators, accelerator
        self.average, self.layout, self.leaves = average, layout, leaves

    def __call__(self, outside: dict[str, torch.Tensor]) -> Figures:
        """Evaluate in eval mode, and restore the mode and the generators' states `outside`."""
        was_training = self.objective.training
        self.objective.eval()
        try:
            figures = self._figures("")
            if self.average is not None:
                with self.average.in_place():
                    figures |= self._figures(AVERAGED)
        finally:
            restore_random_state(outside)
            self.objective.train(was_training)
        return figures

    def _figures(self, prefix: str) -> Figures:
        if not self.evaluators:  # divided parameters need not be made whole for nothing
            return {}
        whole = self.layout.whole_weights(self.objective)
        with self.leaves(), whole, torch.inference_mode(), self.accelerator.autocast():
            return {
                f"{prefix}{evaluator.name}/{name}": value
                for evaluator in self.evaluators
                for name, value in evaluator(self.objective.model).items()
            }
