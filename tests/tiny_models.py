"""Checkpoints of models that only show that things fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from training.checkpoint import CheckpointWriter

HALF = (0.5, 0.5, 0.5)


def write_dual_encoder(
    folder: Path,
    image: ImageTowerConfig | None = None,
    contrastive: ContrastiveConfig | None = None,
) -> Path:
    """Make `folder` the run directory of an untrained dual encoder."""
    torch.manual_seed(0)
    image = image or ImageTowerConfig("soft_moe_vit_test_patch16_64")
    contrastive = contrastive or ContrastiveConfig(embed_dim=8)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    description = model_config(image, text, contrastive)
    model: Any = build_dual_encoder(description)
    for block in getattr(model.visual.trunk, "blocks", ()):
        if hasattr(block.mlp, "phi"):  # fresh routers hardly tell patches apart
            torch.nn.init.normal_(block.mlp.phi, std=3.0)
    objective = ContrastiveObjective(model, description, contrastive, HALF, HALF)
    writer = CheckpointWriter(folder / "checkpoints", 1)
    writer.begin()
    writer.add_tensors(objective.weights_file, model.state_dict())
    for name, content in objective.config_files().items():
        writer.add_json(name, content)
    writer.publish(1)
    return folder
