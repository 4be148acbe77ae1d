"""Gradients of two processes equal those of one with the whole batch, for every parameter.

Run as a program, this file is one of the two processes: `test_distributed.py RANK FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective

ROOT = Path(__file__).parents[2]
WORLD, BATCH = 2, 8
TEXT = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
IMAGE = ImageTowerConfig("soft_moe_vit_test_patch16_64")
Case = tuple[Literal["clip", "siglip"], torch.dtype, bool, bool]  # with: frozen text, groups
CASES: dict[str, Case] = {
    "clip": ("clip", torch.float32, False, False),
    "siglip": ("siglip", torch.float32, False, False),
    "clip-float64": ("clip", torch.float64, False, False),
    "siglip-float64": ("siglip", torch.float64, False, False),
    "clip-groups": ("clip", torch.float64, False, True),
    "siglip-frozen-text": ("siglip", torch.float64, True, True),
}


class ToUnit(nn.Module):
    """Pixels to [0, 1] in the model's own precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return images.to(self.dtype) / 255


def make_objective(case: Case) -> ContrastiveObjective:
    loss, dtype, frozen_text, _ = case
    torch.manual_seed(0)
    # A small scale and no bias keep the loss away from zero, where gradients lose their digits.
    config = ContrastiveConfig(embed_dim=8, loss=loss, logit_scale=5.0, logit_bias=-1.0)
    description = model_config(IMAGE, TEXT, config)
    model = build_dual_encoder(description).to(dtype)
    half = (0.5, 0.5, 0.5)
    objective = ContrastiveObjective(
        model, description, config, half, half, (model.text,) if frozen_text else ()
    )
    objective.normalize = ToUnit(dtype)
    return objective


def whole_batch(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {
        "image": torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 49000, (BATCH, 8), generator=generator),
    }
    if case[3]:  # marks that repeat within a process and between processes
        batch["group"] = torch.tensor([1, 2, 1, 3, 4, 2, 5, 6])
    return batch


def gradients(objective: nn.Module, case: Case, own: slice) -> dict[str, Tensor]:
    """Loss and gradients of one part of the batch, by parameter name."""
    loss, _ = objective({name: value[own] for name, value in whole_batch(case).items()})
    loss.backward()
    found = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }
    return found | {"loss": loss.detach()}


def work(rank: int, folder: Path) -> None:
    """Save the gradients of every case as process `rank`."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    share = BATCH // WORLD
    for name, case in CASES.items():
        wrapped = DistributedDataParallel(make_objective(case), broadcast_buffers=False)
        found = gradients(wrapped, case, slice(rank * share, (rank + 1) * share))
        save_file(found, folder / f"{name}.{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes have saved."""
    folder = tmp_path_factory.mktemp("gloo")
    environment: dict[str, Any] = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_whole_batch(results: Path, name: str) -> None:
    case = CASES[name]
    expected = gradients(make_objective(case), case, slice(None))
    parts = [load_file(results / f"{name}.{rank}.safetensors") for rank in range(WORLD)]
    # 1e-6 and 1e-12 of the largest gradient; losses agree as closely.
    tolerance = 1e-6 if case[1] == torch.float32 else 1e-12
    torch.testing.assert_close(
        torch.stack([part.pop("loss") for part in parts]).mean(),
        expected.pop("loss"),
        rtol=tolerance,
        atol=0,
    )
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-2
    assert "model.logit_scale" in expected
    assert ("model.logit_bias" in expected) == (case[0] == "siglip")
    assert ("model.text.text_projection" in expected) != case[2]
    for part in parts:
        assert set(part) == set(expected)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(
                part[parameter], gradient, rtol=tolerance, atol=tolerance * largest
            )


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
