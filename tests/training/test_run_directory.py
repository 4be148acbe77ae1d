"""Run directories are not mixed up, and their logs hold every step once."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest

from training.run_directory import (
    MetricsWriter,
    RunDirectoryError,
    check_run_directory,
    write_environment,
)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_empty_or_missing_folder_can_be_used(tmp_path: Path) -> None:
    check_run_directory(tmp_path, None)
    check_run_directory(tmp_path / "missing", None)


def test_a_used_folder_is_only_continued(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    for resume in (None, str(tmp_path / "another" / "checkpoints" / "step_00000001")):
        with pytest.raises(RunDirectoryError, match=r"not empty.*--resume auto.*--run_dir"):
            check_run_directory(tmp_path / "run", resume)
    check_run_directory(tmp_path / "run", "auto")
    check_run_directory(tmp_path / "run", str(checkpoint))


def test_lines_of_steps_that_are_repeated_are_dropped(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, resumed_step=0, tensorboard=False)
    for step in (1, 2, 3, 4):
        first.write("metrics", step, {"loss": step / 2})
    first.write("eval", 4, {"acc1": None})
    second = MetricsWriter(tmp_path, resumed_step=2, tensorboard=False)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert steps(tmp_path / "eval.jsonl") == []
    second.write("metrics", 3, {"loss": 9.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_torn_last_line_is_dropped_and_a_whole_one_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsWriter(tmp_path, resumed_step=5, tensorboard=False).write("metrics", 6, {})
    assert steps(path) == [1, 6]
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricsWriter(tmp_path, resumed_step=5, tensorboard=False).write("metrics", 6, {})
    assert steps(path) == [1, 2, 6]


def test_values_that_json_lacks_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0, tensorboard=False)
    writer.write("metrics", 1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, 0.5)


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path, resumed_step=0, tensorboard=True)
    writer.write("metrics", 3, {"loss": 0.5})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/loss")] == [(3, 0.5)]


def test_environment_names_versions(tmp_path: Path) -> None:
    write_environment(tmp_path / "env.json")
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["packages"]["torch"] == version("torch")
    assert content["command"]
