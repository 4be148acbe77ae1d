"""Towers start from what was exported, for any of the libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.initial_weights import initialise_towers
from training.checkpoint import CheckpointError


def start(image: ImageTowerConfig, text: TextTowerConfig) -> tuple[Any, list[str]]:
    config = model_config(image, text, ContrastiveConfig(embed_dim=8))
    model = build_dual_encoder(config)
    return model, initialise_towers(model, image, text, config)


def test_what_was_exported_for_transformers_or_timm_comes_back(exports: Path) -> None:
    expected = load_file(exports / "clip" / "source" / "open_clip_model.safetensors")
    name = "soft_moe_vit_test_patch16_64"
    text = TextTowerConfig(
        width=16, heads=2, layers=2, context_length=12,
        init_from=str(exports / "clip" / "transformers"),
    )  # fmt: skip
    for target in ("transformers", "open_clip", "timm"):
        image = ImageTowerConfig(name, init_from=str(exports / "clip" / target))
        model, _ = start(image, text)
        found = model.state_dict()
        kept = [key for key in expected if not key.startswith(("logit", "visual.head"))]
        assert all(torch.equal(found[key], expected[key]) for key in kept)
        same = torch.equal(found["visual.head.proj.weight"], expected["visual.head.proj.weight"])
        assert same == (target != "timm")
    sigmoid = exports / "sigmoid" / "transformers"
    config = json.loads((sigmoid / "config.json").read_text())["model_cfg"]
    arguments = config["vision_cfg"]["timm_model_kwargs"]
    with pytest.raises(CheckpointError, match=r"image.arguments is \{\}"):
        start(ImageTowerConfig(name, init_from=str(sigmoid)), text)
    start(ImageTowerConfig(name, arguments, init_from=str(sigmoid)), text)
