"""Which run directories are continued, which are left alone, and what a run leaves in its log."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from scripts import train_contrastive
from scripts.launch import Launch
from tests.scripts.test_training_errors import contrastive_arguments, refusal, snapshot


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a contrastive run of two steps."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train_contrastive.main(contrastive_arguments(shards, run_dir))
    return run_dir


@pytest.mark.parametrize("option", ["--contrastive.embed_dim=16", "--contrastive.loss=siglip"])
def test_a_checkpoint_of_another_model_is_refused_in_a_new_folder(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, tmp_path: Path, option: str
) -> None:
    options = (f"--resume={finished}/checkpoints/step_00000002", option)
    arguments = contrastive_arguments(shards, tmp_path / "run", *options)
    assert "holds another architecture" in refusal(capsys, train_contrastive, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("steps", "position"), [(2, "2 of 2"), (1, "2 of 1")])
def test_a_finished_run_says_so_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, steps: int, position: str
) -> None:
    before = snapshot(finished)
    options = ("--resume=auto", f"--train.steps={steps}")
    train_contrastive.main(contrastive_arguments(shards, finished, *options))
    assert f"already at step {position}: nothing left to train" in capsys.readouterr().out
    assert snapshot(finished) == before


def test_more_steps_continue_a_finished_run(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    options = ("--resume=auto", "--train.steps=3")
    train_contrastive.main(contrastive_arguments(shards, run_dir, *options))
    printed = capsys.readouterr().out
    assert "train.steps was 2, is 3" in printed
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["steps"] == 3
    log = (run_dir / "train.log").read_text()
    assert all(line in log for line in printed.splitlines())
    assert log.count("done: ") == 2


def test_resume_auto_starts_what_was_killed_before_its_first_checkpoint(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints")
    arguments = contrastive_arguments(shards, run_dir, "--resume=auto")
    before = snapshot(run_dir)
    line = refusal(capsys, train_contrastive, [*arguments, "--seed=3"])
    assert "seed was 0, is 3" in line
    assert snapshot(run_dir) == before
    train_contrastive.main(arguments)
    assert "no checkpoint yet, starting at step 0" in capsys.readouterr().out
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_resume_auto_leaves_a_foreign_folder_alone(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 900}\n')
    before = snapshot(tmp_path)
    arguments = contrastive_arguments(shards, tmp_path, "--resume=auto")
    assert "holds no run" in refusal(capsys, train_contrastive, arguments)
    assert snapshot(tmp_path) == before


def test_truncated_shards_are_named_at_both_ends_and_skips_are_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    for shard in shards.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    cut = tmp_path / "train-0.tar"
    cut.write_bytes(cut.read_bytes()[:-12000])
    train_contrastive.main(contrastive_arguments(tmp_path, tmp_path / "run"))
    lines = capsys.readouterr().out.splitlines()
    warning = f"warning: '{cut}' ends early; its complete samples are used"
    # The first two lines are about the towers.
    assert [index for index, line in enumerate(lines) if line == warning] == [2, len(lines) - 2]


def test_an_unexpected_error_keeps_its_traceback_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        torch.zeros(2).view(3, 3).numpy()

    monkeypatch.setattr("training.loop.random_state", fails)
    with pytest.raises(RuntimeError, match="invalid for input"):
        train_contrastive.main(contrastive_arguments(shards, tmp_path / "run"))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "stopped by RuntimeError\nTraceback" in log
    assert "invalid for input" in log.splitlines()[-1]


def test_a_sharded_launch_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    line = refusal(capsys, train_contrastive, contrastive_arguments(shards, tmp_path / "run"))
    assert "accelerate was configured for FSDP; only plain data parallelism" in line
    assert list(tmp_path.iterdir()) == []


def test_accumulation_of_accelerate_does_not_divide_the_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Accelerator().gradient_accumulation_steps == 4
    launch = Launch(train_contrastive.ContrastiveRun(run_dir=str(tmp_path / "run")))
    assert launch.accelerator.gradient_accumulation_steps == 1


def test_cores_are_divided_among_the_processes_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = train_contrastive.ContrastiveRun(run_dir=str(tmp_path / "run"))
    config.train.threads = 1
    launch = Launch(config)
    monkeypatch.setattr("scripts.launch.available_cores", lambda: 16)
    monkeypatch.setattr(Accelerator, "num_processes", 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.stream_options(None)["workers"] == 1
    assert launch.stream_options(None)["world"] == 16


def test_layouts_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
) -> None:
    def line(*options: str) -> str:
        arguments = contrastive_arguments(shards, tmp_path / "run", *options)
        return refusal(capsys, train_contrastive, arguments)

    assert "expert_parallel 2 must divide the number of processes, 1" in line(
        "--train.expert_parallel=2"
    )
    assert "train.fsdp and train.expert_parallel both divide" in line(
        "--train.expert_parallel=2", "--train.fsdp=true"
    )
    assert "optimizer.kind muon looks at whole parameters, which train.fsdp divides" in line(
        "--train.fsdp=true", "--optimizer.kind=muon"
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "both divide the experts" in line("--train.expert_parallel=2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert "configured with fsdp_offload_params, which is not supported" in line()
    assert list(tmp_path.iterdir()) == []
