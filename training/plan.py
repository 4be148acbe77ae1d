"""What a run is going to do: settings that fit together, and the words about it."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.objective import Objective
from training.parallel import Layout
from training.run_directory import check_tensorboard
from training.run_log import say
from training.schedules import check_schedule


def check_settings(
    train: TrainConfig,
    optim: OptimizerConfig,
    schedule: ScheduleConfig,
    processes: int,
    sets: Sequence[str],
) -> None:
    """Raise ValueError for settings that cannot work; `sets` are the names of the evaluators."""
    for name in ("steps", "batch_size", "accumulation", "log_every", "keep_last"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be at least 1, got {getattr(train, name)}")
    for name in ("eval_every", "save_every"):
        if getattr(train, name) < 0:
            raise ValueError(f"train.{name} must not be negative; 0 is only at the end")
    if optim.clip_norm < 0:
        raise ValueError("optimizer.clip_norm must not be negative; 0 turns clipping off")
    if train.tensorboard:
        check_tensorboard()
    check_schedule(train.steps, schedule)
    if len(set(sets)) < len(sets):
        raise ValueError(f"evaluation: give each set a name of its own, got {', '.join(sets)}")
    if train.batch_size % (processes * train.accumulation):
        raise ValueError(
            f"train.batch_size {train.batch_size} cannot be divided into {processes} processes"
            f" x {train.accumulation} parts"
        )


def announce(
    train: TrainConfig,
    objective: Objective,
    accelerator: Accelerator,
    layout: Layout,
    samples: int,
    step: int,
    splitting: str,
) -> None:
    """Say what is going to happen, on the main process.

    Args:
        samples: size of the data set.
        step: where the run starts.
        splitting: what the objective says about accumulation, if it is asked for.
    """
    sizes = [(layout.size(p), p.requires_grad) for p in objective.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    say(
        f"{train.steps} steps of {train.batch_size} samples"
        f" = {train.steps * train.batch_size / samples:.1f} epochs of {samples};"
        f" {trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained;"
        f" {accelerator.num_processes} process(es) on {accelerator.device.type},"
        f" {train.precision}{layout.description}" + (f"; resumed at step {step}" if step else "")
    )
    if splitting:
        say(f"accumulation {train.accumulation}: {splitting}")
