"""Gradients of several processes equal those of one with the whole batch, for every parameter.

One with the whole batch is held against the plain losses, which have no tiles. Run as a program,
this file is one of the processes: `test_distributed.py RANK WORLD FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.losses import clip_loss, normalize_features, siglip_loss
from contrastive.objective import ContrastiveObjective
from contrastive.targets import Targets

ROOT = Path(__file__).parents[2]
WORLDS, BATCH = (1, 2, 3), 12
TEXT = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
IMAGE = ImageTowerConfig("soft_moe_vit_test_patch16_64")


class Case(NamedTuple):
    """One run. `same_group` puts marks on the batch."""

    loss: Literal["clip", "siglip"]
    dtype: torch.dtype = torch.float64
    frozen_text: bool = False
    same_group: Literal["mask", "positive"] | None = None
    label_smoothing: float = 0.0


CASES = {
    "clip": Case("clip", torch.float32),
    "siglip": Case("siglip", torch.float32),
    "clip-float64": Case("clip"),
    "siglip-float64": Case("siglip"),
    "clip-groups": Case("clip", same_group="mask"),
    "clip-positive-groups": Case("clip", same_group="positive", label_smoothing=0.1),
    "siglip-frozen-text": Case("siglip", frozen_text=True, same_group="mask"),
    "siglip-positive-groups": Case("siglip", same_group="positive", label_smoothing=0.1),
}


class ToUnit(nn.Module):
    """Pixels to [0, 1] in the model's own precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return images.to(self.dtype) / 255


def make_objective(case: Case) -> ContrastiveObjective:
    torch.manual_seed(0)
    # A small scale and no bias keep the loss away from zero, where gradients lose their digits.
    config = ContrastiveConfig(embed_dim=8, loss=case.loss, logit_scale=5.0, logit_bias=-1.0)
    config.same_group = case.same_group or "mask"
    config.label_smoothing, config.tile_rows = case.label_smoothing, 3
    description = model_config(IMAGE, TEXT, config)
    model = build_dual_encoder(description).to(case.dtype)
    half = (0.5, 0.5, 0.5)
    objective = ContrastiveObjective(
        model, description, config, half, half, (model.text,) if case.frozen_text else ()
    )
    objective.normalize = ToUnit(case.dtype)
    return objective


def whole_batch(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {
        "image": torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 49000, (BATCH, 8), generator=generator),
    }
    if case.same_group:  # marks that repeat within a process and between processes
        batch["group"] = torch.tensor([1, 2, 1, 3, 4, 2, 5, 6, 7, 1, 8, 8])
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


def plain_gradients(case: Case) -> dict[str, Tensor]:
    """The whole batch again, by the losses that keep all logits."""
    objective, batch = make_objective(case), whole_batch(case)
    found = objective.model(objective.normalize(batch["image"]), batch["text"])
    image = normalize_features(found["image_features"])
    text = normalize_features(found["text_features"])
    targets = Targets(
        batch.get("group"), batch.get("group"), case.same_group or "mask", case.label_smoothing
    )
    if case.loss == "clip":
        loss = clip_loss(image, text, image, text, found["logit_scale"], 0, targets)
    else:
        loss = siglip_loss(image, text, found["logit_scale"], found["logit_bias"], 0, targets)
    loss.backward()
    named = objective.named_parameters()
    gradients = {name: value.grad for name, value in named if value.grad is not None}
    return gradients | {"loss": loss.detach()}


def work(rank: int, world: int, folder: Path) -> None:
    """Save the gradients of every case as process `rank`."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    share = BATCH // world
    (folder / str(rank)).mkdir()
    for name, case in CASES.items():
        wrapped = DistributedDataParallel(make_objective(case), broadcast_buffers=False)
        found = gradients(wrapped, case, slice(rank * share, (rank + 1) * share))
        save_file(found, folder / str(rank) / f"{name}.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What each process has saved, as the files of its cases begin."""
    world, folder = request.param, tmp_path_factory.mktemp("gloo")
    environment: dict[str, Any] = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [folder / str(rank) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_the_whole_batch(results: list[Path], name: str) -> None:
    case = CASES[name]
    expected = plain_gradients(case)
    parts = [load_file(folder / f"{name}.safetensors") for folder in results]
    # 1e-6 and 1e-12 of the largest gradient; losses agree as closely.
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        torch.stack([part.pop("loss") for part in parts]).mean(),
        expected.pop("loss"),
        rtol=tolerance,
        atol=0,
    )
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-2
    assert "model.logit_scale" in expected
    assert ("model.logit_bias" in expected) == (case.loss == "siglip")
    assert ("model.text.text_projection" in expected) != case.frozen_text
    for part in parts:
        assert set(part) == set(expected)
        for parameter, gradient in expected.items():
            torch.testing.assert_close(
                part[parameter], gradient, rtol=tolerance, atol=tolerance * largest
            )


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
