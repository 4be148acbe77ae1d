"""The training loop. It knows batches, an objective and evaluators, and no task.

One step: fetch a batch, forward and backward through the wrapped objective, clip, update, log.
Positions are counted in steps; samples seen are steps times the global batch.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoint import CheckpointWriter, random_state, restore_random_state
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.durations import seconds
from training.ema import WeightAverage
from training.evaluation import Evaluation
from training.machine import keep_freed_memory
from training.objective import Batch, Evaluator, Metrics, Objective, TrainingStream, check_share
from training.optim import build_optimizer
from training.parallel import Layout
from training.plan import (
    MEASURED,
    UNKNOWN,
    announce,
    check_settings,
    make_guard,
    make_plan,
    say_speed,
)
from training.processes import Agreement, Watch, end_loaders
from training.progress import Progress
from training.run_directory import has_row
from training.run_log import say
from training.saving import SaveError, Saver, total_counts
from training.signals import Interrupted, StopRequests
from training.step import TrainingStep
from training.tracking import Tracking


class Trainer:
    """Trains `objective` on `stream`; `fit` runs to the last step, or to a request to stop.

    Args:
        accelerator: device, precision and processes.
        run_dir: an existing folder; receives metrics, evaluations and checkpoints.
        resume: a verified checkpoint of the same run to continue from, or None.
        settings: the run's settings by dotted name, for trackers.
        flops: of the model for one sample, forward, or None.
        describe: captions of the rows of a batch, for the pictures of the first batches.
        layout: how parameters lie on the processes; whole on each when None.

    Attributes:
        stopped: why `fit` has ended before the last step, or None.

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
        *,
        settings: Mapping[str, Any] | None = None,
        flops: float | None = None,
        describe: Callable[[Batch], list[str]] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout or Layout()
        self.objective, self.stream, self.evaluators = objective, stream, evaluators
        self.train, self.optim, self.run_dir = train, optimizer, run_dir
        self.accelerator, self.last_checkpoint = accelerator, resume
        processes = accelerator.num_processes
        check_settings(train, optimizer, processes, [e.name for e in evaluators])
        self.plan = make_plan(train, schedule, len(stream))
        self._splitting = (
            objective.check_accumulation(train.accumulation, train.batch_size)
            if train.accumulation > 1
            else ""
        )
        no_decay = {f"model.{name}" for name in objective.no_weight_decay()}
        self.optimizer = build_optimizer(objective, no_decay, optimizer, accelerator.device)
        self.layout.place(objective, accelerator.device)
        self.average = WeightAverage(objective.model, train.ema_decay) if train.ema_decay else None
        self.guard = make_guard(train, accelerator, run_dir)
        self.saver = Saver(
            run_dir / "checkpoints",
            objective,
            self.optimizer,
            stream,
            accelerator,
            self.guard,
            self.layout,
            keep_last=train.keep_last,
            keep_every=self.plan.keep_every,
            keep_best=train.keep_best,
            in_background=train.save_in_background,
            average=self.average,
            exports_average=train.ema_export,
        )
        self.step, self.skipped = 0, Counter[str]()
        self._resumed_random: dict[str, Tensor] | None = None
        if resume is not None:
            self._continue_from(resume)
        if train.gradient_checkpointing:
            objective.checkpoint_gradients()
        for part in objective.compiled_parts() if train.compile else ():
            part.compile(backend=train.compile)
        self.wrapped: nn.Module
        self.wrapped, self.updater = self.layout.prepare(accelerator, objective, self.optimizer)
        if self.average is not None:
            self.average.average = self.layout.divide(self.average.average, objective.model)
        self._update = TrainingStep(
            objective,
            self.wrapped,
            self.updater,
            accelerator,
            self.guard,
            self.layout,
            optimizer,
            self.plan,
            self.saver.settle,
            parts=train.accumulation,
            average=self.average,
        )
        self._evaluation = Evaluation(
            objective,
            evaluators,
            accelerator,
            self.average if train.ema_evaluate else None,
            self.layout,
            # Several processes cannot leave an evaluation together; see `_evaluate_and_save`.
            lambda: self._requests.interruptible() if processes == 1 else nullcontext(),
        )
        self.stopped: str | None = None
        self._tracking_options = {"settings": settings or {}, "flops": flops, "describe": describe}
        self.tracking: Tracking | None = None
        self._requests = StopRequests()
        self._watch: Watch | None = None
        self._pending: CheckpointWriter | None = None
        self._publishing = threading.Lock()

    def _continue_from(self, checkpoint: Path) -> None:
        position = self.saver.load(checkpoint)
        self.step, self.skipped = position.step, position.skipped
        self._resumed_random = position.random
        if self.plan.time is not None and position.planned_steps is not None:
            self.plan.steps = position.planned_steps

    def fit(self) -> dict[str, float | None]:
        """Train to the last step, then evaluate and save; returns the last evaluation.

        SIGTERM, SIGINT, SIGUSR1 and the end of `train.max_time` end it earlier: with a checkpoint,
        after the same step on all processes, and with the reason in `stopped`.

        Raises:
            NonFiniteError: the loss or the gradient was not finite; see `FiniteGuard` for when.
        """
        main = self.accelerator.is_main_process
        if main:
            self._announce()
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        budget = self.train.max_time and seconds(self.train.max_time, "train.max_time")
        progress = Progress(self.step, self.plan.steps, main)
        self.tracking = Tracking(
            self.run_dir,
            self.train,
            self.accelerator,
            progress,
            resumed_step=self.step,
            **self._tracking_options,
        )
        failed = True
        try:
            with StopRequests(budget or None, says=main) as self._requests:
                self._start_watch()
                figures = self._run(progress)
            failed = False
            return figures
        except RuntimeError:  # perhaps because another process has died
            if self._watch is not None:
                self._watch.explain()
            raise
        finally:
            with suppress(SaveError):  # said already, or less than what has ended the run
                self.saver.finish()
            progress.close()
            self.tracking.summary(self.step, self.skipped)
            self.tracking.close()
            if self._watch is not None:
                self._watch.close(failed)
            if failed or self.stopped:
                end_loaders()

    def _run(self, progress: Progress) -> dict[str, float | None]:
        assert self.tracking is not None
        agreement = Agreement(self.accelerator.num_processes)
        batches = iter(self.stream.batches(self.step))
        if self._resumed_random is not None:  # only here: a new loader draws a random number
            restore_random_state(self._resumed_random)
        figures: dict[str, float | None] = {}
        self.wrapped.train()
        if agreement.largest(self.owes_evaluation()):
            figures = self._evaluate_and_save(True, False)
        started = time.perf_counter()
        while self.step < self.plan.steps:
            self.saver.check()
            batch = self._next(batches, progress)
            self._enter("waiting for the others")
            if agreement.largest(batch is None):
                self._stop()
                break
            assert batch is not None  # nobody wants to stop
            logs = self.plan.logs(self.step + 1, self.train.log_every)
            self.objective.wants_details = logs and self.train.log_routing
            self.tracking.draw(batch, self.step + 1)
            self._enter("in a training step")
            loss, norm, metrics = self._update(batch, self.step)
            self.step += 1
            progress.advance(self.train.batch_size)
            if self.step == MEASURED:
                self._measure((time.perf_counter() - started) / MEASURED, agreement, progress)
            if logs:
                self._log(loss, norm, metrics)
            evaluates, saves = (
                self._is_due(self.plan.eval_every),
                self._is_due(self.plan.save_every),
            )
            if evaluates or saves:
                with progress.paused():
                    figures = self._evaluate_and_save(evaluates, saves) or figures
        self.saver.finish()
        return figures

    def _is_due(self, every: int) -> bool:
        return self.step == self.plan.steps or (every > 0 and self.step % every == 0)

    def owes_evaluation(self) -> bool:
        """Whether the run has been stopped in the evaluation of the step where it stands."""
        due = self.step > 0 and bool(self.evaluators) and self._is_due(self.plan.eval_every)
        return due and not has_row(self.run_dir / "eval.jsonl", self.step)

    def _announce(self) -> None:
        announce(
            self.plan,
            self.train,
            self.objective,
            self.optim,
            self.accelerator,
            self.layout,
            len(self.stream),
            self.step,
        )
        if self._splitting:
            say(f"accumulation {self.train.accumulation}: {self._splitting}")

    def _start_watch(self) -> None:
        limit = seconds(self.train.stall_limit, "train.stall_limit")
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rescue = self._rescue if self.accelerator.is_main_process else None
        self._watch = Watch(rank, processes, limit, self._requests, rescue)
        self._watch.start()

    def _enter(self, phase: str) -> None:
        if self._watch is not None:
            self._watch.enter(phase, self.step)

    def _measure(self, step_time: float, agreement: Agreement, progress: Progress) -> None:
        """Say how long the run will take, and give a run of a given time its steps."""
        plan = self.plan
        if plan.time is not None and plan.steps == UNKNOWN:
            plan.steps = agreement.largest(max(MEASURED + 1, int(plan.time / step_time)))
            progress.set_total(plan.steps)
        if self.accelerator.is_main_process and plan.steps > 2 * MEASURED:
            say_speed(plan, step_time, self.step, self.accelerator.device)

    def _next(self, batches: Iterator[Batch], progress: Progress) -> Batch | None:
        """The next batch, on the device; None if a stop was requested."""
        self._enter("waiting for data")
        batch: Batch = {}
        with suppress(Interrupted), progress.waiting(), self._requests.interruptible():
            batch = next(batches)
        if self._requests.reason is not None:
            return None
        self.skipped.update(batch.pop("skipped", ()))
        share = self.train.batch_size // self.accelerator.num_processes
        check_share(batch, share, self.step + 1)
        device = self.accelerator.device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _stop(self) -> None:
        """End before the last step, with a checkpoint of this one."""
        self.stopped = self._requests.reason or "another process was asked to stop"
        if self.last_checkpoint is None or self.saver.last_step != self.step:
            self.save()

    def _log(self, loss: Tensor, norm: Tensor, metrics: Metrics) -> None:
        """Write a row of metrics. `skipped` are unusable samples so far, over all processes,
        `skipped_updates` those of the gradient scaler, `left_out_updates` those of the guard."""
        self.guard.verify(self.step)
        skipped = self.total_skipped()
        counts: dict[str, Any] = {
            "skipped": skipped.total(),
            "skipped_reasons": dict(skipped),
            "skipped_updates": self.guard.skipped,
            "left_out_updates": self.guard.left_out,
        }
        assert self.tracking is not None
        self.tracking.row(self.position, loss, norm, metrics, self._update.rates(), counts)

    @property
    def position(self) -> dict[str, int]:
        """How far the run has come, for checkpoints."""
        return {"step": self.step, "samples": self.samples, "planned_steps": self.plan.steps}

    @property
    def samples(self) -> int:
        """Samples seen so far, over all processes."""
        return self.step * self.train.batch_size

    def evaluate(self) -> dict[str, float | None]:
        """Run all evaluators on the model in eval mode; training continues as if they had not."""
        figures = self._evaluation(random_state())
        if self.tracking is not None:
            self.tracking.evaluation(self.position, figures)
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
        self.saver.finish()

    def _evaluate_and_save(self, evaluates: bool, saves: bool) -> dict[str, float | None]:
        """Do what is due after a step; returns the figures.

        The checkpoint is written before the evaluation and gets its name after it. So an
        evaluation that fails does not lose the step, not even where only one process fails and
        nothing can be gathered any more; and one that is killed is repeated.
        """
        alone = self.accelerator.num_processes == 1
        saves = saves or (evaluates and bool(self.train.keep_best))
        figures: dict[str, float | None] = {}
        # Several processes cannot leave an evaluation together, so a stop in it needs a checkpoint
        # that is written already.
        if saves or (evaluates and not alone):
            self._enter("saving")
            self._pending = self.saver.write(self.skipped, **self.position)
        try:
            if evaluates:
                self._enter("evaluating")
                self.saver.settle()  # an average may take the place of the weights
                figures = self.evaluate()
        except Interrupted:
            self.stopped = self._requests.reason
        finally:
            self._enter("saving")
            if saves:
                self._publish(figures)
            elif self._pending is not None:
                self.saver.discard(self._pending)
                self._pending = None
        if saves:
            self.accelerator.wait_for_everyone()
        return figures

    def _publish(self, figures: dict[str, float | None]) -> None:
        """Give the checkpoint that has been written its name, once."""
        with self._publishing:
            if self._pending is not None:
                path = self.saver.publish(self._pending, self.position, figures)
                self.last_checkpoint, self._pending = path, None

    def _rescue(self) -> str:
        """What the watch does for a main thread that cannot leave an evaluation."""
        self._publish({})
        self.saver.finish()
        return f"checkpoint {self.last_checkpoint}"
