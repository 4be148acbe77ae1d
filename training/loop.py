"""The training loop. It knows batches, an objective and evaluators, and no task.

One step: fetch a batch, forward and backward through the wrapped objective, clip, update, log.
Positions are counted in steps; samples seen are steps times the global batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoint import (
    OPTIMIZER,
    STATE,
    CheckpointError,
    CheckpointWriter,
    load_optimizer_tensors,
    load_tensors,
    load_weights,
    optimizer_tensors,
    prune_checkpoints,
    random_state,
    read_state,
    restore_random_state,
)
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.finite import FiniteGuard
from training.objective import (
    Batch,
    Evaluator,
    Objective,
    TrainingStream,
    check_share,
    split_batch,
)
from training.optim import build_optimizer
from training.progress import Progress
from training.run_directory import MetricsWriter, check_tensorboard
from training.run_log import LOGGER, say
from training.schedules import check_schedule, learning_rate_factor


class Trainer:
    """Trains `objective` on `stream`; `fit` runs to the last step.

    Args:
        accelerator: device, precision and processes.
        run_dir: an existing folder; receives metrics, evaluations and checkpoints.
        resume: a verified checkpoint of the same run to continue from, or None.

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
    ) -> None:
        self.objective, self.stream, self.evaluators = objective, stream, evaluators
        self.train, self.optim, self.schedule = train, optimizer, schedule
        self.accelerator, self.run_dir = accelerator, run_dir
        self._check_settings()
        model_names = objective.no_weight_decay()
        self.optimizer = build_optimizer(
            objective, {f"model.{name}" for name in model_names}, optimizer
        )
        objective.to(accelerator.device)
        self.step = 0
        self.skipped: Counter[str] = Counter()
        self.last_checkpoint: Path | None = resume
        self._resumed_random: dict[str, Tensor] | None = None
        self.guard = FiniteGuard(accelerator.device, train.precision)
        if resume is not None:
            self._load(resume)
        self.wrapped: nn.Module
        self.wrapped, self.updater = accelerator.prepare(objective, self.optimizer)
        self.writer: MetricsWriter | None = None

    def _check_settings(self) -> None:
        train, processes = self.train, self.accelerator.num_processes
        for name in ("steps", "batch_size", "accumulation", "log_every", "keep_last"):
            if getattr(train, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
        for name in ("eval_every", "save_every"):
            if getattr(train, name) < 0:
                raise ValueError(f"train.{name} must not be negative; 0 is only at the end")
        if self.optim.clip_norm < 0:
            raise ValueError("optimizer.clip_norm must not be negative; 0 turns clipping off")
        if train.tensorboard:
            check_tensorboard()
        check_schedule(train.steps, self.schedule)
        sets = [evaluator.name for evaluator in self.evaluators]
        if len(set(sets)) < len(sets):
            raise ValueError(f"evaluation: give each set a name of its own, got {', '.join(sets)}")
        if train.batch_size % (processes * train.accumulation):
            raise ValueError(
                f"train.batch_size {train.batch_size} cannot be divided into {processes} processes"
                f" x {train.accumulation} parts"
            )
        self._splitting = (
            self.objective.check_accumulation(train.accumulation, train.batch_size)
            if train.accumulation > 1
            else ""
        )

    def fit(self) -> dict[str, float | None]:
        """Train to the last step, then evaluate and save; returns the last evaluation.

        Raises:
            NonFiniteError: the loss or the gradient was not finite; see `FiniteGuard` for when.
        """
        train = self.train
        self._announce()
        if self.accelerator.is_main_process:
            self.writer = MetricsWriter(
                self.run_dir, resumed_step=self.step, tensorboard=train.tensorboard
            )
        progress = Progress(self.step, train.steps, self.accelerator.is_main_process)
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
                loss, norm, metrics = self._update(batch)
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

    def _announce(self) -> None:
        train, samples = self.train, len(self.stream)
        if not self.accelerator.is_main_process:
            return
        total = sum(p.numel() for p in self.objective.parameters())
        trained = sum(p.numel() for p in self.objective.parameters() if p.requires_grad)
        say(
            f"{train.steps} steps of {train.batch_size} samples"
            f" = {train.steps * train.batch_size / samples:.1f} epochs of {samples};"
            f" {trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained;"
            f" {self.accelerator.num_processes} process(es) on {self.accelerator.device.type},"
            f" {train.precision}" + (f"; resumed at step {self.step}" if self.step else "")
        )
        if self._splitting:
            say(f"accumulation {train.accumulation}: {self._splitting}")

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

    def _update(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One optimizer step; returns detached loss, gradient norm and metrics, on the device."""
        rate = self.optim.lr * learning_rate_factor(self.step, self.train.steps, self.schedule)
        for group in self.updater.param_groups:
            group["lr"] = rate * group["lr_factor"]
        self.objective.before_step(self.step)
        results = self._backward(split_batch(batch, self.train.accumulation))
        limit = self.optim.clip_norm or math.inf
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit))
        loss = torch.stack([loss for loss, _ in results]).mean()
        metrics = {
            name: torch.stack([metrics[name] for _, metrics in results]).mean()
            for name in results[0][1]
        }
        self.guard.check(loss, norm, self.step + 1)
        self.updater.step()
        self.guard.count(self.updater.step_was_skipped, self.step + 1)
        self.updater.zero_grad()
        self.objective.after_step()
        return loss, norm, metrics

    def _backward(self, parts: list[Batch]) -> list[tuple[Tensor, dict[str, Tensor]]]:
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

    def _log(
        self, loss: Tensor, norm: Tensor, metrics: dict[str, Tensor], progress: Progress
    ) -> None:
        """Write a row of metrics, over all processes.

        `samples` have been seen so far; `skipped` is how many could not be used besides,
        `skipped_reasons` says why, and `skipped_updates` are the updates that the gradient scaler
        has skipped; these are left out while they are zero.
        """
        self.guard.verify(self.step)
        names = sorted(metrics)
        stacked = torch.stack([loss.float(), *(metrics[name].float() for name in names)])
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        skipped = self.total_skipped()
        if self.writer is None:
            return
        values = dict(zip(["loss", *names], stacked.tolist(), strict=True))
        speed = progress.speed()
        counts: dict[str, Any] = {
            "skipped": skipped.total(),
            "skipped_reasons": dict(skipped),
            "skipped_updates": self.guard.skipped,
        }
        self.writer.write(
            "metrics",
            self.step,
            {
                "samples": self.step * self.train.batch_size,
                **values,
                "grad_norm": float(norm),
                "lr": self.updater.param_groups[0]["lr"],
                **speed,
                **{name: count for name, count in counts.items() if count},
            },
        )
        progress.show(values["loss"], speed)

    def evaluate(self) -> dict[str, float | None]:
        """Run all evaluators on the model in eval mode; training continues as if they had not."""
        was_training = self.objective.training
        self.objective.eval()
        outside = random_state()
        figures: dict[str, float | None] = {}
        with torch.inference_mode(), self.accelerator.autocast():
            for evaluator in self.evaluators:
                for name, value in evaluator(self.objective.model).items():
                    figures[f"{evaluator.name}/{name}"] = value
        restore_random_state(outside)
        self.objective.train(was_training)
        if self.writer is not None and figures:
            samples = self.step * self.train.batch_size
            self.writer.write("eval", self.step, {"samples": samples, **figures})
            LOGGER.info("evaluation at step %d: %s", self.step, figures)
        return figures

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "samples": self.step * self.train.batch_size,
            "stream": self.stream.identity(),
            "skipped": dict(self.total_skipped()),
            "processes": self.accelerator.num_processes,
            "skipped_updates": self.guard.skipped,
            "gradient_scaler": scaler.state_dict() if scaler is not None else None,
        }

    def total_skipped(self) -> Counter[str]:
        """Skipped samples by reason, over all processes."""
        if self.accelerator.num_processes == 1:
            return self.skipped
        gathered: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(gathered, dict(self.skipped))
        return sum((Counter(part) for part in gathered), Counter())

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
        writer = self._write_checkpoint() if saves else None
        try:
            figures = self.evaluate() if evaluates else {}
        finally:
            if writer is not None and self.accelerator.is_main_process:
                self.last_checkpoint = writer.publish(self.step)
                prune_checkpoints(writer.folder, self.last_checkpoint, self.train.keep_last)
        if saves:
            self.accelerator.wait_for_everyone()
        return figures

    def _write_checkpoint(self) -> CheckpointWriter:
        """Write everything but the name of this step's checkpoint, on all processes."""
        accelerator = self.accelerator
        self.guard.verify(self.step)
        writer = CheckpointWriter(self.run_dir / "checkpoints", self.step)
        state = self.state()
        if accelerator.is_main_process:
            writer.begin()
            writer.add_tensors(self.objective.weights_file, self.objective.model.state_dict())
            writer.add_tensors(OPTIMIZER, optimizer_tensors(self.optimizer, self.objective))
            writer.add_json(STATE, state)
            for name, content in self.objective.config_files().items():
                writer.add_json(name, content)
        accelerator.wait_for_everyone()
        writer.add_tensors(f"rng/rank_{accelerator.process_index}.safetensors", random_state())
        accelerator.wait_for_everyone()
        return writer

    def _load(self, folder: Path) -> None:
        state = read_state(folder)
        expected, found = self.stream.identity(), state["stream"]
        changed = [name for name in expected if expected[name] != found.get(name)]
        if changed:
            differences = ", ".join(
                f"{name} was {found.get(name)}, is {expected[name]}" for name in changed
            )
            raise CheckpointError(f"cannot resume '{folder}' on another stream: {differences}")
        weights = load_tensors(folder / self.objective.weights_file)
        load_weights(self.objective.model, weights, str(folder))
        load_optimizer_tensors(self.optimizer, self.objective, load_tensors(folder / OPTIMIZER))
        own = folder / "rng" / f"rank_{self.accelerator.process_index}.safetensors"
        if own.is_file():  # a process that did not exist before starts with its own seed
            self._resumed_random = load_tensors(own)
        if self.accelerator.scaler is not None and state["gradient_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])
        self.step = state["step"]
        self.guard.skipped, self.guard.verified = state.get("skipped_updates", 0), self.step
        if self.accelerator.is_main_process:
            self.skipped = Counter(state["skipped"])


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
