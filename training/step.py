"""One optimizer step: learning rates, forward and backward over the parts, clip, guard, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.config import OptimizerConfig
from training.ema import WeightAverage
from training.finite import FiniteGuard
from training.objective import Batch, Metrics, Objective, split_batch
from training.parallel import Layout
from training.plan import Plan
from training.schedules import learning_rate_factor


class TrainingStep:
    """Trains `objective` on one batch after the other.

    Args:
        wrapped: the objective as accelerate has prepared it; all training goes through it.
        updater: the prepared optimizer.
        average: of the weights, to keep up with them.
        before_update: called when the gradient is there and the weights are about to change.
        parts: pieces that this process's share of a batch is split into.
        plan: the schedule; the number of steps may become known later.
    """

    def __init__(
        self,
        objective: Objective,
        wrapped: nn.Module,
        updater: Any,
        accelerator: Accelerator,
        guard: FiniteGuard,
        layout: Layout,
        optim: OptimizerConfig,
        plan: Plan,
        before_update: Callable[[], None],
        *,
        parts: int,
        average: WeightAverage | None = None,
    ) -> None:
        self.objective, self.wrapped, self.updater = objective, wrapped, updater
        self.accelerator, self.guard, self.layout = accelerator, guard, layout
        self.optim, self.plan, self.parts, self.average = optim, plan, parts, average
        self.before_update = before_update
        # Accelerate's own method looks for a package in every step; only a scaler needs it.
        self._update = updater.optimizer.step if accelerator.scaler is None else updater.step
        self.rate = 0.0  # of the last step, before factors

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Metrics]:
        """Do step number `step`, counted from 0.

        Returns:
            Detached loss, gradient norm and metrics of this process, on the device.
        """
        self._set_learning_rates(step)
        self.objective.before_step(step)
        with eager_if(self.objective.wants_details):
            results = self._backward(split_batch(batch, self.parts))
        norm = self._clip()
        loss = torch.stack([loss for loss, _ in results]).mean()
        metrics = {
            name: torch.stack([metrics[name] for _, metrics in results]).mean()
            for name in results[0][1]
        }
        self.before_update()
        self._apply(self.guard.check(loss, norm, step + 1, batch.get("key")))
        self.guard.count(self.updater.step_was_skipped, step + 1)
        self.updater.zero_grad()
        self.objective.after_step()
        if self.average is not None:
            self.average.update()
        return loss, norm, metrics

    def _apply(self, leave_out: Tensor | None) -> None:
        """Update the weights unless the flag says no, without waiting for it where possible."""
        optimizer = self.updater.optimizer
        if leave_out is None:
            self._update()
        elif (
            optimizer.defaults.get("fused")
            and self.layout.fused_skips
            and self.accelerator.scaler is None
        ):
            optimizer.found_inf = leave_out.float()  # as a gradient scaler tells fused kernels
            self._update()
        elif not bool(leave_out):
            self._update()

    def _set_learning_rates(self, step: int) -> None:
        factor = learning_rate_factor(step, self.plan.steps, self.plan.schedule)
        self.rate = self.optim.lr * factor
        for group in self.updater.param_groups:
            group["lr"] = self.rate * group["lr_factor"]

    def rates(self) -> dict[str, float]:
        """The learning rate of the last step, and those of parameters with factors of their own."""
        factors = {group["lr_factor"] for group in self.updater.param_groups} - {1.0}
        own = {f"lr_x{factor:g}": self.rate * factor for factor in sorted(factors)}
        return {"lr": self.rate} | own

    def _backward(self, parts: list[Batch]) -> list[tuple[Tensor, Metrics]]:
        """Accumulate the gradient of the batch, synchronised in the last backward pass only;
        returns detached loss and metrics of each part."""
        losses = self.objective.part_losses(self.wrapped, parts)
        results = []
        for number in range(1, len(parts) + 1):
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss, metrics = next(losses)  # the forward passes too must know whether to prepare
                self.accelerator.backward(loss / len(parts))
            results.append((loss.detach(), metrics))
        return results

    def _clip(self) -> Tensor:
        """Clip by the global norm, and return what it was before."""
        limit = self.optim.clip_norm or math.inf
        return self.layout.clip(self.accelerator, limit)


def eager_if(wanted: bool) -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled: hooks on the inside of them are not called otherwise."""
    return torch.compiler.set_stance("force_eager") if wanted else nullcontext()
