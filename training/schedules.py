"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from training.config import ScheduleConfig

COOLING = ("rsqrt", "constant")


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at `step` (0-based), in [0, 1]; lengths in steps.

    Warm-up is linear from 0 at step 0 to 1 at `warmup_steps`. The forms after it are those of
    google-research/vmoe `create_learning_rate_schedule`: in the cooldown, rsqrt goes linearly to
    zero from the value that it had at the first cooldown step. So does constant. What they do
    before the cooldown does not depend on `total_steps`, hence a cooldown may branch off any
    checkpoint of a longer run.
    """
    warmup, cooldown = int(config.warmup_steps), int(config.cooldown_steps)
    if step < warmup:
        return step / warmup
    elapsed, length = step - warmup, max(1, total_steps - warmup)
    if config.kind in COOLING:
        cooldown_start = total_steps - cooldown
        age = (min(step, cooldown_start) - warmup) / config.timescale
        base = 1 / math.sqrt(1 + age) if config.kind == "rsqrt" else 1.0
        if step <= cooldown_start:
            return base
        return base * max(0.0, (total_steps - step) / cooldown)
    progress = min(1.0, elapsed / length)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * shape


def check_schedule(total_steps: int, config: ScheduleConfig) -> None:
    """Raise ValueError for settings out of range, or a schedule that does not fit into the run."""
    warmup, cooldown = int(config.warmup_steps), int(config.cooldown_steps)
    if min(warmup, cooldown) < 0:
        raise ValueError("schedule: warmup_steps and cooldown_steps must not be negative")
    if config.timescale < 1:
        raise ValueError(f"schedule.timescale must be at least 1, got {config.timescale}")
    if not 0 <= config.final_fraction <= 1:
        raise ValueError(
            f"schedule.final_fraction is a share of the peak, 0 to 1, got {config.final_fraction}"
        )
    used = warmup + (cooldown if config.kind in COOLING else 0)
    if used > total_steps:
        raise ValueError(
            f"schedule: warmup_steps and cooldown_steps need {used} steps, but train.steps is"
            f" {total_steps}"
        )
