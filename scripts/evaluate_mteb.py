"""Measure a model with mteb: the MIEB benchmarks, or some of their tasks.

python -m scripts.evaluate_mteb --model MODEL --benchmark "MIEB(lite)" --results runs/mieb
python -m scripts.evaluate_mteb --model MODEL --tasks CIFAR10ZeroShot,VOC2007 --results runs/mieb
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from scripts.cli import parse_config, run


@dataclass
class MtebRun:
    """One model on tasks of mteb, which loads their data from the Hugging Face hub."""

    model: str = ""
    """As for scripts.evaluate: a run directory, a checkpoint or export folder, an open_clip name,
    or a transformers model."""
    pretrained: str | None = None
    """Weights tag or file, for open_clip names."""
    weights: Literal["checkpoint", "average", "training"] = "checkpoint"
    """As for scripts.evaluate."""
    benchmark: str = ""
    """A benchmark of mteb such as `MIEB(lite)`, `MIEB(eng)` or `MIEB(Img)`."""
    tasks: str = ""
    """Names of tasks with commas in between, in place of a benchmark."""
    results: str = "runs/mieb"
    """Folder of mteb's result files; what it holds already is not measured again."""
    precision: str = "fp32"
    """fp32, bf16 or fp16."""
    batch_size: int = 64


def main(argv: list[str] | None = None) -> None:
    config = parse_config(MtebRun, argv, __doc__ or "")
    run(lambda: evaluate(config))


def evaluate(config: MtebRun) -> Any:
    """Print a line for each task, write mteb's files, and return its results."""
    if find_spec("mteb") is None:
        raise ValueError("mteb is not installed: pip install 'softmoe-clip[mteb]'")
    if not config.model:
        raise ValueError("no model given: set --model to a run directory or an open_clip name")
    if bool(config.benchmark) == bool(config.tasks):
        raise ValueError("set either --benchmark or --tasks")
    import mteb
    import torch

    from eval.mteb_adapter import MtebEncoder
    from eval.subject import open_subject
    from scripts.export_source import other_weights

    names = [name.strip() for name in config.tasks.split(",") if name.strip()]
    try:
        tasks = mteb.get_tasks(tasks=names) if names else mteb.get_benchmark(config.benchmark).tasks
    except (KeyError, ValueError) as error:
        raise ValueError(f"mteb does not know it: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = open_subject(
        config.model, config.pretrained, device, config.precision, other_weights(config.weights)
    )
    encoder: Any = MtebEncoder(subject)  # mteb's types want its own constructor
    found = mteb.evaluate(
        encoder, tasks, cache=mteb.ResultCache(config.results),
        encode_kwargs={"batch_size": config.batch_size},
    )  # fmt: skip
    for result in found.task_results:
        print(f"{result.task_name}: {result.get_score():.4f}")
    return found


if __name__ == "__main__":
    main()
