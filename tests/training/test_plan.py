"""Durations in any unit become one plan in steps; cooldowns branch off checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.test_loop import BATCH, make_trainer, metrics
from training.checkpoint import checkpoint_name as name_of
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.pace import MEASURED, SETTLING, Pace
from training.plan import UNKNOWN, check_settings, make_plan
from training.progress import Progress


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(7, 7), ("7 steps", 7), ("100 samples", 13), ("2.5 epochs", 20), ("0.1k samples", 13)],
)
def test_durations_are_converted(steps: int | str, expected: int) -> None:
    train = TrainConfig(steps, batch_size=8, eval_every="1 epoch", save_every="16 samples")
    plan = make_plan(train, ScheduleConfig(warmup_steps="8 samples"), samples=64)
    assert (plan.steps, plan.eval_every, plan.save_every) == (expected, 8, 2)
    assert plan.schedule.warmup_steps == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "soon"}, r"train\.steps: 'soon' is no duration"),
        ({"steps": "0 epochs"}, r"train\.steps must be at least 1"),
        ({"eval_every": "2 hours"}, r"train\.eval_every: '2 hours' is a time"),
        ({"save_every": "-1 epochs"}, r"train\.save_every: .* is no duration"),
        ({"steps": "0 h"}, r"train\.steps must be positive"),
    ],
)
def test_durations_that_cannot_be_converted_are_refused(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(TrainConfig(**settings), ScheduleConfig(), samples=64)


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"lr": float("nan")}, {"eps": -1e-8}, {"beta1": 1.0}, {"beta2": -1}]
)
def test_impossible_optimizer_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(settings))} must be"):
        check_settings(TrainConfig(), OptimizerConfig(**settings), 1, [])


def test_a_run_of_a_given_time_finds_its_steps_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, steps="2 s", save_every=25, keep_last=99, log_every=50)
    assert trainer.plan.steps == UNKNOWN
    trainer.fit()
    steps = trainer.plan.steps
    assert MEASURED < steps == trainer.step
    assert f"{steps} steps in all" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["lr"] < 0.01  # the cosine has come to its end
    middle = tmp_path / "checkpoints" / name_of(25)
    if middle.exists():
        again = make_trainer(tmp_path / "again", steps="2 s", resume=middle)
        assert (again.step, again.plan.steps) == (25, steps)


def test_the_pace_is_that_of_steps_after_the_first_ones_without_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    first = 7  # a run that was stopped before its pace was known goes on from here
    progress = Progress(first, 100, False)
    pace = Pace(first, progress)
    for step in range(first + 1, first + MEASURED + 1):
        clock[0] += 60 if step <= first + SETTLING else 2  # compiles, at first
        assert pace.is_known_after(step) == (step == first + MEASURED)
        if step == first + 10:
            with progress.paused():
                clock[0] += 500  # an evaluation
    assert pace.step_time() == 2


@pytest.mark.parametrize("kind", ["rsqrt", "constant"])
def test_a_cooldown_branched_off_a_checkpoint_equals_a_run_that_planned_it(
    tmp_path: Path, kind: str
) -> None:
    long = ScheduleConfig(kind, warmup_steps=2, timescale=4)
    short = ScheduleConfig(kind, warmup_steps=2, timescale=4, cooldown_steps=4)
    make_trainer(tmp_path / "long", schedule=long, save_every=6, steps=12).fit()
    make_trainer(tmp_path / "planned", schedule=short, steps=10).fit()
    kept = shutil.copytree(tmp_path / "long" / "checkpoints" / name_of(6), tmp_path / "kept")
    make_trainer(tmp_path / "branch", schedule=short, steps=10, resume=kept).fit()
    planned = metrics(tmp_path / "planned")
    assert metrics(tmp_path / "branch") == planned[6:]
    assert [row["lr"] / planned[6]["lr"] for row in planned[6:]] == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )
    ends = [tmp_path / name / "checkpoints" / name_of(10) for name in ("planned", "branch")]
    one, two = [(end / "model.safetensors").read_bytes() for end in ends]
    assert one == two


def test_the_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ScheduleConfig("rsqrt", warmup_steps="1 epoch", cooldown_steps=4)
    make_trainer(tmp_path, schedule=schedule, steps="2 epochs", eval_every="0.5 epochs").fit()
    lines = capsys.readouterr().out.splitlines()
    assert f"16 steps of {BATCH} samples = 2.0 epochs of 64" in lines[0]
    for words in (
        "8 samples x 1 process(es) x 1 part(s) a step",
        "rsqrt from 0.05 after 8 steps, cooling down from step 12",
        "evaluation every 4 steps",
        "checkpoint every 1000 steps",
    ):
        assert words in lines[1]
