"""Gradients of several processes equal those of one with the whole batch, for every parameter.

Expected gradients come from one process and the plain losses, which have no tiles, no parts and no
exchange. Run as a program, this file is one of three processes: `test_distributed.py RANK FOLDER`.
All three are a world; then two of them are one; then the first is alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.gather import CountCheck
from contrastive.losses import clip_loss, normalize_features, siglip_loss
from contrastive.objective import ContrastiveObjective
from contrastive.ring import ring_siglip_loss
from contrastive.targets import Targets, Teacher
from training.objective import split_batch

ROOT = Path(__file__).parents[2]
WORLDS, BATCH = (3, 2, 1), 12
PARTS = (1, 2, 4)
TEXT = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
IMAGE = ImageTowerConfig("soft_moe_vit_test_patch16_64")
Exchange = Literal["gather", "ring"]


class Case(NamedTuple):
    """A model, a batch and a loss. `marked` puts group marks and weights on the batch."""

    loss: Literal["clip", "siglip"]
    frozen: Literal["", "visual", "text"] = ""
    dtype: torch.dtype = torch.float64
    same_group: Literal["mask", "positive"] = "mask"
    label_smoothing: float = 0.0
    marked: bool = False
    pairs: int = BATCH

    @property
    def name(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        return ("gather",) if self.loss == "clip" else ("gather", "ring")


GRID = [
    Case(loss, frozen, dtype)
    for loss, frozen, dtype in product(
        ("clip", "siglip"), ("text", "", "visual"), (torch.float32, torch.float64)
    )
]
OPTIONS = [
    Case(loss, "text", torch.float64, same_group, smoothing, True)
    for loss in ("clip", "siglip")
    for same_group, smoothing in (("mask", 0.0), ("positive", 0.1))
]


def cases(world: int) -> list[Case]:
    """All of one world. The last have one pair per process; a single pair has no clip loss."""
    single = [Case(loss, pairs=world) for loss in ("clip", "siglip") if world > 1]
    return [*GRID, *OPTIONS, *single]


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
    config.same_group, config.label_smoothing = case.same_group, case.label_smoothing
    config.tile_rows = 3
    description = model_config(IMAGE, TEXT, config)
    model = build_dual_encoder(description).to(case.dtype)
    half = (0.5, 0.5, 0.5)
    frozen = (model.get_submodule(case.frozen),) if case.frozen else ()
    objective = ContrastiveObjective(model, description, config, half, half, frozen)
    objective.normalize = ToUnit(case.dtype)
    return objective


def whole_batch(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {
        "image": torch.randint(256, (BATCH, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 49000, (BATCH, 8), generator=generator),
    }
    if case.marked:  # marks that repeat within a process and between processes
        batch["group"] = torch.tensor([1, 2, 1, 3, 4, 2, 5, 6, 7, 1, 8, 8])
        batch["weight"] = torch.linspace(0, 2, BATCH, dtype=case.dtype)
    return {name: value[: case.pairs] for name, value in batch.items()}


def plain_gradients(case: Case) -> dict[str, Tensor]:
    """Of the whole batch, with the loss, by parameter name."""
    objective, batch = make_objective(case), whole_batch(case)
    found = objective.model(objective.normalize(batch["image"]), batch["text"])
    image = normalize_features(found["image_features"])
    text = normalize_features(found["text_features"])
    groups = batch.get("group")
    targets = Targets(groups, groups, case.same_group, case.label_smoothing, batch.get("weight"))
    if case.loss == "clip":
        loss = clip_loss(image, text, image, text, found["logit_scale"], 0, targets)
    else:
        loss = siglip_loss(image, text, found["logit_scale"], found["logit_bias"], 0, targets)
    loss.backward()
    return collect(objective) | {"loss": loss.detach()}


def collect(objective: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; takes them away."""
    found = {
        name.removeprefix("module."): parameter.grad
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }
    objective.zero_grad()
    return found


def accumulate(
    wrapped: DistributedDataParallel, batch: dict[str, Tensor], parts: int
) -> dict[str, Tensor]:
    """Gradients and loss of a batch in parts, as the training loop computes them."""
    objective: Any = wrapped.module
    losses = objective.part_losses(wrapped, split_batch(batch, parts))
    values = []
    for number in range(1, parts + 1):
        with nullcontext() if number == parts else wrapped.no_sync():
            loss, _ = next(losses)
            (loss / parts).backward()
        values.append(loss.detach())
    return collect(wrapped) | {"loss": torch.stack(values).mean()}


def runs(world: int) -> Iterator[tuple[Case, Exchange, int, str]]:
    """All runs of a case, and the file each is kept in."""
    for case in cases(world):
        for exchange, parts in product(case.exchanges, PARTS):
            if case.pairs % (world * parts) == 0:
                yield case, exchange, parts, f"{case.name}-{exchange}-{parts}.safetensors"


def save_gradients(rank: int, world: int, folder: Path) -> None:
    """Save the gradients of every run, and how many numbers were averaged over processes."""
    latest, wrapped, sizes = None, None, []
    for case, exchange, parts, name in runs(world):
        if case is not latest or wrapped is None:
            latest = case
            wrapped = DistributedDataParallel(make_objective(case), broadcast_buffers=False)
            # Not a def: the wrapper checks annotations, and rejects those that are strings.
            wrapped.register_comm_hook(
                sizes,
                lambda state, bucket: (
                    state.append(bucket.buffer().numel()) or allreduce_hook(None, bucket)
                ),
            )
        objective: Any = wrapped.module
        objective.config.exchange = exchange
        share = case.pairs // world
        batch = whole_batch(case)
        own = {key: value[rank * share : (rank + 1) * share] for key, value in batch.items()}
        sizes.clear()
        found = accumulate(wrapped, own, parts)
        save_file(found | {"averaged": torch.tensor(sum(sizes))}, folder / name)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def check_refusals(rank: int, world: int) -> None:
    """What several processes must not do."""
    case = Case("siglip")
    assert "past its DistributedDataParallel wrapper" in refusal(
        lambda: make_objective(case)(whole_batch(case))
    )
    counts = [4, 3, 4][:world]
    check = CountCheck()
    for _ in range(2):  # refused once, refused again
        assert f"have batches of {counts}" in refusal(lambda: check(torch.zeros(counts[rank], 2)))
    for _ in range(2):
        assert not refusal(lambda: check(torch.zeros(4, 2)))
    # One batch is smaller later: its process reads the numbers, the others only compare.
    late = refusal(lambda: check(torch.zeros(counts[rank], 2)))
    assert (f"have batches of {counts}" if rank == 1 else "no longer has 4 rows") in late

    text = torch.eye(4)[rank : rank + 1].requires_grad_()
    scale, bias = torch.tensor(5.0), torch.tensor(-1.0)
    loss, _ = ring_siglip_loss(torch.eye(4)[:1], text, scale, bias)
    (loss * (rank + 1)).backward()  # gradients were added up as if the factors were equal
    assert text.grad is not None
    assert text.grad.isnan().all()


def check_uneven(rank: int, world: int, exchange: Exchange) -> None:
    """Batches of unequal sizes are refused inside the wrapper too, on every process, and it goes on
    with equal ones."""
    share = 2
    case = Case("siglip", pairs=share * world)
    objective = make_objective(case)
    objective.config.exchange = exchange
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False)

    expected = plain_gradients(case)
    del expected["loss"]

    def step(count: int) -> None:
        own = {name: value[rank * share :][:count] for name, value in whole_batch(case).items()}
        wrapped(own)[0].backward()

    uneven = 1 if rank == 1 else share
    counts = [share, 1, share][:world]
    for _ in range(2):
        assert f"have batches of {counts}" in refusal(lambda: step(uneven))
    step(share)
    compare(collect(wrapped), expected, case)
    late = refusal(lambda: step(uneven))
    assert (f"have batches of {counts}" if rank == 1 else f"no longer has {share} rows") in late
    step(share)
    compare(collect(wrapped), expected, case)


def check_teacher(rank: int, world: int) -> None:
    """A teacher's targets go round the ring: gradients of all processes' rows and of scale and bias
    are those of the plain loss."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        normalize_features(torch.randn(BATCH, width, generator=generator, dtype=torch.float64))
        for width in (8, 8, 5, 5)
    ]
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    weights = torch.linspace(0, 2, BATCH, dtype=torch.float64)

    def losses(part: slice, ring: bool) -> list[Tensor]:
        image, text = (value[part].clone().requires_grad_() for value in rows[:2])
        scale, bias = (torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (5.0, -1.0))
        teacher = Teacher(*(value[part] for value in rows[2:]), *rows[2:], 7.0, -2.0)
        targets = Targets(weights=weights[part], teacher=teacher)
        if ring:
            loss, _ = ring_siglip_loss(image, text, scale, bias, targets, 3)
        else:
            loss = siglip_loss(image, text, scale, bias, 0, targets)
        loss.backward()
        gradients = [one.grad for one in (image, text, scale, bias)]
        return [loss.detach(), *(value for value in gradients if value is not None)]

    loss, image, text, scale, bias = losses(own, True)
    expected = losses(slice(None), False)
    means = torch.stack([loss, scale, bias])
    distributed.all_reduce(means)
    torch.testing.assert_close(means / world, torch.stack([expected[i] for i in (0, 3, 4)]))
    # Of rows, gradients are those of the sum over processes.
    torch.testing.assert_close(image / world, expected[1][own])
    torch.testing.assert_close(text / world, expected[2][own])


def work(rank: int, folder: Path) -> None:
    for world in WORLDS:
        if rank >= world:
            return
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=300),
        )
        own = folder / f"{world}-{rank}"
        own.mkdir()
        save_gradients(rank, world, own)
        if world > 1:
            check_refusals(rank, world)
            check_teacher(rank, world)
            for exchange in Case("siglip").exchanges:
                check_uneven(rank, world, exchange)
        distributed.destroy_process_group()


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    """Equal to 1e-6 or 1e-12 of the largest gradient; losses as closely."""
    tolerance = 1e-6 if case.dtype == torch.float32 else 1e-12
    gradients = {name: value for name, value in expected.items() if name != "loss"}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-2
    assert set(found) == set(expected)
    for name, value in expected.items():
        floor = 0.0 if name == "loss" else tolerance * largest
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_world(world: int, folder: Path, expected: dict[Case, dict[str, Tensor]]) -> None:
    """Every run of every process of a world."""
    for case, _, _, name in runs(world):
        ranks = [load_file(folder / f"{world}-{rank}" / name) for rank in range(world)]
        loss = torch.stack([found.pop("loss") for found in ranks]).mean()
        for found in ranks:
            averaged = int(found.pop("averaged"))
            try:
                compare(found | {"loss": loss}, expected[case], case)
            except AssertionError as error:
                raise AssertionError(f"{world} processes, {name}: {error}") from error
            # One synchronisation a step, however many parts.
            assert averaged == sum(gradient.numel() for gradient in found.values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_gradient_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    environment: dict[str, Any] = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(WORLDS))
    ]
    expected = {case: plain_gradients(case) for world in WORLDS for case in cases(world)}
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    for case, gradients in expected.items():
        assert "model.logit_scale" in gradients
        assert ("model.logit_bias" in gradients) == (case.loss == "siglip")
        assert ("model.text.text_projection" in gradients) == (case.frozen != "text")
        assert ("model.visual.head.proj.weight" in gradients) == (case.frozen != "visual")
    for world in WORLDS:
        check_world(world, tmp_path, expected)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
