"""The loops that `benchmarks.training_step` times, on batches in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer
from training.objective import Batch, Objective
from training.optim import build_optimizer

Precision = Literal["fp32", "bf16"]
CLASSES, HALF, LOG_EVERY = 1000, (0.5, 0.5, 0.5), 10
OPTIMIZER = OptimizerConfig(lr=1e-4, weight_decay=0.1, beta2=0.98, eps=1e-6)


@dataclass(frozen=True)
class Setting:
    """A task on batches in memory, and who runs it."""

    label: str
    encoder: str
    image_size: int
    batch: int
    loops: tuple[str, ...] = ("bare", "engine")
    text: tuple[int, int, int] | None = None
    """Width, heads and layers of a text tower: the task is contrastive; else classification."""
    experts: int | None = None


def build(setting: Setting) -> Objective:
    """The objective with random weights, alike in every process."""
    torch.manual_seed(0)
    arguments = {} if setting.experts is None else {"num_experts": setting.experts}
    if setting.text is None:
        settings = ClassifierConfig(setting.encoder, arguments)
        return ClassificationObjective(build_classifier(settings, CLASSES), settings, CLASSES)
    width, heads, layers = setting.text
    config = ContrastiveConfig(embed_dim=width)
    text = TextTowerConfig(width=width, heads=heads, layers=layers)
    description = model_config(ImageTowerConfig(setting.encoder, arguments), text, config)
    model = build_dual_encoder(description)
    return ContrastiveObjective(model, description, config, HALF, HALF)


def batches(setting: Setting) -> list[Batch]:
    """Two batches on the CPU, as a stream gives them."""
    noise = torch.Generator().manual_seed(0)
    size, count = setting.image_size, setting.batch
    found: list[Batch] = []
    for _ in range(2):
        shape = (count, 3, size, size)
        batch: Batch = {"image": torch.randint(256, shape, dtype=torch.uint8, generator=noise)}
        if setting.text is None:
            batch["label"] = torch.randint(CLASSES, (count,), generator=noise)
        else:
            batch["text"] = torch.randint(1, 49000, (count, 77), generator=noise)
        found.append(batch)
    return found


class Turns:
    """Hands out batches when the other end of a pipe wants steps, and answers with their time.

    A step lasts from when a loop gets a batch to when it asks for the next.
    """

    def __init__(
        self, pipe: Connection, found: list[Any], device: torch.device, run_dir: Path
    ) -> None:
        self.pipe, self.found, self.device, self.run_dir = pipe, found, device, run_dir

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while (steps := self.pipe.recv()) != "stop":
            start = self._now()
            for _ in range(steps):
                yield self.found[number % len(self.found)]
                number += 1
            memory = psutil.Process().memory_info().rss
            self.pipe.send(((self._now() - start) / steps, memory))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()


class Stream:
    """What the loop wants of a stream, around `Turns`."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __len__(self) -> int:
        return 1 << 20

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        for batch in self.turns:
            yield dict(batch)  # the loop takes what it has read out of a batch


def run_engine(
    setting: Setting, turns: Turns, precision: Precision, compiled: bool, **train: Any
) -> None:
    """The loop as scripts run it."""
    objective = build(setting)
    train["compile"] = "inductor" if compiled else ""
    options: dict[str, Any] = {"log_every": LOG_EVERY, "save_every": 0, "sample_sheets": 0} | train
    Trainer(
        objective,
        Stream(turns),
        (),
        TrainConfig(steps=1_000_000, batch_size=setting.batch, precision=precision, **options),
        OPTIMIZER,
        ScheduleConfig(),
        accelerator(turns.device, precision),
        turns.run_dir,
    ).fit()


def accelerator(device: torch.device, precision: Precision) -> Accelerator:
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)


def run_bare(setting: Setting, turns: Turns, precision: Precision, compiled: bool) -> None:
    """The least that trains: forward, backward, clip, update."""
    objective = build(setting).to(turns.device)
    optimizer = build_optimizer(
        objective, {f"model.{name}" for name in objective.no_weight_decay()}, OPTIMIZER
    )
    if compiled:
        objective.model.compile()
    objective.train()
    parameters = list(objective.parameters())
    half = torch.autocast(turns.device.type, torch.bfloat16, enabled=precision == "bf16")
    for batch in turns:
        moved = {name: value.to(turns.device, non_blocking=True) for name, value in batch.items()}
        with half:
            loss, _ = objective(moved)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def run_open_clip(setting: Setting, turns: Turns, precision: Precision, compiled: bool) -> None:
    """`train_one_epoch` of open_clip, of an epoch that does not end."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    model = build(setting).model.to(turns.device)
    if compiled:
        model = torch.compile(model)
    turns.found = [
        ((batch["image"].float() / 255 - 0.5) / 0.5, batch["text"]) for batch in turns.found
    ]
    args = SimpleNamespace(
        device=str(turns.device), precision="amp_bf16" if precision == "bf16" else "fp32",
        distill=False, accum_freq=1, skip_scheduler=True, horovod=False, wandb=False,
        grad_clip_norm=OPTIMIZER.clip_norm, batch_size=setting.batch, world_size=1, rank=0,
        local_rank=0, log_local=False, log_every_n_steps=LOG_EVERY,
    )  # fmt: skip
    loader = _Endless(turns, setting.batch)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    train_one_epoch(model, data, ClipLoss(), 0, their_optimizer(model), None, None, None, args)


def their_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """As open_clip_train.main makes it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = ("bn", "ln", "bias", "logit_scale")
    undecayed = [p for name, p in named if p.ndim < 2 or any(word in name for word in plain)]
    ids = {id(parameter) for parameter in undecayed}
    return torch.optim.AdamW(
        [
            {"params": undecayed, "weight_decay": 0.0},
            {
                "params": [p for _, p in named if id(p) not in ids],
                "weight_decay": OPTIMIZER.weight_decay,
            },
        ],
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )


class _Endless:
    """What open_clip's trainer wants of a loader."""

    def __init__(self, turns: Turns, batch: int) -> None:
        self.turns, self.num_batches, self.num_samples = turns, 1_000_000, 1_000_000 * batch

    def __iter__(self) -> Iterator[Any]:
        return iter(self.turns)


LOOPS: dict[str, Callable[..., None]] = {
    "bare": run_bare, "engine": run_engine, "open_clip": run_open_clip
}  # fmt: skip
