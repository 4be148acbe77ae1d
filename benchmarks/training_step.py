"""Cost of the training loop: against a bare PyTorch loop and against open_clip's trainer.

    python -m benchmarks.training_step [--device cuda] [--threads 1] [--only steps memory ...]

* `steps`: the loop with everything it does (guard, metrics, log lines) against a loop of forward,
  backward, clip and update, written out below, on the same model and batches in memory; and against
  `train_one_epoch` of open_clip on the same dual encoder and pairs, with the optimizer that its
  `main` makes. Pictures reach ours as the uint8 that our stream gives, and open_clip as the
  normalised floats that its stream gives.
* `memory`: resident memory over 2,000 steps.
* `saving`: how long a checkpoint keeps the loop from its next step.
* `mfu`, on a GPU: share of the peak that dense and Soft MoE B/16 reach in bf16, compiled.

Every case runs in a process of its own, and the cases of a setting take turns (A B C A B C ...), so
that a slow minute of the machine hits all of them. Figures are medians over rounds of several
steps; ratios are medians of the ratios within one round. The clock is the process's CPU time on a
CPU, and wall time on a GPU. The result is kept in `benchmarks/results/training_step_<device>.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.routed_layers import RESULTS, machine
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
# Dense bf16 operations per second, from the data sheets; names as torch tells them, in part.
PEAKS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


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


SETTINGS = (
    Setting("Soft MoE, small pictures", "soft_moe_vit_micro_patch8_64", 64, 32),
    Setting("ViT S/16", "dense_vit_small_patch16_224", 224, 4),
    Setting("Soft MoE S/16", "soft_moe_vit_small_patch16_224", 224, 4, experts=16),
    Setting(
        "CLIP, ViT S/16", "dense_vit_small_patch16_224", 224, 4,
        ("bare", "engine", "open_clip"), (384, 6, 12),
    ),
)  # fmt: skip
GPU_SETTINGS = (
    Setting("ViT B/16", "dense_vit_base_patch16_224", 224, 256),
    Setting("Soft MoE B/16", "soft_moe_vit_base_patch16_224", 224, 256, experts=128),
    Setting(
        "CLIP, ViT B/16", "dense_vit_base_patch16_224", 224, 256,
        ("bare", "engine", "open_clip"), (512, 8, 12),
    ),
)  # fmt: skip
QUICK = Setting(
    "quick", "dense_vit_test_patch16_64", 64, 16, ("bare", "engine", "open_clip"), (32, 2, 2)
)


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


def work(
    pipe: Connection,
    setting: Setting,
    loop: str,
    device_name: str,
    threads: int,
    precision: Precision,
    compiled: bool,
    run_dir: Path,
    options: dict[str, Any],
) -> None:
    """One case, until its process is ended."""
    torch.set_num_threads(threads)
    turns = Turns(pipe, batches(setting), torch.device(device_name), run_dir)
    LOOPS[loop](setting, turns, precision, compiled, **options)


class Case:
    """A loop in a process of its own."""

    def __init__(self, setting: Setting, loop: str, run: Run, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.folder = tempfile.TemporaryDirectory()
        arguments = (
            far_end, setting, loop, run.device, run.threads, run.precision, run.compiled,
            Path(self.folder.name), options
        )  # fmt: skip
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        far_end.close()

    def steps(self, count: int) -> tuple[float, int]:
        """Seconds per step, and resident bytes after them."""
        self.pipe.send(count)
        return self.pipe.recv()

    def stop(self) -> None:
        """End the process, whose loop would go on for ever."""
        self.process.kill()
        self.process.join()
        self.folder.cleanup()


@dataclass(frozen=True)
class Run:
    """What holds for all cases."""

    device: str
    threads: int
    rounds: int
    steps: int
    precision: Precision
    compiled: bool


def measure_steps(setting: Setting, run: Run) -> dict[str, Any]:
    """Milliseconds per step of every loop, and how they compare with the engine's."""
    cases = {loop: Case(setting, loop, run) for loop in setting.loops}
    seconds: dict[str, list[float]] = {loop: [] for loop in cases}
    for case in cases.values():
        case.steps(max(3, LOG_EVERY if run.compiled else 3))
    for _ in range(run.rounds):
        for loop, case in cases.items():
            seconds[loop].append(case.steps(run.steps)[0])
    for case in cases.values():
        case.stop()
    row: dict[str, Any] = {"setting": setting.label, "batch": setting.batch}
    for loop, found in seconds.items():
        row[f"{loop}_ms"] = round(1000 * statistics.median(found), 2)
        row[f"{loop}_images_per_second"] = round(setting.batch / statistics.median(found), 1)
    for loop in seconds.keys() - {"engine"}:
        ratios = [a / b for a, b in zip(seconds[loop], seconds["engine"], strict=True)]
        row[f"engine_speed_over_{loop}"] = round(statistics.median(ratios), 3)
    return row


def measure_memory(setting: Setting, run: Run, steps: int) -> dict[str, Any]:
    """Resident memory of the engine over many steps, after a tenth of them as warm-up."""
    case = Case(setting, "engine", run)
    resident = [case.steps(max(1, steps // 20))[1] / 2**20 for _ in range(20)]
    case.stop()
    return {
        "setting": setting.label,
        "steps": steps,
        "start_mib": round(resident[1], 1),
        "end_mib": round(resident[-1], 1),
        "growth_mib": round(resident[-1] - resident[1], 1),
    }


def measure_saving(setting: Setting, run: Run, modes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Wall time that a checkpoint adds to its own step (`stall`) and to all steps until the next
    (`added`), over a run that saves nothing; a writer in the background wants a core of its own."""
    cases = {mode: Case(setting, "engine", run, **options) for mode, options in modes.items()}
    found: dict[str, list[float]] = {f"{mode}_{kind}": [] for mode in modes for kind in KINDS}
    for number in range(1 + run.rounds):
        plain = 0.0
        for mode, case in cases.items():
            walls = [wall_time(case) for _ in range(SAVE_EVERY)]
            if mode == "none":
                plain = statistics.median(walls)
            elif number > 0:  # the first round has no save behind it
                found[f"{mode}_stall"].append(walls[-1] - plain)
                found[f"{mode}_added"].append(sum(walls) - SAVE_EVERY * plain)
    for case in cases.values():
        case.stop()
    row: dict[str, Any] = {"setting": setting.label, "save_every": SAVE_EVERY}
    row |= {f"{name}_ms": round(1000 * statistics.median(v), 1) for name, v in found.items() if v}
    row["stall_share"] = round(row["background_stall_ms"] / row["synchronous_stall_ms"], 3)
    return row


def wall_time(case: Case) -> float:
    """Seconds of one step, by the clock on the wall."""
    start = time.perf_counter()
    case.steps(1)
    return time.perf_counter() - start


def flops(setting: Setting) -> int:
    """Operations of the model in a step, forward and backward, counted without computing them."""
    with torch.device("meta"):
        model: nn.Module = build(setting).model
    inputs = {name: value[:2] for name, value in batches(setting)[0].items() if name != "label"}
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        state = {
            name: torch.empty(value.shape, requires_grad=isinstance(value, nn.Parameter))
            for name, value in [*model.named_parameters(), *model.named_buffers()]
        }
        images = mode.from_tensor(inputs.pop("image")).float()
        words = [mode.from_tensor(value) for value in inputs.values()]
        with sdpa_kernel(SDPBackend.MATH):  # of which every product is counted
            found = functional_call(model, state, (images, *words))
        outputs = found.values() if isinstance(found, dict) else (found,)
        torch.stack([output.sum() for output in outputs]).sum().backward()
    return counter.get_total_flops() * setting.batch // 2


def add_mfu(setting: Setting, row: dict[str, Any]) -> None:
    """Share of the GPU's peak, where that is known."""
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), math.nan)
    per_step = flops(setting)
    for loop in setting.loops:
        row[f"{loop}_mfu"] = round(per_step / (row[f"{loop}_ms"] / 1000) / peak, 3)


def show(row: dict[str, Any]) -> None:
    print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


SAVE_EVERY, KINDS = 6, ("stall", "added")
SAVING: dict[str, dict[str, Any]] = {
    "none": {},
    "synchronous": {"save_every": SAVE_EVERY},
    "background": {"save_every": SAVE_EVERY, "save_in_background": True},
}
PARTS = ("steps", "memory", "saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per case")
    parser.add_argument("--rounds", type=int, default=9, help="measurements per case")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a tiny model, no file")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    run = Run(
        options.device,
        options.threads,
        3 if options.quick else options.rounds,
        LOG_EVERY,
        "bf16" if cuda else "fp32",
        compiled=cuda,
    )
    settings = (QUICK,) if options.quick else GPU_SETTINGS if cuda else SETTINGS
    report: dict[str, Any] = {"machine": machine(options.device, options.threads)}
    report |= {"rounds": run.rounds, "steps_per_round": run.steps, "precision": run.precision}
    if "steps" in options.only:
        report["steps"] = []
        for setting in settings:
            row = measure_steps(setting, run)
            if cuda:
                add_mfu(setting, row)
            report["steps"].append(row)
            show(row)
    if "memory" in options.only:
        report["memory"] = measure_memory(QUICK, run, 200 if options.quick else 2000)
        show(report["memory"])
    if "saving" in options.only:
        report["saving"] = measure_saving(settings[0], run, SAVING)
        show(report["saving"])
    if not options.quick:
        path = RESULTS / f"training_step_{options.device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
