"""What a run is going to do: durations in steps, settings that fit together, the words about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.durations import duration_text, is_time, seconds, to_steps
from training.ema import AVERAGED
from training.finite import FiniteGuard
from training.objective import Objective
from training.parallel import Layout
from training.run_directory import check_tensorboard
from training.run_log import say
from training.schedules import COOLING, check_schedule
from training.spikes import SpikeWindow
from training.tracking import check_trackers

UNKNOWN = 10**9  # steps of a run of a given time before its pace is known


@dataclass
class Plan:
    """The lengths of a run in steps.

    Attributes:
        steps: of the whole run; `UNKNOWN` while a run of a given time is measured.
        time: seconds that the whole run shall take, or None.
    """

    steps: int
    schedule: ScheduleConfig
    eval_every: int
    save_every: int
    keep_every: int
    time: float | None = None

    @property
    def cooldown_starts(self) -> int | None:
        """Step after which the rate cools down, if it does."""
        cooldown = int(self.schedule.cooldown_steps)
        cools = self.schedule.kind in COOLING and cooldown > 0
        return self.steps - cooldown if cools and self.steps != UNKNOWN else None

    def logs(self, step: int, every: int) -> bool:
        """Whether a row is written about `step`, counted from 1."""
        return step in (1, self.steps) or step % every == 0


def make_plan(train: TrainConfig, schedule: ScheduleConfig, samples: int) -> Plan:
    """Convert every duration to steps.

    Args:
        samples: size of the data set, for epochs.

    Raises:
        ValueError: a setting that is no duration, or out of range.
    """
    if train.batch_size < 1:
        raise ValueError(f"train.batch_size must be at least 1, got {train.batch_size}")

    def steps_of(value: int | str, setting: str) -> int:
        return to_steps(value, setting, batch_size=train.batch_size, samples=samples)

    timed = is_time(train.steps, "train.steps")
    plan = Plan(
        UNKNOWN if timed else steps_of(train.steps, "train.steps"),
        ScheduleConfig(
            schedule.kind,
            steps_of(schedule.warmup_steps, "schedule.warmup_steps"),
            schedule.timescale,
            steps_of(schedule.cooldown_steps, "schedule.cooldown_steps"),
            schedule.final_fraction,
        ),
        steps_of(train.eval_every, "train.eval_every"),
        steps_of(train.save_every, "train.save_every"),
        steps_of(train.keep_every, "train.keep_every"),
        seconds(str(train.steps), "train.steps") if timed else None,
    )
    if plan.steps < 1:
        raise ValueError(f"train.steps must be at least 1, got {plan.steps}")
    for name in ("eval_every", "save_every", "keep_every"):
        if getattr(plan, name) < 0:
            raise ValueError(f"train.{name} must not be negative; 0 is only at the end")
    check_schedule(plan.steps, plan.schedule)
    return plan


def check_settings(
    train: TrainConfig, optim: OptimizerConfig, processes: int, sets: Sequence[str]
) -> None:
    """Raise ValueError for settings that cannot work; `sets` are the names of the evaluators."""
    for name in ("batch_size", "accumulation", "log_every", "keep_last"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
    for name in ("lr", "weight_decay", "eps"):
        if not 0 <= getattr(optim, name) < float("inf"):
            raise ValueError(
                f"optimizer.{name} must be a number that is not negative, got"
                f" {getattr(optim, name)}"
            )
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(
                f"optimizer.{name} must be at least 0 and below 1, got {getattr(optim, name)}"
            )
    if optim.clip_norm < 0:
        raise ValueError("optimizer.clip_norm must not be negative; 0 turns clipping off")
    if train.compile and train.accumulation > 1:
        raise ValueError("train.compile works with train.accumulation 1 only")
    if min(train.skip_updates, train.spike_sigmas) < 0:
        raise ValueError("train.skip_updates and train.spike_sigmas must not be negative")
    if train.tensorboard:
        check_tensorboard()
    check_trackers(train.trackers)
    if train.max_time is not None:
        seconds(train.max_time, "train.max_time")
    if len(set(sets)) < len(sets):
        raise ValueError(f"evaluation: give each set a name of its own, got {', '.join(sets)}")
    averaged = [name for name in sets if f"{name}/".startswith(AVERAGED)]
    if averaged:
        raise ValueError(
            f"evaluation: rename the set '{averaged[0]}', for figures of averaged weights begin"
            f" with {AVERAGED}"
        )
    if train.batch_size % (processes * train.accumulation):
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be divided into {processes} processes"
            f" x {train.accumulation} parts"
        )


def make_guard(train: TrainConfig, accelerator: Accelerator, run_dir: Path) -> FiniteGuard:
    """What watches the losses of a run by its settings."""
    device, several = accelerator.device, accelerator.num_processes > 1
    return FiniteGuard(
        device,
        train.precision,
        skip=train.skip_updates,
        spikes=SpikeWindow(train.spike_sigmas, device) if train.spike_sigmas else None,
        reduce=(lambda loss: accelerator.reduce(loss, reduction="mean")) if several else None,
        report=run_dir / f"non_finite_{accelerator.process_index}.json",
        rank=accelerator.process_index,
    )


def announce(
    plan: Plan,
    train: TrainConfig,
    objective: Objective,
    optim: OptimizerConfig,
    accelerator: Accelerator,
    layout: Layout,
    samples: int,
    step: int,
) -> None:
    """Say what is going to happen, on the main process.

    Args:
        samples: size of the data set.
        step: where the run starts.
    """
    sizes = [(layout.size(p), p.requires_grad) for p in objective.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    length = f"{plan.steps} steps" if plan.time is None else f"{train.steps}, in steps"
    epochs = plan.steps * train.batch_size / samples
    covered = f" = {epochs:.1f} epochs of {samples}" if plan.time is None else ""
    say(
        f"{length} of {train.batch_size} samples{covered};"
        f" {trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained;"
        f" {accelerator.num_processes} process(es) on {accelerator.device.type},"
        f" {train.precision}{layout.description}" + (f"; resumed at step {step}" if step else "")
    )
    say("plan: " + "; ".join(_details(plan, train, optim, accelerator, layout, objective)))


def _details(
    plan: Plan,
    train: TrainConfig,
    optim: OptimizerConfig,
    accelerator: Accelerator,
    layout: Layout,
    objective: Objective,
) -> list[str]:
    parts = accelerator.num_processes * train.accumulation
    schedule, cooldown = plan.schedule, plan.cooldown_starts
    size = gigabytes(fixed_bytes(objective, optim.kind, train.ema_decay > 0, layout))
    shape = f"{optim.kind}, {schedule.kind} from {optim.lr:g} after {schedule.warmup_steps} steps"
    return [
        f"{train.batch_size // parts} samples x {accelerator.num_processes} process(es)"
        f" x {train.accumulation} part(s) a step",
        shape + (f", cooling down from step {cooldown}" if cooldown is not None else ""),
        f"evaluation {_every(plan.eval_every)}",
        f"checkpoint {_every(plan.save_every)}",
        f"{size} a process for weights, gradients and optimizer",
    ]


def _every(steps: int) -> str:
    return f"every {steps} steps" if steps else "at the end"


def fixed_bytes(objective: torch.nn.Module, kind: str, averages: bool, layout: Layout) -> int:
    """Bytes of weights, gradients, optimizer state and averaged weights of one process, about;
    activations come on top."""
    moments = {"adamw": 2, "lion": 1, "muon": 1, "adafactor": 0}[kind] + averages
    return sum(
        layout.own_size(p) * p.element_size() * (2 + moments if p.requires_grad else 1)
        for p in objective.parameters()
    )


def gigabytes(amount: float) -> str:
    """Bytes as text."""
    return f"{amount / 1e9:.2f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def say_speed(plan: Plan, step_time: float, step: int, device: torch.device) -> None:
    """Say what the first steps have shown: time that is left, and peak memory on a GPU."""
    words = f"{step_time:.3g} s a step so far: about"
    words += f" {duration_text((plan.steps - step) * step_time)} of training left"
    if plan.time is not None:
        words += f"; {plan.steps} steps in all"
    if device.type == "cuda":
        words += f"; peak memory {gigabytes(torch.cuda.max_memory_allocated(device))}"
    say(words)
