"""Evaluation results as JSON, with what it takes to compare and repeat them."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval import retrieval, zero_shot
from eval.config import EvaluationSetConfig
from eval.embedding import EmbeddedSet
from eval.evaluation_sets import PlannedSet, set_templates
from eval.measurement import Measurement
from eval.tasks import NAMES


def make_record(
    model: str,
    pretrained: str | None,
    planned: PlannedSet,
    task: str,
    measured: Measurement,
    found: EmbeddedSet,
) -> dict[str, Any]:
    """The record of one task; the first keys are CLIP_benchmark's."""
    subject, config = planned.subject, planned.config
    record: dict[str, Any] = {
        "dataset": planned.name,
        "model": model,
        "pretrained": pretrained or subject.source,
        "task": NAMES.get(task, task),
        "metrics": measured.metrics,
        "language": "en",
        "ci95": {name: list(bounds) for name, bounds in measured.ci95.items()},
        "n_samples": len(found.keys),
        "n_skipped": found.skipped.total(),
        "split": config.split,
        "shards": config.shards or config.data,
        "shards_fingerprint": planned.test.fingerprint(),
        "content_sha256": found.content(captions=task == "retrieval"),
        "preprocess": subject.preprocess | {"exif_orientation": config.exif_orientation},
        "precision": subject.precision,
        "weights_sha256": subject.identity.weights_sha256,
        "tie_rule": retrieval.TIE_RULE if task == "retrieval" else zero_shot.TIE_RULE,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm")},
        "details": measured.details,
    }
    if task == "zero_shot_classification":
        record |= {
            "n_classes": len(planned.prompts),
            **_prompt_source(config),
            "prompts_sha256": hashlib.sha256(json.dumps(planned.prompts).encode()).hexdigest(),
            "canonicalize": config.canonicalize,
        }
    return record


def _prompt_source(config: EvaluationSetConfig) -> dict[str, Any]:
    """The templates and where they are from, or the file of prompts and a hash of its content."""
    if not config.class_prompts:
        return {"templates": set_templates(config), "templates_from": config.templates}
    digest = hashlib.sha256(Path(config.class_prompts).read_bytes()).hexdigest()
    return {"class_prompts": config.class_prompts, "class_prompts_sha256": digest}


def write_records(records: list[dict[str, Any]], path: str) -> None:
    """Write a JSON list, completely or not at all."""
    write_text(Path(path), json.dumps(records, indent=1) + "\n")


def check_writable(folder: Path) -> None:
    """Raise ValueError unless a folder is there, or can be made, and takes files."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"'{folder}' cannot be written to: choose another folder")


def write_text(target: Path, content: str) -> None:
    """Write a file, completely or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, target)
