"""Dual encoders from descriptions that open_clip has no words for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from encoders.clip_model import build_clip, opens_in_open_clip, vision_config

TEST = "soft_moe_vit_test_patch16_64"
TEXT = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}


def description(arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    vision = vision_config(TEST, arguments, **options)
    return {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}


def test_the_tower_with_arguments_is_open_clips() -> None:
    stock: Any = build_clip(description({}, drop_path=0.5, patch_dropout=0.25)).eval()
    config = description({"img_size": 64}, drop_path=0.5, patch_dropout=0.25)
    ours: Any = build_clip(config).eval()
    assert not opens_in_open_clip(config)
    assert opens_in_open_clip(description({}))
    ours.load_state_dict(stock.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.encode_image(images), stock.encode_image(images))
    found, expected = (
        model.visual.forward_intermediates(images)["image_intermediates"] for model in (ours, stock)
    )
    assert all(map(torch.equal, found, expected))
    noisy = []
    for model in (ours, stock):  # stochastic depth and dropped patches
        torch.manual_seed(0)
        noisy.append(model.train().encode_image(images))
    assert torch.equal(*noisy)
    ours.lock_image_tower()
    trained = {name for name, p in ours.visual.named_parameters() if p.requires_grad}
    assert trained == {"head.proj.weight"}


def test_arguments_shape_the_model() -> None:
    model: Any = build_clip(
        description({"img_size": 32, "representation_size": 24, "router": "tokens_choice"})
    )
    model.eval()
    assert model.visual.image_size == (32, 32)
    assert model.visual.trunk.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.visual.trunk.router == "tokens_choice"
    assert model.visual.head.proj.in_features == 24
    assert model.encode_image(torch.rand(2, 3, 32, 32)).shape == (2, 8)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"global_pool": "token"}, "image.arguments must not set global_pool: other settings do"),
        ({"in_chans": 1}, "image.arguments must not set in_chans"),
        ({"embed_dim": 31}, f"image.arguments do not suit {TEST}"),
        ({"num_experts": "many"}, "cannot be built with|do not suit"),
        ({"img_size": 0}, "img_size must be a number of pixels, got 0"),
    ],
)
def test_arguments_that_do_not_suit_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_clip(description(arguments, setting="image.arguments"))
