"""Measure zero-shot classification and retrieval of a dual encoder.

python -m scripts.evaluate --config configs/demo_evaluate.yaml --model runs/demo/contrastive
python -m scripts.evaluate --config FILE --model ViT-B-32 --pretrained laion2b_s34b_b79k
accelerate launch --num_processes 8 -m scripts.evaluate --config FILE --model MODEL
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

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
    evaluation: list[EvaluationSetConfig] = field(default_factory=list)
    output: str | None = None
    """JSON file for the figures; null prints them only."""
    threads: int | None = None
    """CPU threads; null takes all cores."""


def main(argv: list[str] | None = None) -> None:
    config = parse_config(EvaluateRun, argv, __doc__ or "")
    run(lambda: start_cpu_processes("scripts.evaluate", sys.argv[1:] if argv is None else argv))
    run(lambda: evaluate(config))


def evaluate(config: EvaluateRun) -> list[dict[str, Any]]:
    """Print a table, write the records to `output`, and return them."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm import tqdm

    from eval.image_text import ImageTextEvaluator
    from eval.open_model import open_model
    from eval.records import make_records, write_records
    from training.machine import available_cores, plan_cores

    if not config.model:
        raise ValueError("no model given: set --model to a run directory or an open_clip name")
    if not config.evaluation:
        raise ValueError("no evaluation sets given: list them under `evaluation` in --config")
    state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    cores = available_cores()
    torch.set_num_threads(config.threads or max(1, cores // state.num_processes))
    workers = 0  # on the CPU the model needs the cores
    if state.device.type != "cpu":
        workers = plan_cores(cores, state.num_processes, device_is_cpu=False).workers
    opened = open_model(config.model, config.pretrained)
    opened.model.to(state.device)
    evaluators = [  # all before the first measurement: what is refused is refused at once
        ImageTextEvaluator(
            item, opened.image_size, opened.tokenizer, opened.mean, opened.std, opened.resize_mode,
            opened.interpolation, workers,
        )
        for item in config.evaluation
    ]  # fmt: skip
    records: list[dict[str, Any]] = []
    bar = tqdm(evaluators, unit="set", disable=None if state.is_main_process else True)
    for evaluator in bar:
        bar.set_postfix_str(evaluator.name)
        figures = evaluator(opened.model)
        records += make_records(config.model, config.pretrained, opened, evaluator, figures)
    if state.is_main_process:
        _show(records, evaluators)
        if config.output is not None:
            write_records(records, config.output)
    if state.num_processes > 1:
        state.destroy_process_group()
    return records


def _show(records: list[dict[str, Any]], evaluators: list[Any]) -> None:
    """Print the figures, and what they leave out."""
    from data_pipelines.shards import describe_skips
    from eval.tables import short, text_table

    rows = [
        [record["dataset"], name, short(value), str(record["n_samples"])]
        for record in records
        for name, value in record["metrics"].items()
    ]
    print(text_table(["set", "metric", "value", "samples"], rows))
    for evaluator in evaluators:
        if evaluator.skipped:
            print(f"{evaluator.name}: {describe_skips(evaluator.skipped)}")
        for path in evaluator.dataset.index.truncated:
            print(f"warning: '{path}' ends early; its complete samples are used")


if __name__ == "__main__":
    main()
