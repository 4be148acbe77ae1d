"""The training loop on a task of two dozen weights, and what a killed process leaves behind.

Run as a program, this file trains that task in forked processes that are killed; see the last test.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from training.checkpoint import CheckpointError, load_tensors, newest_checkpoint
from training.checkpoint import checkpoint_name as name_of
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.finite import NonFiniteError
from training.loop import Trainer
from training.objective import Batch, Evaluator, Metrics, Objective, TrainingStream
from training.step import TrainingStep
from training.tracking import Report

BATCH = 8


class Rows(IterableDataset[Batch]):
    """Batches that depend on the step only; loading draws from no generator of the process."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 4, generator=generator)
            skipped = ["broken image"] if step % 2 else []
            yield {"x": x, "y": x.sum(1), "skipped": skipped}
            step += 1


class RowStream:
    """As the real stream, this makes a DataLoader, which draws a number when it is iterated."""

    seed = 7

    def __len__(self) -> int:
        return 64

    def identity(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        return iter(DataLoader(Rows(start_step), batch_size=None))


class Layers(nn.Sequential):
    """Torch 2.11 compiles no module that consists of its own code alone."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


class Regression(Objective):
    """Least squares; `noise` draws from every generator that a checkpoint has to restore."""

    def __init__(self, noise: bool = True, poison: int | None = None) -> None:
        super().__init__()
        self.model = Layers(nn.Linear(4, 4), nn.Dropout(0.5 * noise), nn.Linear(4, 1))
        self.noise, self.poison, self.seen = noise, poison, 0

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        self.seen += 1
        error = (self.model(batch["x"])[:, 0] - batch["y"]).abs()
        draws = random.random() + random.gauss() + np.random.rand() if self.noise else 0.0
        loss = error.mean() * (1 + 0.1 * draws)
        if self.seen == self.poison:
            loss = loss * torch.nan
        return loss, {"error": error.detach().mean()}


def quiet() -> Regression:
    """The task without randomness."""
    return Regression(noise=False)


class Probe:
    """An evaluator that disturbs every generator."""

    name = "probe"

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        self.modes.append(model.training)
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return {"zero": float(model(torch.zeros(1, 4)).detach()), "none": None}


def make_trainer(
    run_dir: Path,
    objective: Callable[[], Objective] = Regression,
    evaluators: tuple[Evaluator, ...] = (),
    resume: Path | None = None,
    clip_norm: float = 1.0,
    accelerator: Accelerator | None = None,
    schedule: ScheduleConfig | None = None,
    stream: TrainingStream | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of 12 steps from seed 0, with a checkpoint every 4."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    report = Report(settings.pop("settings", {}), settings.pop("describe", None))
    train = TrainConfig(**{"steps": 12, "batch_size": BATCH, "log_every": 1} | settings)
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(
        objective(),
        stream or RowStream(),
        evaluators,
        train,
        OptimizerConfig(lr=0.05, clip_norm=clip_norm),
        schedule or ScheduleConfig("cosine", warmup_steps=2),
        accelerator or Accelerator(cpu=True),
        run_dir,
        resume,
        report=report,
    )


def metrics(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock decides."""
    clock = {"time", "samples_per_second", "data_wait", "memory_gb", "tflops", "mfu"}
    lines = (run_dir / f"{name}.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def outcome(run_dir: Path, step: int = 12) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Every file of the checkpoint of `step`, and the metrics, without what the clock decides."""
    final = run_dir / "checkpoints" / name_of(step)
    files = {p.relative_to(final).as_posix(): p for p in final.rglob("*") if p.is_file()}
    contents = {name: path.read_bytes() for name, path in files.items()}
    manifest = json.loads(contents["manifest.json"])
    assert manifest.pop("clock")["wall_seconds"] > 0
    del manifest["figures"]  # which eval.jsonl holds too
    return contents | {"manifest.json": json.dumps(manifest).encode()}, metrics(run_dir)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    make_trainer(folder, save_every=4, keep_last=9).fit()
    return folder


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_bit_for_bit_like_the_unbroken_one(
    unbroken: Path, tmp_path: Path, step: int
) -> None:
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)  # with metrics of steps to come
    middle = tmp_path / "checkpoints" / name_of(step)
    make_trainer(tmp_path, save_every=4, keep_last=9, resume=middle).fit()
    files, rows = outcome(tmp_path)
    assert (files, rows) == outcome(unbroken)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {"model.safetensors", "optimizer.safetensors", "rng/rank_0.safetensors"} < set(files)
    assert json.loads(files["state.json"])["skipped"] == {"broken image": 6}


def test_the_comparison_notices_a_lost_random_state(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    middle = tmp_path / "checkpoints" / name_of(4)
    shutil.rmtree(middle / "rng")
    make_trainer(tmp_path, save_every=4, keep_last=9, resume=middle).fit()
    assert outcome(tmp_path)[1] != outcome(unbroken)[1]


def test_a_finished_run_has_nothing_left_to_do(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    make_trainer(tmp_path, resume=tmp_path / "checkpoints" / name_of(12)).fit()
    assert outcome(tmp_path) == outcome(unbroken)


def test_another_stream_is_not_continued(unbroken: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(RowStream, "seed", 8)
    with pytest.raises(CheckpointError, match="another stream: seed was 7, is 8"):
        make_trainer(tmp_path, resume=unbroken / "checkpoints" / name_of(4))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_the_whole_batch(tmp_path: Path, parts: int) -> None:
    ends = []
    for accumulation in (1, parts):
        folder = tmp_path / str(accumulation)
        trainer = make_trainer(folder, quiet, accumulation=accumulation)
        trainer.fit()
        ends.append((dict(trainer.objective.named_parameters()), metrics(folder)))
    for name, whole in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], whole, rtol=1e-5, atol=1e-6)
    for whole, split in zip(ends[0][1], ends[1][1], strict=True):
        for name in ("loss", "error", "grad_norm"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4)


def test_an_objective_can_refuse_accumulation(tmp_path: Path) -> None:
    class Coupled(Regression):
        def check_accumulation(self, parts: int, global_batch: int) -> str:
            raise ValueError(f"accumulation must be 1, got {parts} for {global_batch}")

    make_trainer(tmp_path, Coupled)
    with pytest.raises(ValueError, match="accumulation must be 1, got 2 for 8"):
        make_trainer(tmp_path, Coupled, accumulation=2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    tmp_path: Path, accumulation: int
) -> None:
    poisoned = partial(Regression, poison=2 * accumulation + 1)  # in the third step
    trainer = make_trainer(tmp_path, poisoned, save_every=2, accumulation=accumulation)
    with pytest.raises(NonFiniteError, match=r"loss nan.*step 3: the weights were left"):
        trainer.fit()
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == name_of(2)
    saved = load_tensors(newest / "model.safetensors")
    for name, value in trainer.objective.model.state_dict().items():
        assert torch.equal(value, saved[name])
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


class Detailed(Regression):
    """Tells which steps were asked for details."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().forward(batch)
        return loss, metrics | ({"detail": loss.detach()} if self.wants_details else {})


@pytest.mark.parametrize("log_routing", [True, False])
def test_details_are_asked_for_in_logged_steps(
    tmp_path: Path, log_routing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path, Detailed, steps=5, log_every=3, accumulation=2, log_routing=log_routing
    )
    asked = []
    update = TrainingStep.__call__

    def spy(self: TrainingStep, batch: Batch, step: int) -> tuple[Tensor, Tensor, Metrics]:
        asked.append(self.objective.wants_details)
        return update(self, batch, step)

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    trainer.fit()
    assert asked == [log_routing and step in (1, 3, 5) for step in range(1, 6)]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 5]
    assert all(row.get("detail") == (row["loss"] if log_routing else None) for row in rows)


def test_evaluation_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    probe = Probe()
    trainer = make_trainer(tmp_path, evaluators=(probe,), save_every=4, keep_last=9, eval_every=3)
    figures = trainer.fit()
    assert outcome(tmp_path) == outcome(unbroken)
    assert probe.modes == [False] * 4
    assert trainer.objective.training
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert figures == {"probe/zero": rows[-1]["probe/zero"], "probe/none": None}


def test_learning_rates_and_clipping_are_applied(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, quiet, clip_norm=1e-9)
    before = [p.detach().clone() for p in trainer.objective.parameters()]
    trainer.fit()
    rates = [row["lr"] for row in metrics(tmp_path)]
    assert rates[:3] == [0.0, 0.025, 0.05]
    assert rates[-1] == pytest.approx(0.05 * 0.5 * (1 + np.cos(np.pi * 9 / 10)))
    assert all(row["grad_norm"] > 0.1 for row in metrics(tmp_path))  # before it is clipped
    gradient_free = make_trainer(tmp_path / "free", quiet, clip_norm=0.0)
    gradient_free.fit()
    for start, clipped, free in zip(
        before, trainer.objective.parameters(), gradient_free.objective.parameters(), strict=True
    ):
        assert (clipped - start).abs().max() < (free - start).abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"train\.steps must be at least 1, got 0"),
        ({"keep_last": 0}, r"train\.keep_last must be at least 1"),
        ({"save_every": -1}, r"train\.save_every must not be negative"),
        ({"accumulation": 3}, "8 cannot be divided into 1 processes x 3 parts"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"steps": 1}, "need 2 steps, but train.steps is 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **settings)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.gpu
def test_half_precision_resumes_with_its_gradient_scaler(
    fresh_accelerate: None, tmp_path: Path
) -> None:
    half = Accelerator(mixed_precision="fp16")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings: dict[str, Any] = {"precision": "fp16", "save_every": 4, "keep_last": 9}
    make_trainer(whole, accelerator=half, **settings).fit()
    shutil.copytree(whole, resumed)
    middle = resumed / "checkpoints" / name_of(4)
    make_trainer(resumed, resume=middle, accelerator=half, **settings).fit()
    assert json.loads((middle / "state.json").read_text())["gradient_scaler"]["scale"] > 0
    assert outcome(resumed) == outcome(whole)


def test_a_process_killed_at_any_file_operation_resumes_to_the_unbroken_end(
    tmp_path: Path, run_python: Any
) -> None:
    result = run_python(__file__, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["killed"] == report["points"] >= 20
    assert report["different"] == []


def train_or_resume(run_dir: Path) -> None:
    """What a restarted job does: continue from the newest complete checkpoint, if there is one."""
    newest, _ = newest_checkpoint(run_dir / "checkpoints")
    make_trainer(run_dir, steps=6, save_every=2, keep_last=1, resume=newest).fit()


def in_child(run_dir: Path, kill_at: int) -> int:
    """Train in a forked process that kills itself at its n-th file operation; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in changes or (event == "open" and str(run_dir) in str(arguments[0])):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train_or_resume(run_dir)
    if kill_at == 0:
        (run_dir / "operations").write_text(str(count))
    os._exit(0)


def kill_everywhere(folder: Path) -> dict[str, Any]:
    """Kill a run at about 25 of its file operations and compare where the continuations end."""
    train_or_resume(folder / "warm_up")  # what it imports, the forked processes need not
    in_child(folder / "unbroken", 0)
    operations = int((folder / "unbroken" / "operations").read_text())
    expected = outcome(folder / "unbroken", 6)
    points = range(1, operations + 1, max(1, operations // 25))
    killed, different = 0, []
    for point in points:
        run_dir = folder / str(point)
        killed += os.WTERMSIG(in_child(run_dir, point)) == signal.SIGKILL
        in_child(run_dir, -1)
        leftovers = [p.name for p in (run_dir / "checkpoints").iterdir() if p.name[0] == "."]
        if outcome(run_dir, 6) != expected or leftovers:
            different.append(point)
    assert operations > 60
    return {"points": len(points), "killed": killed, "different": different}


if __name__ == "__main__":
    print(json.dumps(kill_everywhere(Path(sys.argv[1]))))
