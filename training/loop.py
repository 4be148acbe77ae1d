"""The training loop. It knows batches, an objective and evaluators, and no task.

One step: fetch a batch, forward and backward through the wrapped objective, clip, update, log.
Positions are counted in steps; samples seen are steps times the global batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from training.checkpoint import random_state, restore_random_state
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.durations import seconds
from training.ema import WeightAverage
from training.evaluation import Evaluation, Figures
from training.machine import keep_freed_memory
from training.milestones import Milestones
from training.objective import Batch, Evaluator, Metrics, Objective, TrainingStream, check_share
from training.optim import build_optimizer
from training.pace import MEASURED, Pace
from training.parallel import Layout, Prepared
from training.plan import UNKNOWN, announce, check_settings, make_guard, make_plan, say_speed
from training.processes import Agreement, Watch, end_loaders
from training.progress import Progress
from training.retention import Retention
from training.run_directory import has_row
from training.run_log import say
from training.saving import SaveError, Saver, total_counts
from training.signals import Interrupted, StopRequests
from training.step import TrainingStep
from training.tracking import Report, Tracking, peak_tflops


class Trainer:
    """Trains `objective` on `stream`; `fit` runs to the last step, or to a request to stop.

    Args:
        accelerator: device, precision and processes.
        run_dir: an existing folder; receives metrics, evaluations and checkpoints.
        resume: a verified checkpoint of the same run to continue from, or None.
        report: what the run can tell about itself.
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
        report: Report | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout or Layout()
        self.objective, self.stream, self.evaluators = objective, stream, evaluators
        self.train, self.optim, self.run_dir = train, optimizer, run_dir
        self.accelerator, self.report = accelerator, report or Report()
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
        self.saver = self._make_saver()
        self.step, self.skipped = 0, Counter[str]()
        self._resumed_random: dict[str, Tensor] | None = None
        if resume is not None:
            self._continue_from(resume)
        # Before it is compiled and divided among processes, which then would all have to count.
        counts = accelerator.is_main_process and peak_tflops(train, accelerator.device)
        self.flops = objective.training_flops() if counts else None
        self.wrapped, self.updater = self._prepare()
        self._update = self._make_step()
        self._evaluation = Evaluation(
            objective,
            evaluators,
            accelerator,
            self.average if train.ema_evaluate else None,
            self.layout,
            # Several processes cannot leave an evaluation together; see `Milestones`.
            lambda: self._requests.interruptible() if processes == 1 else nullcontext(),
        )
        self.milestones = Milestones(self.saver, self.evaluate, self._enter, resume)
        self.stopped: str | None = None
        self.tracking: Tracking | None = None
        self._requests = StopRequests()
        self._watch: Watch | None = None

    def _make_saver(self) -> Saver:
        return Saver(
            self.run_dir / "checkpoints",
            self.objective,
            self.optimizer,
            self.stream,
            self.accelerator,
            self.guard,
            self.layout,
            Retention(self.train.keep_last, self.plan.keep_every, self.train.keep_best),
            in_background=self.train.save_in_background,
            average=self.average,
            exports_average=self.train.ema_export,
        )

    def _prepare(self) -> Prepared:
        """Compile the objective and lay it out over the processes."""
        train, objective = self.train, self.objective
        if train.gradient_checkpointing:
            objective.checkpoint_gradients()
        for part in objective.compiled_parts() if train.compile else ():
            part.compile(backend=train.compile)
        prepared = self.layout.prepare(self.accelerator, objective, self.optimizer)
        if self.average is not None:
            self.average.average = self.layout.divide(self.average.average, objective.model)
        return prepared

    def _make_step(self) -> TrainingStep:
        return TrainingStep(
            self.objective,
            self.wrapped,
            self.updater,
            self.accelerator,
            self.guard,
            self.layout,
            self.optim,
            self.plan,
            self.saver.settle,
            parts=self.train.accumulation,
            average=self.average,
        )

    def _continue_from(self, checkpoint: Path) -> None:
        position = self.saver.load(checkpoint)
        self.step, self.skipped = position.step, position.skipped
        self._resumed_random = position.random
        if self.plan.time is not None and position.planned_steps is not None:
            self.plan.steps = position.planned_steps

    def fit(self) -> Figures:
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
            self.report,
            resumed_step=self.step,
            flops=self.flops,
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

    def _run(self, progress: Progress) -> Figures:
        assert self.tracking is not None
        agreement = Agreement(self.accelerator.num_processes)
        batches = iter(self.stream.batches(self.step))
        if self._resumed_random is not None:  # only here: a new loader draws a random number
            restore_random_state(self._resumed_random)
        figures: Figures = {}
        self.wrapped.train()
        if agreement.largest(self.owes_evaluation()):
            figures = self._reach(evaluates=True, saves=False)
        pace = Pace(self.step, progress)
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
            if pace.is_known_after(self.step):
                self._measure(pace.step_time(), agreement, progress)
            if logs:
                self._log(loss, norm, metrics)
            evaluates, saves = (
                self._is_due(self.plan.eval_every),
                self._is_due(self.plan.save_every),
            )
            if evaluates or saves:
                with progress.paused():
                    figures = self._reach(evaluates=evaluates, saves=saves) or figures
        if self.milestones.interrupted:  # in the last evaluation, or in one that was owed
            self.stopped = self._requests.reason
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
        rescue = self.milestones.rescue if self.accelerator.is_main_process else None
        self._watch = Watch(rank, processes, limit, self._requests, rescue)
        self._watch.start()

    def _enter(self, phase: str) -> None:
        if self._watch is not None:
            self._watch.enter(phase, self.step)

    def _measure(self, step_time: float, agreement: Agreement, progress: Progress) -> None:
        """Say how long the run will take, and give a run of a given time its steps."""
        plan = self.plan
        if plan.time is not None and plan.steps == UNKNOWN:
            plan.steps = agreement.largest(max(self.step + 1, int(plan.time / step_time)))
            progress.set_total(plan.steps)
        if self.accelerator.is_main_process and plan.steps - self.step > MEASURED:
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

    def evaluate(self) -> Figures:
        """Run all evaluators on the model in eval mode; training continues as if they had not."""
        figures = self._evaluation(random_state())
        if self.tracking is not None:
            self.tracking.evaluation(self.position, figures)
        return figures

    @property
    def last_checkpoint(self) -> Path | None:
        """On the main process, the newest that has its name or is about to get it."""
        return self.milestones.last_checkpoint

    def total_skipped(self) -> Counter[str]:
        """Skipped samples by reason, over all processes."""
        return total_counts(self.skipped, self.accelerator.num_processes)

    def save(self) -> None:
        """Publish a checkpoint of this step and remove the ones that are no longer kept.

        Raises:
            NonFiniteError: the weights have been updated with values that are not finite.
        """
        self._reach(evaluates=False, saves=True)
        self.saver.finish()

    def _reach(self, *, evaluates: bool, saves: bool) -> Figures:
        return self.milestones.reach(self.position, self.skipped, evaluates=evaluates, saves=saves)
