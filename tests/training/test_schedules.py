"""Learning-rate schedules against the values of google-research/vmoe, and refused settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.config import ScheduleConfig
from training.schedules import check_schedule, learning_rate_factor

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"


def settings(name: str) -> tuple[ScheduleConfig, float, int]:
    with np.load(GOLDEN) as arrays:
        given: dict[str, Any] = json.loads(str(arrays["settings"]))[name]
    kind = {"warmup_cosine_decay": "cosine", "warmup_linear_decay": "linear"}.get(name, "rsqrt")
    config = ScheduleConfig(kind, warmup_steps=given["warmup_steps"])
    if kind == "rsqrt":
        config.timescale, config.cooldown_steps = given["timescale"], given["cooldown_steps"]
        return config, given["peak_value"], given["decay_steps"]
    config.final_fraction = given["end_value"] / given["peak_value"]
    return config, given["peak_value"], given["total_steps"]


@pytest.mark.parametrize(
    "name", ["rsqrt0", "rsqrt1", "rsqrt2", "warmup_cosine_decay", "warmup_linear_decay"]
)
def test_values_are_vmoes(name: str) -> None:
    config, peak, total = settings(name)
    check_schedule(total, config)
    with np.load(GOLDEN) as arrays:
        steps, expected = arrays[f"{name}/steps"], arrays[f"{name}/vmoe"]
    rates = [peak * learning_rate_factor(int(step), total, config) for step in steps]
    # The reference computes in float32, where a cosine near its end keeps few digits.
    np.testing.assert_allclose(rates, expected, rtol=2e-5, atol=1e-7 * peak)


def test_constant_stays_at_the_peak_after_its_warm_up() -> None:
    config = ScheduleConfig("constant", warmup_steps=4)
    factors = [learning_rate_factor(step, 10, config) for step in range(10)]
    assert factors == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScheduleConfig(warmup_steps=11), "need 11 steps, but train.steps is 10"),
        (ScheduleConfig("rsqrt", warmup_steps=6, cooldown_steps=5), "need 11 steps"),
        (ScheduleConfig(warmup_steps=-1), "must not be negative"),
        (ScheduleConfig("rsqrt", cooldown_steps=-1), "must not be negative"),
        (ScheduleConfig("rsqrt", timescale=0), "timescale must be at least 1"),
        (ScheduleConfig(final_fraction=1.5), "final_fraction is a share"),
    ],
)
def test_unusable_settings_are_refused(config: ScheduleConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(10, config)


def test_only_rsqrt_needs_room_for_a_cooldown() -> None:
    check_schedule(10, ScheduleConfig("cosine", warmup_steps=6, cooldown_steps=6))
