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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, machine
from benchmarks.training_loops import LOG_EVERY, LOOPS, Precision, Setting, Turns, batches, build
from training.config import TrainConfig
from training.machine import keep_freed_memory
from training.tracking import peak_tflops

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
    if device_name == "cpu":
        keep_freed_memory()  # as the engine does; else luck of the allocator would be measured
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
    for case in cases.values():  # so that steps follow a save at once, beside its writing
        case.steps(SAVE_EVERY - SAVED - 1)
    for _ in range(run.rounds):
        plain = 0.0
        for mode, case in cases.items():
            walls = [wall_time(case) for _ in range(SAVE_EVERY)]
            if mode == "none":
                plain = statistics.median(walls)
            else:
                found[f"{mode}_stall"].append(walls[SAVED] - plain)
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


def add_mfu(setting: Setting, row: dict[str, Any]) -> None:
    """Share of the GPU's peak, where that is known."""
    peak = 1e12 * peak_tflops(TrainConfig(precision="bf16"), torch.device("cuda"))
    per_step = setting.batch * (build(setting).training_flops() or math.nan)
    for loop in setting.loops:
        seconds = row[f"{loop}_ms"] / 1000
        row[f"{loop}_mfu"] = round(per_step / seconds / peak, 3) if peak else None


def show(row: dict[str, Any]) -> None:
    print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


SAVE_EVERY, SAVED, KINDS = 8, 1, ("stall", "added")  # the second of every eight steps saves
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
