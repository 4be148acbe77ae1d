"""Pretrain an image encoder on labelled pictures: shards, a Hugging Face dataset or a folder.

python -m scripts.pretrain --config configs/demo_pretrain.yaml
accelerate launch --num_processes 8 -m scripts.pretrain --config FILE --a.b value
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from classification.config import ClassifierConfig
from data_pipelines.config import ClassificationConfig
from eval.config import EvaluationSetConfig
from scripts.cli import parse_config, run
from scripts.cpu_processes import start_cpu_processes
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig


@dataclass
class PretrainRun:
    """One classification run."""

    run_dir: str = "runs/pretrain"
    """Folder for settings, logs and checkpoints."""
    resume: str | None = None
    """`auto` continues the newest checkpoint of run_dir; a path continues that checkpoint."""
    seed: int = 0
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: ClassificationConfig = field(default_factory=ClassificationConfig)
    evaluation: list[EvaluationSetConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(PretrainRun, argv, __doc__ or "")
    run(lambda: start_cpu_processes("scripts.pretrain", sys.argv[1:] if argv is None else argv))
    run(lambda: train(config))


def train(config: PretrainRun) -> None:
    from classification.initial_weights import load_encoder
    from classification.objective import ClassificationObjective, build_classifier
    from contrastive.weight_checks import check_pixels
    from contrastive.weight_sources import image_source
    from data_pipelines.classification import class_names, classification_stream, open_source
    from scripts.launch import Launch

    launch = Launch(config)
    parts = launch.accelerator.num_processes * max(1, config.train.accumulation)
    if (config.model.mixup or config.model.cutmix) and config.train.batch_size // parts % 2:
        raise ValueError(
            f"mixup and cutmix exchange pairs: train.batch_size {config.train.batch_size} over"
            f" {parts} parts must be even"
        )
    source = open_source(config.data)
    classes = class_names(config.data, source)
    launch.seed_models()
    model = build_classifier(config.model, len(classes))
    settings = model.pretrained_cfg
    notes = []
    if config.model.init_from is not None and launch.resume is None:
        weights = image_source(config.model.init_from, "model.init_from")
        check_pixels(weights, settings, "model.init_from")
        trunk = {name: t for name, t in weights.tensors.items() if name.startswith("trunk.")}
        named = {name.removeprefix("trunk."): value for name, value in trunk.items()}
        notes.append(f"image encoder: {load_encoder(model, named, weights.name)}")
    image_size = settings["input_size"][-1]
    stream = classification_stream(
        config.data,
        image_size=image_size,
        num_classes=len(classes),
        source=source,
        **launch.stream_options(config.data.workers),
    )
    objective = ClassificationObjective(model, config.model, len(classes), classes)
    evaluators = [_evaluator(item, config, model, classes) for item in config.evaluation]
    launch.fit(
        objective,
        stream,
        evaluators,
        notes,
        describe=lambda batch: _captions(batch["label"], classes),
    )


def _evaluator(
    item: EvaluationSetConfig, config: PretrainRun, model: Any, classes: list[str]
) -> Any:
    """The tasks that a set names; without them the accuracy of the classifier on shards of its
    classes, and probes of its features on other sets."""
    from eval.classification import ClassificationEvaluator
    from eval.evaluation_sets import complete
    from eval.image_tower import ImageTower
    from eval.prompts import canonicalize_text, read_classnames
    from eval.scheduled import ScheduledEvaluator
    from eval.subject import Caller, Subject, from_tower

    settings = model.pretrained_cfg
    size, mean, std = settings["input_size"][-1], tuple(settings["mean"]), tuple(settings["std"])
    item = complete(item)
    if item.shards and item.label_kind == "single" and not item.tasks:
        own = read_classnames(item.classnames) if item.classnames else classes
        if [*map(canonicalize_text, own)] == [*map(canonicalize_text, classes)]:
            return ClassificationEvaluator(item, size, own, mean, std)
        if not item.train_shards:
            raise ValueError(
                f"evaluation set '{item.name or item.shards}' has other classnames ({len(own)})"
                f" than the classifier ({len(classes)}), or another order: leave classnames out to"
                " measure its accuracy, or set train_shards for probes"
            )

    def subject_of(model: Any) -> Subject:
        tower = ImageTower(model, size, mean, std, config.model.name, {}, True, config.run_dir)
        call = Caller(next(model.parameters()).device, None)
        return from_tower(config.run_dir, tower, call, config.train.precision)

    return ScheduledEvaluator(item, subject_of, model)


def _captions(labels: Any, classes: list[str]) -> list[str]:
    """Names of the classes of each picture, of labels (B,) or of weights (B, classes)."""
    if labels.ndim == 1:
        return [classes[label] for label in labels.tolist()]
    return [
        ", ".join(name for name, on in zip(classes, row, strict=True) if on)
        for row in labels.bool().tolist()
    ]


if __name__ == "__main__":
    main()
