"""The training loop. It knows batches, an objective and evaluators, and no task.

One step: fetch a batch, forward and backward through the wrapped objective, clip, update, log.
Positions are counted in steps; samples seen are steps times the global batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoint import random_state, restore_random_state
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.finite import FiniteGuard
from training.objective import Batch, Evaluator, Metrics, Objective, TrainingStream, check_share
from training.optim import build_optimizer
from training.parallel import Layout
from training.plan import announce, check_settings
from training.progress import Progress
from training.run_directory import MetricsWriter
from training.run_log import LOGGER
from training.saving import Saver, total_counts
from training.step import TrainingStep


class Trainer:
    """Trains `objective` on `stream`; `fit` runs to the last step.

    Args:
        accelerator: device, precision and processes.
        run_dir: an existing folder; receives metrics, evaluations and checkpoints.
        resume: a verified checkpoint of the same run to continue from, or None.
        layout: how parameters lie on the processes; whole on each when None.

    Raises:
        ValueError: settings that cannot work together.
        CheckpointError: the checkpoint belongs to another model or another stream.
    """

    def __init__(
        self,
        objective: Objective,
        stream: TrainingStream,
        evaluators: Sequence[Evaluator],
        train: TrainConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        accelerator: Accelerator,
        run_dir: Path,
        resume: Path | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout or Layout()
        self.objective, self.stream, self.evaluators = objective, stream, evaluators
        self.train, self.accelerator, self.run_dir = train, accelerator, run_dir
        processes = accelerator.num_processes
        check_settings(train, optimizer, schedule, processes, [e.name for e in evaluators])
        self._splitting = (
            objective.check_accumulation(train.accumulation, train.batch_size)
            if train.accumulation > 1
            else ""
        )
        no_decay = {f"model.{name}" for name in objective.no_weight_decay()}
        self.optimizer = build_optimizer(objective, no_decay, optimizer)
        self.layout.place(objective, accelerator.device)
        self.guard = FiniteGuard(accelerator.device, train.precision)
        self.saver = Saver(
            run_dir / "checkpoints",
            objective,
            self.optimizer,
            stream,
            accelerator,
            self.guard,
            self.layout,
            keep_last=train.keep_last,
        )
        self.step, self.skipped, self.last_checkpoint = 0, Counter[str](), resume
        self._resumed_random: dict[str, Tensor] | None = None
        if resume is not None:
            self.step, self.skipped, self._resumed_random = self.saver.load(resume)
        self.wrapped: nn.Module
        self.wrapped, self.updater = self.layout.prepare(accelerator, objective, self.optimizer)
        self._update = TrainingStep(
            objective,
            self.wrapped,
            self.updater,
            accelerator,
            self.guard,
            self.layout,
            optimizer,
            schedule,
            parts=train.accumulation,
            total=train.steps,
        )
        self.writer: MetricsWriter | None = None

    def fit(self) -> dict[str, float | None]:
        """Train to the last step, then evaluate and save; returns the last evaluation.

        Raises:
            NonFiniteError: the loss or the gradient was not finite; see `FiniteGuard` for when.
        """
        train, main = self.train, self.accelerator.is_main_process
        if main:
            announce(
                train,
                self.objective,
                self.accelerator,
                self.layout,
                len(self.stream),
                self.step,
                self._splitting,
            )
            self.writer = MetricsWriter(
                self.run_dir, resumed_step=self.step, tensorboard=train.tensorboard
            )
        progress = Progress(self.step, train.steps, main)
        batches = iter(self.stream.batches(self.step))
        if self._resumed_random is not None:  # only here: a new loader draws a random number
            restore_random_state(self._resumed_random)
        figures: dict[str, float | None] = {}
        self.wrapped.train()
        try:
            while self.step < train.steps:
                batch = self._next(batches, progress)
                logs = self._logs(self.step + 1)
                self.objective.wants_details = logs and train.log_routing
                loss, norm, metrics = self._update(batch, self.step)
                self.step += 1
                progress.advance(train.batch_size)
                last = self.step == train.steps
                if logs:
                    self._log(loss, norm, metrics, progress)
                evaluates = last or _is_due(self.step, train.eval_every)
                saves = last or _is_due(self.step, train.save_every)
                if evaluates or saves:
                    with progress.paused():
                        figures = self._evaluate_and_save(evaluates, saves) or figures
        finally:
            progress.close()
            if self.writer is not None:
                self.writer.close()
        return figures

    def _logs(self, step: int) -> bool:
        return step in (1, self.train.steps) or step % self.train.log_every == 0

    def _next(self, batches: Iterator[Batch], progress: Progress) -> Batch:
        with progress.waiting():
            batch = next(batches)
        self.skipped.update(batch.pop("skipped", ()))
        share = self.train.batch_size // self.accelerator.num_processes
        check_share(batch, share, self.step + 1)
        device = self.accelerator.device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _log(self, loss: Tensor, norm: Tensor, metrics: Metrics, progress: Progress) -> None:
        """Write a row of metrics: means over all processes, but counts of this process only.

        `skipped` are its unusable samples so far, `skipped_updates` the updates that the gradient
        scaler has skipped; both are left out while they are zero.
        """
        self.guard.verify(self.step)
        names = sorted(metrics)
        stacked = torch.stack([loss.float(), *(metrics[name].float() for name in names)])
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        if self.writer is None:
            return
        values = dict(zip(["loss", *names], stacked.tolist(), strict=True))
        speed = progress.speed()
        counts = {"skipped": self.skipped.total(), "skipped_updates": self.guard.skipped}
        self.writer.write(
            "metrics",
            self.step,
            {
                "samples": self.samples,
                **values,
                "grad_norm": float(norm),
                "lr": self.updater.param_groups[0]["lr"],
                **speed,
                **{name: count for name, count in counts.items() if count},
            },
        )
        progress.show(values["loss"], speed)

    @property
    def samples(self) -> int:
        """Samples seen so far, over all processes."""
        return self.step * self.train.batch_size

    def evaluate(self) -> dict[str, float | None]:
        """Run all evaluators on the model in eval mode; training continues as if they had not."""
        if not self.evaluators:  # divided parameters need not be made whole for nothing
            return {}
        was_training = self.objective.training
        self.objective.eval()
        outside = random_state()
        figures: dict[str, float | None] = {}
        with (
            self.layout.whole_weights(self.objective),
            torch.inference_mode(),
            self.accelerator.autocast(),
        ):
            for evaluator in self.evaluators:
                for name, value in evaluator(self.objective.model).items():
                    figures[f"{evaluator.name}/{name}"] = value
        restore_random_state(outside)
        self.objective.train(was_training)
        if self.writer is not None and figures:
            self.writer.write("eval", self.step, {"samples": self.samples, **figures})
            LOGGER.info("evaluation at step %d: %s", self.step, figures)
        return figures

    def total_skipped(self) -> Counter[str]:
        """Skipped samples by reason, over all processes."""
        return total_counts(self.skipped, self.accelerator.num_processes)

    def save(self) -> None:
        """Publish a checkpoint of this step and remove the ones that are no longer kept.

        Raises:
            NonFiniteError: the weights have been updated with values that are not finite.
        """
        self._evaluate_and_save(evaluates=False, saves=True)

    def _evaluate_and_save(self, evaluates: bool, saves: bool) -> dict[str, float | None]:
        """Do what is due after a step; returns the figures.

        The checkpoint is written before the evaluation and gets its name after it. So an
        evaluation that fails does not lose the step, not even where only one process fails and
        nothing can be gathered any more; and one that is killed is repeated.
        """
        writer = self.saver.write(self.step, self.samples, self.skipped) if saves else None
        try:
            figures = self.evaluate() if evaluates else {}
        finally:
            if writer is not None:
                self.last_checkpoint = self.saver.publish(writer, self.step)
        if saves:
            self.accelerator.wait_for_everyone()
        return figures


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
