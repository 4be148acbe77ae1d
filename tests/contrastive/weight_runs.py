"""Runs and towers that others start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from contrastive.initial_weights import initialise_towers
from contrastive.objective import ContrastiveObjective
from training.checkpoint import CheckpointWriter

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)
ARGUMENTS = {"router": "experts_choice", "num_experts": 2, "img_size": 48}
TINY: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "context_length": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]


def start(
    image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, embed_dim: int = 8
) -> tuple[Any, list[str]]:
    """A model that starts as the settings say, with what the log says about it."""
    torch.manual_seed(0)
    images, texts = ImageTowerConfig(**{"name": TEST} | (image or {})), TextTowerConfig(
        **(text or TINY)
    )  # fmt: skip
    config = model_config(images, texts, ContrastiveConfig(embed_dim=embed_dim))
    model = build_dual_encoder(config)
    lines = initialise_towers(model, images, texts, config)
    frozen_parts(model, images, texts)
    return model, lines


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        start(**settings)
    assert "\n" not in str(error.value)


def publish(objective: Any, run_dir: Path) -> Path:
    """A run directory with one checkpoint, as the training loop leaves it."""
    writer = CheckpointWriter(run_dir / "checkpoints", 7)
    writer.begin()
    writer.add_tensors(objective.weights_file, objective.model.state_dict())
    for name, content in objective.config_files().items():
        writer.add_json(name, content)
    writer.publish(7)
    return run_dir


def classification_run(run_dir: Path, **arguments: Any) -> Path:
    torch.manual_seed(5)
    config = ClassifierConfig(TEST, arguments=arguments)
    return publish(ClassificationObjective(build_classifier(config, 3), config, 3), run_dir)


def contrastive_run(
    run_dir: Path, text: dict[str, Any] | None = None, **arguments: Any
) -> Path:  # fmt: skip
    torch.manual_seed(5)
    config = ContrastiveConfig(embed_dim=8)
    images = ImageTowerConfig(TEST, arguments=arguments)
    described = model_config(images, TextTowerConfig(**(text or TINY)), config)
    model = build_dual_encoder(described)
    return publish(ContrastiveObjective(model, described, config, HALF, HALF), run_dir)


def bert_config(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 12,
    }  # fmt: skip
    return BertConfig(**sizes | changes)


def hugging_face(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"kind": "hugging_face", "folder": str(folder), "context_length": 6} | changes


def assert_equal(module: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
