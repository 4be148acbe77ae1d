"""Pretrain a dense ViT and its Soft MoE twin of equal FLOPs on small sets, and compare them.

python -m benchmarks.small_data --data DIR/cifar10 DIR/fashion-mnist --out runs/small_data

Every folder holds train/*.tar and test/*.tar with .png and .cls members, and classnames.txt. Both
models see the same samples in the same order for the same number of steps, for every seed. The
table gives supervised accuracy, 10-shot, linear probe and nearest neighbours on the test split:
means over seeds, with the 95 % bootstrap interval over test pictures; the last line of each set is
Soft MoE minus dense, paired by test picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.evaluation import EvaluationSet
from encoders.flops import image_flops
from encoders.variants import DENSE_TWINS
from eval.config import EvaluationSetConfig
from eval.embedding import EmbeddedSet, embed
from eval.evaluation_sets import PlannedSet, plan_set
from eval.image_tower import open_image_tower
from eval.label_metrics import label_ranks
from eval.results import markdown_table
from eval.statistics import bootstrap_means, paired_difference
from eval.subject import open_subject
from eval.tasks import ProbeOptions, measure_probe, single_labels
from training.machine import available_cores

TASKS = {"supervised": "", "10-shot": "few_shot", "linear probe": "linear_probe", "k-NN": "knn"}
FIGURES = {"few_shot": "10shot_acc1", "linear_probe": "acc1", "knn": "acc1"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="folders of shards")
    parser.add_argument("--out", default="runs/small_data", help="folder for runs and the table")
    parser.add_argument("--model", default="soft_moe_vit_nano_patch4_32", help="the routed twin")
    parser.add_argument(
        "--slots", type=int, default=3, help="per expert; 3 is within 4 %% of the dense FLOPs"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--probe_pictures", type=int, default=10_000, help="for the probes to learn"
    )
    return parser.parse_args(argv)


def pretrain(options: argparse.Namespace, data: Path, model: str, seed: int, folder: Path) -> float:
    """Train one model with the training command; a finished run is kept. Seconds of its own."""
    marker = folder / "seconds.json"
    if marker.is_file():
        return float(json.loads(marker.read_text()))
    started = time.perf_counter()
    words = {
        "run_dir": folder, "seed": seed, "model.name": model,
        "data.shards": f"{data}/train/*.tar", "data.classnames": data / "classnames.txt",
        "data.workers": 1, "optimizer.lr": options.lr, "train.steps": options.steps,
        "train.batch_size": options.batch_size, "train.threads": available_cores(),
        "schedule.warmup_steps": max(1, options.steps // 20), "train.log_every": 50,
    }  # fmt: skip
    if model == options.model:
        words["model.arguments"] = json.dumps({"slots_per_expert": options.slots})
    command = [sys.executable, "-m", "scripts.pretrain", *(f"--{k}={v}" for k, v in words.items())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"error: training {folder} failed: {result.stderr.strip()[-500:]}")
    seconds = time.perf_counter() - started
    marker.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def supervised_hits(planned: PlannedSet, folder: Path, found: EmbeddedSet) -> np.ndarray:
    """Which test pictures the classifier names right, (N,) bool."""
    head: Any = open_image_tower(str(folder)).model.get_classifier()
    with torch.inference_mode():
        logits = head(found.rows["feature"])
    return (label_ranks(logits, single_labels(found)[:, None]) < 1).numpy()


def measure(options: argparse.Namespace, data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Per-picture outcomes (N,) of every figure of one trained model."""
    subject = open_subject(str(folder))
    config = EvaluationSetConfig(data=str(data), tasks=["few_shot", "linear_probe", "knn"])
    planned = plan_set(config, subject)
    train = planned.train
    if not isinstance(train, EvaluationSet):
        raise SystemExit(f"error: '{data}' holds no train/*.tar")
    found = embed(subject, planned.test, {"feature"})
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    learned = embed(subject, _Part(train, rows[: options.probe_pictures].tolist()), {"feature"})
    outcomes: dict[str, Any] = {"supervised": supervised_hits(planned, folder, found)}
    probe = ProbeOptions(seeds=(seed,))
    for name, task in TASKS.items():
        if task:
            measured = measure_probe(task, learned, found, planned.classnames, probe)
            outcomes[name] = measured.samples[FIGURES[task]]
    return outcomes


class _Part(EvaluationSet):
    """Some samples of a set."""

    def __init__(self, whole: EvaluationSet, numbers: list[int]) -> None:
        self.__dict__ |= whole.__dict__
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self.numbers[index]) | {"number": index}


def compare(options: argparse.Namespace, data: Path) -> list[list[str]]:
    """Rows of the table for one set: dense, Soft MoE and the difference."""
    twins = {"dense": DENSE_TWINS[options.model], "Soft MoE": options.model}
    means, rows = {}, []
    for label, model in twins.items():
        by_seed, seconds = [], []
        for seed in options.seeds:
            folder = Path(options.out) / f"{data.name}-{model}-seed{seed}"
            seconds.append(pretrain(options, data, model, seed, folder))
            by_seed.append(measure(options, data, folder, seed))
            shown = ", ".join(f"{name} {by_seed[-1][name].mean():.3f}" for name in TASKS)
            print(f"{data.name}, {label}, seed {seed}: {shown}", flush=True)
        trained = Path(options.out) / f"{data.name}-{model}-seed{options.seeds[0]}"
        tower = open_image_tower(str(trained), weights=False).model
        flops = sum(image_flops(tower).values()) / 1e6
        means[label] = {n: np.mean([one[n] for one in by_seed], axis=0) for n in TASKS}
        spread = {n: np.std([one[n].mean() for one in by_seed]) for n in TASKS}
        cells = []
        for name, values in means[label].items():
            low, high = bootstrap_means(values[:, None])[0]
            cells.append(
                f"{values.mean():.3f} ({low:.3f} to {high:.3f}; seeds ±{spread[name]:.3f})"
            )
        size = sum(p.numel() for p in tower.parameters()) / 1e6
        rows.append(
            [
                data.name,
                label,
                f"{size:.2f} M",
                f"{flops:.1f} M",
                *cells,
                f"{np.mean(seconds):.0f} s",
            ]
        )
    cells = []
    for name in TASKS:
        value, low, high = paired_difference(means["dense"][name], means["Soft MoE"][name])
        cells.append(f"{value:+.3f} ({low:+.3f} to {high:+.3f})")
    return [*rows, [data.name, "difference", "", "", *cells, ""]]


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(available_cores())
    rows = [row for data in options.data for row in compare(options, Path(data))]
    table = markdown_table(["set", "model", "parameters", "FLOPs", *TASKS, "training"], rows)
    note = (
        f"{options.model} and its dense twin, {options.steps} steps of {options.batch_size}, seeds"
        f" {options.seeds}, probes from {options.probe_pictures} pictures\n\n"
    )
    path = Path(options.out) / "table.md"
    path.write_text(note + table, encoding="utf-8")
    print(note + table + f"written to {path}")


if __name__ == "__main__":
    main()
