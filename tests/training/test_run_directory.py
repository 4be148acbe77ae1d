"""Run directories are not mixed up, and their logs hold every step once."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.run_directory import (
    MetricsWriter,
    RunDirectoryError,
    check_run_directory,
    write_environment,
)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


SETTINGS: dict[str, Any] = {
    "run_dir": "one", "resume": None, "seed": 0, "evaluation": [{"name": "a"}],
    "optimizer": {"lr": 0.002, "eps": 1e-8, "beta1": 0.9, "beta2": 0.98, "clip_norm": 1.0},
    "data": {"workers": None, "crop_scale": [0.5, 1.0]}, "train": {"steps": 2, "log_every": 1},
}  # fmt: skip


def check(folder: Path, resume: str | None, present: dict[str, Any]) -> dict[str, str]:
    return check_run_directory(folder, resume, present, {"model": {"arguments": {}, "width": 8}})


def changed(**groups: Any) -> dict[str, Any]:
    return SETTINGS | {
        name: SETTINGS[name] | value if isinstance(value, dict) else value
        for name, value in groups.items()
    }


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """The folder of a run that has been started with SETTINGS."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.mark.parametrize("resume", [None, "auto"])
def test_an_empty_or_missing_folder_can_be_used(tmp_path: Path, resume: str | None) -> None:
    assert check(tmp_path, resume, SETTINGS) == {}
    assert check(tmp_path / "missing", resume, SETTINGS) == {}
    (tmp_path / "config.yaml.partial").write_text("see")  # killed before it was a run
    assert check(tmp_path, resume, SETTINGS) == {}


@pytest.mark.parametrize("content", [None, "", "just words", "a: [", "\x00"])
def test_a_folder_that_is_no_run_is_never_used(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "thesis.tex").touch()
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"holds no run.*another --run_dir"):
        check(tmp_path, "auto", SETTINGS)


def test_a_run_that_failed_before_its_first_step_may_be_repeated(used: Path) -> None:
    (used / "train.log").write_text("error: labels are words")
    assert check(used, None, changed(seed=1)) == {}
    (used / "metrics.jsonl").touch()
    with pytest.raises(RunDirectoryError, match="is not empty"):
        check(used, None, SETTINGS)


@pytest.mark.parametrize("parts", [(), ("below", "it")])
def test_a_file_in_the_way_is_named(tmp_path: Path, parts: tuple[str, ...]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"file' is a file: choose another"):
        check(tmp_path.joinpath("file", *parts), None, SETTINGS)


def test_settings_that_change_nothing_learnt_may_change(used: Path) -> None:
    present = changed(
        run_dir="two", resume="auto", evaluation=[], data={"workers": 3, "crop_scale": (0.5, 1.0)}
    )
    assert set(check(used, "auto", present)) == {
        "run_dir", "resume", "evaluation", "data.workers",
    }  # fmt: skip
    longer = changed(train={"steps": 3})
    assert check(used, "auto", longer) == {"train.steps": "train.steps was 2, is 3"}


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (changed(optimizer={"lr": 0.5}), r"settings: optimizer\.lr was 0\.002, is 0\.5: continue"),
        (changed(optimizer={"lr": 1}, seed=1), r"seed was 0, is 1; optimizer\.lr was 0\.002, is 1"),
        (changed(optimizer={"amsgrad": None}), r"optimizer\.amsgrad was not set, is null"),
        ({k: v for k, v in SETTINGS.items() if k != "seed"}, "seed was 0, is not set"),
        (changed(seed=1, optimizer=dict.fromkeys(SETTINGS["optimizer"], 7.0)),
         r"beta1 was 0\.9, is 7\.0, and 2 more: continue"),
    ],
)  # fmt: skip
def test_other_settings_are_refused(used: Path, present: dict[str, Any], message: str) -> None:
    with pytest.raises(RunDirectoryError, match=message):
        check(used, "auto", present)


def test_an_empty_setting_of_a_rule_that_is_newer_than_the_run_changes_nothing(
    tmp_path: Path,
) -> None:
    rules = [{"match": ".*", "lr": 1.0, "weight_decay": None}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"optimizer": {"rules": rules}}))
    newer = {"optimizer": {"rules": [rules[0] | {"group": ""}]}}
    assert check(tmp_path, "auto", newer) == {}
    for change in ({"group": "phi"}, {"weight_decay": 0.0}, {"lr": 0.0}):
        with pytest.raises(RunDirectoryError, match=r"optimizer\.rules was"):
            check(tmp_path, "auto", {"optimizer": {"rules": [rules[0] | change]}})


def test_a_setting_newer_than_the_run_counts_as_its_default(used: Path) -> None:
    newer = SETTINGS | {"model": {"arguments": {}, "width": 8}}
    assert check(used, "auto", newer) == {}
    for model, message in (
        ({"arguments": {}, "width": 9}, r"settings: model\.width was 8, is 9: continue"),
        ({"arguments": {"router": "soft"}, "width": 8}, r"router was not set, is \"soft\""),
    ):
        with pytest.raises(RunDirectoryError, match=message):
            check(used, "auto", SETTINGS | {"model": model})
    (used / "config.yaml").write_text(yaml.safe_dump(newer | {"model": {"arguments": {"a": 1}}}))
    with pytest.raises(RunDirectoryError, match=r"model\.arguments\.a was 1, is not set"):
        check(used, "auto", newer)


def test_a_used_folder_is_only_continued(used: Path, tmp_path: Path) -> None:
    checkpoint = used / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    for resume in (None, str(tmp_path / "another" / "checkpoints" / "step_00000001")):
        with pytest.raises(RunDirectoryError, match=r"not empty.*--resume auto.*--run_dir"):
            check(used, resume, SETTINGS)
    check(used, "auto", SETTINGS)
    check(used, str(checkpoint), SETTINGS)


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
    writer = MetricsWriter(tmp_path, resumed_step=0, tensorboard=True)
    writer.write("metrics", 3, {"loss": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("metrics/loss")] == [(3, 0.5)]


def test_environment_names_versions(tmp_path: Path) -> None:
    write_environment(tmp_path / "env.json")
    content = json.loads((tmp_path / "env.json").read_text())
    assert content["packages"]["torch"] == version("torch")
    assert content["command"]
