"""However parameters lie on processes, a run learns what it learns alone, and continues anywhere.

The expected weights, moments, losses and gradient norms come from one process with whole batches.
Run as a program, this file is one of several processes: `test_layouts.py RANK PORT FOLDER`. All
four are a world; then the first two are one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from encoders.expert_parallel import split_experts
from encoders.experts import ExpertMLP
from training.checkpoint import checkpoint_name
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.fsdp import ShardedLayout
from training.loop import Trainer
from training.objective import Batch, Objective
from training.parallel import ExpertParallelLayout, Layout

ROOT = Path(__file__).parents[2]
WORLDS, BATCH, STEPS, CLASSES = (4, 2), 8, 3, 4
ENCODER = "soft_moe_vit_test_patch16_64"


class Run(NamedTuple):
    """A training run; `start` names the run whose first checkpoint it continues. For bfloat16,
    weights are float32 and the precision is mixed."""

    task: str
    world: int = 1
    layout: str = "whole"
    dtype: torch.dtype = torch.float64
    parts: int = 1
    start: str = ""

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        start = f"-from-{self.start}" if self.start else ""
        return f"{self.task}-{self.world}-{self.layout}-{dtype}-{self.parts}{start}"

    @property
    def weights(self) -> torch.dtype:
        return F32 if self.dtype == BF16 else self.dtype

    @property
    def alone(self) -> Run:
        return Run(self.task, dtype=self.dtype)


F32, BF16 = torch.float32, torch.bfloat16
TASKS = ("contrastive", "classification", "sparse")
ALONE = [
    *(Run(task) for task in TASKS),
    Run("contrastive", dtype=F32),
    Run("contrastive", dtype=BF16),
]
SPREAD = [
    Run("contrastive", 4, "experts-2"),
    Run("contrastive", 4, "experts-4", parts=2),
    Run("contrastive", 4, "experts-2", F32),
    Run("contrastive", 4, "experts-2", start=ALONE[0].name),
    Run("classification", 4, "experts-2", parts=2),
    Run("sparse", 4, "experts-4"),
    Run("contrastive", 2, "experts-2"),
    Run("contrastive", 2, "fsdp", parts=2),
    Run("contrastive", 2, "fsdp", F32),
    Run("contrastive", 2, "fsdp", start=ALONE[0].name),
    Run("classification", 2, "fsdp"),
    Run("contrastive", 2, "experts-2", start=Run("contrastive", 4, "experts-4", parts=2).name),
]
BACK = [
    Run("contrastive", start=SPREAD[0].name),
    Run("contrastive", start=Run("contrastive", 2, "fsdp", parts=2).name),
]


class ToUnit(nn.Module):
    """Pixels to [0, 1] in the model's own precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return images.to(self.dtype) / 255


def make_objective(run: Run) -> Objective:
    torch.manual_seed(0)
    objective: Any
    if run.task == "contrastive":
        image = ImageTowerConfig(ENCODER)
        text = TextTowerConfig(
            width=16, heads=2, layers=2, context_length=8, moe_blocks=1, num_experts=4
        )
        config = ContrastiveConfig(embed_dim=8, loss="siglip", logit_scale=5.0, logit_bias=-1.0)
        description = model_config(image, text, config)
        model = build_dual_encoder(description)
        half = (0.5, 0.5, 0.5)
        objective = ContrastiveObjective(model, description, config, half, half)
    else:
        arguments = {}
        if run.task == "sparse":
            options = {"noise_std": 0.0, "group_size": 2}
            arguments = {"router": "experts_choice", "router_options": options}
        settings = ClassifierConfig(ENCODER, arguments, loss="sigmoid")
        model = build_classifier(settings, CLASSES)
        nn.init.normal_(model.head.weight)  # at zero, it would let no gradient through
        objective = ClassificationObjective(model, settings, CLASSES)
    objective.normalize = ToUnit(run.weights)
    return objective.to(run.weights)


class Pixels:
    """A stream of noise that depends on the step only."""

    def __init__(self, task: str, rank: int, world: int) -> None:
        self.task, self.rank, self.share = task, rank, BATCH // world

    def __len__(self) -> int:
        return 64

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        for step in count(start_step):
            noise = torch.Generator().manual_seed(step)
            batch = {
                "image": torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=noise),
                "text": torch.randint(1, 49000, (BATCH, 8), generator=noise),
                "label": torch.randint(CLASSES, (BATCH,), generator=noise),
            }
            unused = "label" if self.task == "contrastive" else "text"
            own = slice(self.rank * self.share, (self.rank + 1) * self.share)
            yield {name: value[own] for name, value in batch.items() if name != unused}


class Probe:
    """Calls the model as often as no other process does."""

    name = "probe"

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        self.rank, self.dtype = rank, dtype

    def __call__(self, model: Any) -> dict[str, float | None]:
        tower = getattr(model, "encode_image", model)
        images = torch.linspace(0, 1, 3 * 64 * 64, dtype=self.dtype).view(1, 3, 64, 64)
        for _ in range(self.rank):
            tower(images.flip(3))
        return {"sum": float(tower(images).square().sum())}


def make_layout(name: str, accelerator: Accelerator) -> Layout:
    if name == "whole":
        return Layout()
    if name == "fsdp":
        return ShardedLayout(accelerator)
    return ExpertParallelLayout(int(name.removeprefix("experts-")), split_experts, accelerator)


def train(run: Run, folder: Path) -> None:
    AcceleratorState._reset_state()  # the process group stays
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if run.dtype == BF16 else "no")
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == run.world
    run_dir = folder / run.name
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(
        make_objective(run),
        Pixels(run.task, rank, world),
        [Probe(rank, run.weights)],
        TrainConfig(
            steps=STEPS,
            batch_size=BATCH,
            accumulation=run.parts,
            threads=1,
            log_every=1,
            eval_every=2,
            save_every=1,
            keep_last=9,
            ema_decay=0.5 if run.task == "contrastive" else 0.0,
            skip_updates=1 if run.task == "classification" else 0,
            gradient_checkpointing=run.task == "sparse",
            sample_sheets=0,
            save_in_background=run.task != "classification",
        ),
        # A large epsilon, so that rounding errors of vanishing gradients do not become steps.
        OptimizerConfig(lr=0.01, eps=1e-3, clip_norm=0.5),
        ScheduleConfig("constant"),
        accelerator,
        run_dir,
        folder / run.start / "checkpoints" / checkpoint_name(1) if run.start else None,
        layout=make_layout(run.layout, accelerator),
    )
    trainer.fit()


def check_refusals(accelerator: Accelerator) -> None:
    """What four processes cannot divide."""
    with pytest.raises(ValueError, match="expert_parallel 3 must divide the number of proc"):
        ExpertParallelLayout(3, split_experts, accelerator)
    group = ExpertParallelLayout(4, split_experts, accelerator).parts
    with pytest.raises(ValueError, match="no experts to divide"):
        split_experts(nn.Linear(2, 2), group)
    with pytest.raises(ValueError, match="has 6 experts, which cannot be divided among 4"):
        split_experts(nn.Sequential(ExpertMLP(6, 2, 2)), group)
    bank = ExpertMLP(4, 2, 2)
    split_experts(nn.Sequential(bank), group)
    with pytest.raises(ValueError, match="one block of rows for each of 4 experts"):
        bank(torch.zeros(3, 1, 2))


def work(rank: int, port: int, folder: Path) -> None:
    for world in WORLDS:
        if rank >= world:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + world)}
        accelerator = Accelerator(cpu=True)
        if world == 4:
            check_refusals(accelerator)
        for run in SPREAD:
            if run.world == world:
                train(run, folder)
        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def rows(run: Run, folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / run.name / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    clock = {"time", "samples_per_second", "data_wait", "memory_gb", "tflops", "mfu"}
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def tensors(run: Run, folder: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments; after the first step, the moments are the clipped gradients."""
    checkpoint = folder / run.name / "checkpoints" / checkpoint_name(step)
    return {
        f"{'average of ' * (path.stem == 'average')}{name}": value
        for path in sorted(checkpoint.glob("*.safetensors"))
        for name, value in load_file(path).items()
        if path.stem != "guard"
    }


def compare(run: Run, folder: Path) -> None:
    """Equal to 1e-12 (1e-6 for float32) of the largest value of its kind, and to ten times as much
    when weights differ that differently rounded gradients have changed."""
    for step in (2, STEPS) if run.start else (1, STEPS):
        tolerance = (1 if step == 1 else 10) * (1e-6 if run.dtype == F32 else 1e-12)
        found, expected = tensors(run, folder, step), tensors(run.alone, folder, step)
        assert found.keys() == expected.keys()
        for kind in ("exp_avg", "exp_avg_sq", "step", ""):
            names = [name for name in expected if name.partition("::")[2] == kind]
            largest = max(float(expected[name].abs().max()) for name in names)
            assert largest > 1e-6
            for name in names:
                torch.testing.assert_close(
                    found[name],
                    expected[name],
                    rtol=tolerance,
                    atol=tolerance * largest,
                    msg=lambda m, n=f"{run.name}, step {step}, {name}": f"{n}: {m}",
                )
    for name in ("metrics", "eval"):
        kept = [row for row in rows(run.alone, folder, name) if row["step"] > bool(run.start)]
        for ours, theirs in zip(rows(run, folder, name), kept, strict=True):
            # Routing statistics are means of each process's own, and losses logged as float32.
            own = {key for key in theirs if "routing" in key or key == "batch_accuracy"}
            assert {k: v for k, v in ours.items() if k not in own} == pytest.approx(
                {k: v for k, v in theirs.items() if k not in own},
                rel=0.02 if run.dtype == BF16 else 1e-5,
            )
    if not run.start:
        norm, expected_norm = (
            rows(one, folder, "metrics")[0]["grad_norm"] for one in (run, run.alone)
        )
        tolerance = {F32: 1e-6, BF16: 0.02}.get(run.dtype, 1e-12)
        assert norm == pytest.approx(expected_norm, tolerance)
        assert norm > 0.5  # it was clipped


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(probe.getsockname()[1], 60000)


@pytest.mark.slow
def test_every_layout_learns_what_one_process_learns(
    tmp_path: Path, fresh_accelerate: None
) -> None:
    for run in ALONE:
        train(run, tmp_path)
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), str(tmp_path)],
            cwd=ROOT,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(WORLDS))
    ]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    for run in BACK:
        train(run, tmp_path)
    for run in (*SPREAD, *BACK):
        compare(run, tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
