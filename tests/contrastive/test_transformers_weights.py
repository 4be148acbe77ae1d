"""Towers that start from checkpoints of transformers compute what transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.initial_weights import initialise_towers
from training.checkpoint import CheckpointError

SIZES = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
# The same for timm's models.
ARGUMENTS = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
TEXT = TextTowerConfig(width=32, heads=2, layers=2, context_length=8, quick_gelu=True)
HALF = [0.5, 0.5, 0.5]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def save(model: Any, folder: Path, mean: list[float] | None = None) -> Any:
    """Save with weights that nothing draws alike, and the processor that goes with them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    if mean is not None:
        CLIPImageProcessor(image_mean=mean, image_std=mean).save_pretrained(folder)
    return model.eval()


def clip(folder: Path, **vision: Any) -> Any:
    text = {**SIZES, "vocab_size": 49408, "max_position_embeddings": 8, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=VISION | vision, projection_dim=8)
    return save(CLIPModel(config), folder)


def start(image: ImageTowerConfig, text: TextTowerConfig = TEXT) -> tuple[Any, list[str]]:
    config = model_config(image, text, ContrastiveConfig(embed_dim=8))
    model = build_dual_encoder(config)
    return model.eval(), initialise_towers(model, image, text, config)


def tower(folder: Path, name: str, **settings: Any) -> ImageTowerConfig:
    return ImageTowerConfig(name, ARGUMENTS, init_from=str(folder), **settings)


@torch.no_grad()
def test_both_towers_of_clip_come_with_their_projections(tmp_path: Path) -> None:
    theirs = clip(tmp_path)
    image = tower(tmp_path, "vit_base_patch32_clip_quickgelu_224", pooling="token")
    text = TextTowerConfig(**vars(TEXT) | {"init_from": str(tmp_path)})
    ours, told = start(image, text)
    ids = torch.tensor([[49406, 320, 1125, 49407, 0, 0, 0, 0], [49406, 5, 6, 7, 8, 9, 10, 49407]])
    found, expected = ours.encode_text(ids), theirs.get_text_features(input_ids=ids).pooler_output
    assert torch.allclose(found, expected, atol=1e-5)
    expected = theirs.get_image_features(pixel_values=IMAGES).pooler_output
    assert torch.allclose(ours.encode_image(IMAGES), expected, atol=1e-4)
    assert all("match" in line and "random" not in line for line in told)


@torch.no_grad()
def test_image_models_of_transformers_fill_the_trunk(tmp_path: Path) -> None:
    vit = save(ViTForImageClassification(ViTConfig(**VISION)), tmp_path / "vit", HALF)
    image = tower(tmp_path / "vit", "vit_small_patch16_224", pooling="token")
    ours, (line, _) = start(image)
    expected = vit.vit(IMAGES)[0][:, 0]
    assert torch.allclose(ours.visual.trunk(IMAGES), expected, atol=1e-4)
    assert "random: head.proj.weight" in line
    assert "left out: trunk.head.bias, trunk.head.weight" in line

    siglip = save(SiglipVisionModel(SiglipVisionConfig(**VISION)), tmp_path / "siglip", HALF)
    image = tower(tmp_path / "siglip", "vit_base_patch16_siglip_224", pooling="map")
    with pytest.raises(CheckpointError, match=r"set act_layer among image\.arguments"):
        start(image)
    image.arguments = ARGUMENTS | {"act_layer": "gelu_tanh"}
    ours, _ = start(image)
    expected = siglip(pixel_values=IMAGES).pooler_output
    assert torch.allclose(ours.visual.trunk(IMAGES), expected, atol=1e-4)


def test_differences_are_told(tmp_path: Path) -> None:
    clip(tmp_path, hidden_act="gelu")
    name = "vit_base_patch32_clip_quickgelu_224"
    for image, problem in (
        (tower(tmp_path, name, pooling="avg"), "pools its tokens by 'token'"),
        (tower(tmp_path, name, pooling="token"), '"hidden_act": "gelu"'),
    ):
        with pytest.raises(CheckpointError, match=problem):
            start(image)
    gelu = tower(tmp_path, "vit_base_patch32_clip_224", pooling="token")
    start(gelu)
    text = TextTowerConfig(**vars(TEXT) | {"init_from": str(tmp_path), "heads": 4})
    with pytest.raises(CheckpointError, match=r"text\.heads"):
        start(gelu, text)
    CLIPImageProcessor(image_mean=HALF, image_std=HALF).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was trained with pixel mean"):
        start(gelu)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing trunk.blocks.1.attn.qkv.weight"):
        start(gelu)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        start(gelu)
