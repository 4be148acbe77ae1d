"""Command lines: settings from files and options, and errors of one line with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.config import EvaluationSetConfig
from scripts.cli import parse_config, run, save_config
from scripts.pretrain import PretrainRun
from scripts.train_contrastive import ContrastiveRun
from training.config import ScheduleConfig
from training.finite import NonFiniteError
from training.run_directory import write_environment
from training.schedules import check_schedule

ROOT = Path(__file__).parents[2]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command line prints."""
    with pytest.raises(SystemExit) as stop:
        parse_config(ContrastiveRun, list(arguments), "test")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def settings_file(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_files_and_options_in_that_order(tmp_path: Path) -> None:
    path = settings_file(
        tmp_path,
        "optimizer: {lr: 0.5, beta1: 0.7}\n"
        "evaluation:\n- {shards: a.tar, caption_key: txt}\n- {shards: b.tar, templates: [x]}\n",
    )
    config = parse_config(ContrastiveRun, ["--config", path, "--optimizer.lr", "3e-4"], "test")
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.beta1 == 0.7
    assert config.optimizer.beta2 == ContrastiveRun().optimizer.beta2
    assert config.evaluation == [
        EvaluationSetConfig(shards="a.tar", caption_key="txt"),
        EvaluationSetConfig(shards="b.tar", templates=["x"]),
    ]
    assert parse_config(ContrastiveRun, [], "test") == ContrastiveRun()


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--optimizer.learning_rate", "optimizer.lr"),
        ("--optimizer.weight_decy", "optimizer.weight_decay"),
        ("--optimiser.lr", "optimizer.lr"),
        ("--lr", "optimizer.lr"),
        ("--run_dirs", "run_dir"),
        ("--data.augmentation.crop_scal", "data.augmentation.crop_scale"),
    ],
)
def test_an_unknown_option_names_the_nearest(
    capsys: pytest.CaptureFixture[str], option: str, nearest: str
) -> None:
    line = refusal(capsys, option, "3")
    assert f"unknown setting '{option[2:]}'" in line
    assert f"did you mean '{nearest}'?" in line or not nearest


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("runs_dir: x", "runs_dir", "run_dir"),
        ("optimizer: {lrr: 1}", "optimizer.lrr", "optimizer.lr"),
        ("data: {augmentation: {flipp: 1}}", "data.augmentation.flipp", "augmentation.flip"),
        ("evaluation: [{shard: a.tar}]", "shard", "shards"),
        ("evaluation: [{shards: a.tar}, {shards: b.tar, captions_key: txt}]", "captions_key",
         "caption_key"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_a_file_names_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, unknown: str, nearest: str
) -> None:
    line = refusal(capsys, "--config", settings_file(tmp_path, text))
    assert f"unknown setting '{unknown}'" in line
    assert f"{nearest}'?" in line


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--optimizer.lr", "fast"], "optimizer.lr", "fast"),
        (["--train.steps", "2.5"], "train.steps", "2.5"),
        (["--image.frozen", "maybe"], "image.frozen", "maybe"),
        (["--contrastive.loss", "triplet"], "contrastive.loss", "triplet"),
        (["--data.augmentation.crop_scale", "[1]"], "data.augmentation.crop_scale", "1"),
    ],
)
def test_a_wrong_type_names_the_setting(
    capsys: pytest.CaptureFixture[str], arguments: list[str], key: str, value: str
) -> None:
    line = refusal(capsys, *arguments)
    assert key in line
    assert value in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 5", "train: expected settings, got 5"),
        ("train: null", "train: expected settings, got null"),
        ("optimizer: fast", "optimizer: expected settings, got fast"),
        ("optimizer: [1]", "optimizer: expected settings, got [1]"),
        ("data: {augmentation: 3}", "data.augmentation: expected settings, got 3"),
        ("evaluation: [5]", "evaluation: expected settings, got 5"),
    ],
)
def test_a_value_in_the_place_of_a_group(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    assert refusal(capsys, "--config", settings_file(tmp_path, text)) == f"error: {message}"


def test_broken_and_missing_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    assert "there is no such file" in refusal(capsys, "--config", missing)
    assert "there is no such file" in refusal(capsys, f"--config={missing}")
    refusal(capsys, "--config", settings_file(tmp_path, "optimizer: {lr: ["))
    refusal(capsys, "--config", settings_file(tmp_path, "just words"))
    assert "is a folder" in refusal(capsys, "--config", str(tmp_path))
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "picture.jpg: is no text" in refusal(capsys, "--config", str(tmp_path / "picture.jpg"))
    line = refusal(capsys, "--evaluation", "[name:a]")  # a shell has taken quotes and braces
    assert line.startswith("error: evaluation: cannot be read; quote it")


def test_a_missing_preset_names_the_nearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = refusal(capsys, "--config", "configs/demo_contrstive.yaml")
    assert "did you mean configs/demo_contrastive.yaml?" in line


def changed(config: Any) -> Any:
    config.optimizer.lr = 1e-7
    config.train.threads = 3
    config.data.shards = "data/{0000..0003}.tar::other/*.tar"
    config.data.augmentation.crop_scale = (0.05, 1.0)
    config.evaluation = [EvaluationSetConfig("val", "v.tar", templates=["a {}", "off"])]
    return config


@pytest.mark.parametrize("kind", [ContrastiveRun, PretrainRun])
@pytest.mark.parametrize("change", [changed, lambda config: config])
def test_a_saved_configuration_reads_back_equal(
    tmp_path: Path, kind: Callable[[], Any], change: Callable[[Any], Any]
) -> None:
    config = change(kind())
    save_config(config, tmp_path / "config.yaml", "a description")
    again = parse_config(type(config), ["--config", str(tmp_path / "config.yaml")], "test")
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    assert again == config
    save_config(again, tmp_path / "again.yaml", "a description")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()


def preset_keys(path: Path) -> set[str]:
    return {line.partition(":")[0] for line in path.read_text(encoding="utf-8").splitlines()}


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "train" in preset_keys(path)],
    ids=lambda path: path.stem,
)
def test_training_presets_are_valid(path: Path) -> None:
    kind = PretrainRun if "model" in preset_keys(path) else ContrastiveRun
    assert parse_config(kind, ["--config", str(path)], "test").data.shards


@pytest.mark.parametrize("command", ["pretrain", "train_contrastive"])
def test_help_is_short_of_heavy_imports(run_python: Any, command: str) -> None:
    code = (
        f"import sys\nfrom scripts.{command} import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'timm', 'open_clip', 'transformers', 'accelerate', 'torchvision'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "--optimizer.lr" in result.stdout
    assert "Peak learning rate" in result.stdout


def refused() -> None:
    check_schedule(1, ScheduleConfig(warmup_steps=2))


def missing() -> None:
    write_environment(Path("no folder", "env.json"))  # which opens it through pathlib


def diverges() -> None:
    raise NonFiniteError("two\nlines")


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("main", "code"), [(refused, 2), (missing, 1), (diverges, 1), (interrupted, 130)]
)
def test_errors_that_a_user_can_mend_are_one_line(
    capsys: pytest.CaptureFixture[str], main: Callable[[], None], code: int
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_output_that_nobody_reads_is_no_error() -> None:
    code = "from scripts.cli import run; run(lambda: [print('word ' * 99) for _ in range(9999)])"
    command = f'{sys.executable} -c "{code}" | head -1; echo ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "141"


def wrong_call() -> None:
    torch.optim.SGD([torch.zeros(1)], lr=-1.0)  # a ValueError of torch


def broken_json() -> None:
    json.loads("{")


def mistake() -> None:
    raise RuntimeError("a mistake")


@pytest.mark.parametrize(
    ("main", "kind"),
    [(wrong_call, ValueError), (broken_json, ValueError), (mistake, RuntimeError)],
)
def test_mistakes_keep_their_traceback(main: Callable[[], None], kind: type[Exception]) -> None:
    with pytest.raises(kind) as error:
        run(main)
    assert error.traceback[-1].name != "run"
