"""The demo's picture of slots, for models that have them and models that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from eval.open_model import OpenedModel
from scripts.demo_report import PictureSet, Result, slot_pictures, verdict

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("arguments", "pictures"),
    [
        ({"img_size": 48, "num_experts": 2}, 1),
        ({"router": "uniform"}, 1),
        ({"router": "experts_choice"}, 0),
        ({"moe_blocks": 0}, 0),
    ],
)
def test_models_with_slots_are_looked_into(arguments: dict[str, Any], pictures: int) -> None:
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    image = ImageTowerConfig(TEST, arguments=arguments)
    model = build_dual_encoder(model_config(image, text, ContrastiveConfig(embed_dim=8))).eval()
    size, _ = model.visual.image_size
    opened = OpenedModel(model, lambda texts: torch.zeros(0), size, HALF, HALF, "", "", "")
    images = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8)
    found = slot_pictures(opened, PictureSet(images, torch.zeros(7), [], []), rows=2, columns=2)
    assert len(found) == pictures


def test_the_verdict_says_how_the_model_did_beside_pixels_and_chance() -> None:
    found = verdict(Result("top-1", 0.26849, 0.278, 0.0007), Result("top-5", 0.492, 0.456, 0.0034))
    assert "names 26.8% at its first try and 49.2% within five" in found
    assert "gets 27.8% and 45.6%; guessing, 0.1%" in found
