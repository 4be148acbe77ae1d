"""Measure zero-shot classification, retrieval and probes of a model.

python -m scripts.evaluate --model MODEL --data FOLDER --tasks zero_shot_classification,few_shot
python -m scripts.evaluate --config configs/demo_evaluate.yaml --model runs/demo/contrastive
python -m scripts.evaluate --config FILE --model ViT-B-32 --pretrained laion2b_s34b_b79k
accelerate launch --num_processes 8 -m scripts.evaluate --config FILE --model MODEL
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.config import EvaluationSetConfig
from scripts.cli import parse_config, run
from scripts.cpu_processes import start_cpu_processes


@dataclass
class EvaluateRun:
    """One model on any number of evaluation sets."""

    model: str = ""
    """A run directory, a checkpoint or export folder, or the name of an open_clip model."""
    pretrained: str | None = None
    """Weights tag or file, for open_clip names."""
    weights: Literal["checkpoint", "average", "training"] = "checkpoint"
    """Those that a checkpoint opens with, their moving average (of runs with train.ema_decay), or
    those in training (where train.ema_export made the checkpoint open with the average)."""
    evaluation: list[EvaluationSetConfig] = field(default_factory=list)
    tasks: str = ""
    """Of sets that name none: zero_shot_classification, retrieval, few_shot, linear_probe, knn,
    with commas in between."""
    data: str = ""
    """One more set: a folder in CLIP_benchmark's layout, an image folder, or a saved dataset."""
    output: str | None = None
    """JSON file for the figures; null prints them only."""
    results: str | None = None
    """Folder for eval.jsonl, results.json, results.md, report.html, clip_benchmark/*.json and the
    outcome of each sample, which scripts.compare_evaluations reads."""
    cache: str | None = None
    """Folder where embeddings are kept, in clip-retrieval's layout."""
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    shots: list[int] = field(default_factory=lambda: [10])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    l2: list[float] = field(default_factory=lambda: [1024.0])
    """Strengths of the few-shot probe; of several, each number of shots takes the one with the best
    mean rank over all sets, by test accuracy."""
    neighbours: int = 20
    threads: int | None = None
    """CPU threads; null takes all cores."""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(EvaluateRun, argv, __doc__ or "")
    run(lambda: start_cpu_processes("scripts.evaluate", sys.argv[1:] if argv is None else argv))
    run(lambda: evaluate(config))


def evaluate(config: EvaluateRun) -> list[dict[str, Any]]:
    """Print a table, write the records to `output` and `results`, and return them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm import tqdm

    from eval.evaluation_sets import plan_set
    from eval.measure import measure_sets
    from eval.records import check_writable, write_records
    from eval.results import check_folder, write_results
    from eval.subject import open_subject
    from eval.tasks import ProbeOptions
    from scripts.export_source import other_weights
    from training.machine import available_cores, plan_cores

    if not config.model:
        raise ValueError("no model given: set --model to a run directory or an open_clip name")
    sets = [*config.evaluation]
    if config.data:
        sets.append(EvaluationSetConfig(data=config.data))
    if not sets:
        raise ValueError(
            "no evaluation sets given: set --data, or list them under `evaluation` in --config"
        )
    state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    cores = available_cores()
    torch.set_num_threads(config.threads or max(1, cores // state.num_processes))
    workers = 0  # on the CPU the model needs the cores
    if state.device.type != "cpu":
        workers = plan_cores(cores, state.num_processes, device_is_cpu=False).workers
    weights = other_weights(config.weights)
    subject = open_subject(config.model, config.pretrained, state.device, config.precision, weights)
    tasks = [task.strip() for task in config.tasks.split(",") if task.strip()]
    # All before the first measurement: what is refused is refused at once.
    planned = [plan_set(item, subject, tasks) for item in sets]
    if config.output is not None:
        check_writable(Path(config.output).parent)
    if config.results is not None:
        names = [item.name for item in planned]
        check_folder(config.results, subject.identity.weights_sha256, names)
    options = ProbeOptions(config.shots, config.seeds, config.l2, config.neighbours)
    bar = tqdm(planned, unit="set", disable=None if state.is_main_process else True)
    outcomes = measure_sets(bar, options, (config.model, config.pretrained), workers, config.cache)
    records = [outcome.record for outcome in outcomes]
    if state.is_main_process:
        _show(outcomes, planned)
        if config.output is not None:
            write_records(records, config.output)
        if config.results is not None:
            write_results(outcomes, config.results)
    if state.num_processes > 1:
        state.destroy_process_group()
    return records


def _show(outcomes: list[Any], planned: list[Any]) -> None:
    """Print the figures, and what they leave out."""
    from data_pipelines.shards import describe_skips
    from eval.results import HEADER, figure_rows
    from eval.tables import text_table

    print(text_table(HEADER, figure_rows([outcome.record for outcome in outcomes])))
    for item in planned:
        skipped = next((o.found.skipped for o in outcomes if o.planned is item), None)
        if skipped:
            print(f"{item.name}: {describe_skips(skipped)}")
        for path in getattr(getattr(item.test, "index", None), "truncated", ()):
            print(f"warning: '{path}' ends early; its complete samples are used")


if __name__ == "__main__":
    main()
