"""Evaluation results as JSON, with what it takes to compare and repeat them."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.config import EvaluationSetConfig
from eval.image_text import ImageTextEvaluator
from eval.open_model import OpenedModel

TASKS = {
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall"),
    "zeroshot_retrieval": ("text_retrieval", "image_retrieval"),
}


def make_records(
    model: str,
    pretrained: str | None,
    opened: OpenedModel,
    evaluator: ImageTextEvaluator,
    figures: dict[str, float | None],
) -> list[dict[str, Any]]:
    """One record for each task that was measured; the first keys are CLIP_benchmark's."""
    skipped = int(figures.get("skipped") or 0)
    records = []
    for task, prefixes in TASKS.items():
        metrics = {name: value for name, value in figures.items() if name.startswith(prefixes)}
        if not metrics:
            continue
        record: dict[str, Any] = {
            "dataset": evaluator.name,
            "model": model,
            "pretrained": pretrained or opened.source,
            "task": task,
            "metrics": metrics,
            "language": "en",
            "n_samples": len(evaluator.dataset) - skipped,
            "n_skipped": skipped,
            "shards": evaluator.config.shards,
            "shards_fingerprint": evaluator.dataset.index.fingerprint(),
            "preprocess": {
                "size": opened.image_size,
                "resize_mode": evaluator.resize_mode,
                "interpolation": evaluator.interpolation,
                "antialias": True,
                "mean": list(opened.mean),
                "std": list(opened.std),
            },
            "tie_rule": "index",
            "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm")},
        }
        if task == "zeroshot_classification":
            record |= {
                "n_classes": len(evaluator.prompts),
                **_prompt_source(evaluator.config),
                "canonicalize": evaluator.config.canonicalize,
            }
        records.append(record)
    return records


def _prompt_source(config: EvaluationSetConfig) -> dict[str, Any]:
    """The templates, or the name of the file of prompts and a hash of its content."""
    if not config.class_prompts:
        return {"templates": config.templates}
    digest = hashlib.sha256(Path(config.class_prompts).read_bytes()).hexdigest()
    return {"class_prompts": config.class_prompts, "class_prompts_sha256": digest}


def write_records(records: list[dict[str, Any]], path: str) -> None:
    """Write a JSON list, completely or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
