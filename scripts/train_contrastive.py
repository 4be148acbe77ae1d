"""Train an image tower with a text tower on image-text shards.

python -m scripts.train_contrastive --config configs/demo_contrastive.yaml
accelerate launch --num_processes 8 -m scripts.train_contrastive --config FILE --a.b value
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from data_pipelines.config import ImageTextConfig
from eval.config import EvaluationSetConfig
from scripts.cli import parse_config, run
from scripts.cpu_processes import start_cpu_processes
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig


@dataclass
class ContrastiveRun:
    """One contrastive training run."""

    run_dir: str = "runs/contrastive"
    """Folder for settings, logs, checkpoints and the exported model."""
    resume: str | None = None
    """`auto` continues the newest checkpoint of run_dir; a path continues that checkpoint."""
    seed: int = 0
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    data: ImageTextConfig = field(default_factory=ImageTextConfig)
    evaluation: list[EvaluationSetConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(ContrastiveRun, argv, __doc__ or "")
    run(
        lambda: start_cpu_processes(
            "scripts.train_contrastive", sys.argv[1:] if argv is None else argv
        )
    )
    run(lambda: train(config))


def train(config: ContrastiveRun) -> None:
    from contrastive.cached_towers import refuse_trained
    from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
    from contrastive.initial_weights import initialise_towers
    from contrastive.objective import ContrastiveObjective
    from data_pipelines.image_text import image_text_stream
    from encoders.hugging_face_text import checkpoint_files
    from encoders.text_towers import build_tokenizer
    from eval.open_model import OpenedModel
    from eval.scheduled import ScheduledEvaluator
    from eval.subject import Caller, Subject, from_opened
    from scripts.launch import Launch
    from training.run_log import say

    launch = Launch(config)
    description = model_config(
        config.image, config.text, config.contrastive, config.train.batch_size
    )
    cached_image, cached_text = config.data.cached_image, config.data.cached_text
    refuse_trained(config.image, config.text, cached_image is not None, cached_text is not None)
    image_size = description["vision_cfg"]["image_size"]
    tokenizer = build_tokenizer(description["text_cfg"])
    stream = image_text_stream(
        config.data,
        image_size=image_size,
        tokenize=tokenizer,
        **launch.stream_options(config.data.workers),
    )
    launch.seed_models()
    model = build_dual_encoder(description)
    notes = []
    if launch.resume is None:  # a checkpoint has the weights, and the fingerprints with its stream
        notes = initialise_towers(model, config.image, config.text, description)
        for side, embeddings in stream.cached.items():
            embeddings.check(cache_fingerprint(config, model, description, side))
    settings = model.visual.trunk.pretrained_cfg
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    frozen = frozen_parts(model, config.image, config.text)
    files = {}
    if config.text.kind == "hugging_face":
        files = checkpoint_files(description["text_cfg"], tokenizer)
    objective = ContrastiveObjective(
        model, description, config.contrastive, mean, std, frozen, files, stream.cached
    )

    def subject_of(model: Any) -> Subject:
        opened = OpenedModel(
            model, tokenizer, image_size, mean, std, "squash", "bicubic", config.run_dir
        )
        call = Caller(next(model.parameters()).device, None)
        return from_opened(config.run_dir, opened, call, config.train.precision)

    evaluators = [ScheduledEvaluator(item, subject_of, model) for item in config.evaluation]
    for side in stream.cached if launch.accelerator.is_main_process else ():
        without = "pictures are not decoded or cropped" if side == "image" else "no caption is read"
        say(f"the frozen {side} tower does not run: cached embeddings are streamed, {without}")
    launch.fit(objective, stream, evaluators, notes, describe=partial(decode_captions, tokenizer))


def decode_captions(tokenizer: Any, batch: dict[str, Any]) -> list[str]:
    """The text of a batch as the text tower gets it; keys where captions are embedded already."""
    if "text" not in batch:
        return list(batch["key"])
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        return inner.batch_decode(batch["text"].tolist(), skip_special_tokens=True)
    special = set(tokenizer.all_special_ids) | {0}
    return [
        tokenizer.decode([token for token in row if token not in special]).strip()
        for row in batch["text"].tolist()
    ]


def cache_fingerprint(
    config: ContrastiveRun, model: Any, description: dict[str, Any], side: Literal["image", "text"]
) -> dict[str, str]:
    """What the embeddings of a frozen tower depend on in this run, besides the shards.

    Args:
        model: the dual encoder with the weights of the run.
        description: its `model_config`.
    """
    from contrastive.cached_towers import tower_fingerprint
    from data_pipelines.cached_embeddings import source_fingerprint

    return {
        **tower_fingerprint(model, description, side),
        **source_fingerprint(config.data, side),
        "precision": config.train.precision,
    }


if __name__ == "__main__":
    main()
