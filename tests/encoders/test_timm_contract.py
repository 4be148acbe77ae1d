"""What timm does with its models works with ours, soft and dense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective
from encoders.soft_moe import SoftMoE
from encoders.vision_transformer import SoftMoEVisionTransformer

NAMES = ("soft_moe_vit_micro_patch8_64", "dense_vit_micro_patch8_64")
TEST_NAMES = ("soft_moe_vit_test_patch16_64", "dense_vit_test_patch16_64")


def micro(name: str = NAMES[0], **kwargs: Any) -> SoftMoEVisionTransformer:
    """Micro/8 cut down to four thin blocks, with a head that answers; soft routes the last two."""
    defaults = {"embed_dim": 24, "depth": 4, "num_experts": 4, "num_classes": 5}
    if name.startswith("soft"):
        defaults["moe_blocks"] = 2
    torch.manual_seed(0)
    model = timm.create_model(name, **(defaults | kwargs))
    if isinstance(getattr(model, "head", None), nn.Linear):
        nn.init.normal_(model.head.weight)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_reset_classifier_leaves_pooled_features(name: str) -> None:
    model = micro(name)
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_features == model.head_hidden_size == 24
    assert torch.equal(model(images()), features)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    assert model.get_classifier() is model.head


def test_reset_classifier_behind_a_representation_layer() -> None:
    model = micro(representation_size=7)
    assert model.head.in_features == model.head_hidden_size == 7
    model.reset_classifier(3)
    assert model.head.weight.shape == (3, 7)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_intermediates(name: str) -> None:
    model = micro(name)
    final, maps = model.forward_intermediates(images(), indices=(1, 3))
    assert torch.equal(final, model.forward_features(images()))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 8, 8)] * 2
    features = micro(name, features_only=True, out_indices=(1, 3))
    assert features.feature_info.channels() == [24, 24]
    assert features.feature_info.reduction() == [8, 8]
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(features(images()), maps, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_does_not_change_gradients(name: str) -> None:
    model = micro(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_input_size_can_change(name: str) -> None:
    model = micro(name)
    old = model.pos_embed.detach().clone()
    others = {key: value.shape for key, value in model.state_dict().items() if key != "pos_embed"}
    model.set_input_size((96, 96))
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(old, [12, 12], [8, 8], 0))
    state = model.state_dict()
    assert others == {key: value.shape for key, value in state.items() if key != "pos_embed"}
    twin = micro(name, img_size=96)
    twin.load_state_dict(state)
    assert torch.equal(model(images(96)), twin(images(96)))


def test_fixed_positions_follow_the_input_size() -> None:
    model = micro(pos_embed="sincos2d")
    assert "pos_embed" not in model.state_dict()
    model.set_input_size((96, 96))
    assert "pos_embed" not in model.state_dict()
    twin = micro(pos_embed="sincos2d", img_size=96)
    assert torch.equal(model.pos_embed, twin.pos_embed)
    assert torch.equal(model(images(96)), twin(images(96)))


@pytest.mark.parametrize("name", NAMES)
def test_dropped_patches_and_paths_act_in_training_only(name: str) -> None:
    plain = micro(name)
    dropped = micro(name, patch_drop_rate=0.5, drop_path_rate=0.3)
    dropped.load_state_dict(plain.state_dict())
    seen: list[int] = []
    dropped.blocks[-1].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    assert torch.equal(dropped.eval()(images()), plain.eval()(images()))
    first, second = dropped.train()(images()), dropped(images())
    assert not torch.equal(first, second)
    assert seen == [64, 32, 32]
    paths = [block.drop_path2.drop_prob for block in dropped.blocks[1:]]
    assert paths == pytest.approx([0.1, 0.2, 0.3])


def test_no_weight_decay_names_are_parameters_and_reach_the_optimizer() -> None:
    model = micro()
    parameters = dict(model.named_parameters())
    # timm lists tokens that this arrangement does not have.
    names = model.no_weight_decay() - {"cls_token", "reg_token", "dist_token"}
    assert names <= parameters.keys()
    router = {"phi", "scale", "experts.fc1_bias", "experts.fc2_bias"}
    assert names == {"pos_embed"} | {f"blocks.{i}.mlp.{name}" for i in (2, 3) for name in router}
    exempt, decayed = param_groups_weight_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay()
    )
    assert (exempt["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    identities = {id(parameter) for parameter in exempt["params"]}
    assert {id(parameters[name]) for name in names} <= identities
    assert id(parameters["blocks.3.mlp.experts.fc1_weight"]) not in identities
    assert micro(NAMES[1]).no_weight_decay() >= {"pos_embed"}


@pytest.mark.parametrize("name", NAMES)
def test_layer_groups_cover_every_parameter(name: str) -> None:
    model = micro(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    assert layers["pos_embed"] == 0
    for index, block in enumerate(model.blocks):
        names = [f"blocks.{index}.{name}" for name, _ in block.named_parameters()]
        assert {layers[name] for name in names} == {index + 1}
    assert (layers["norm.weight"], layers["head.weight"]) == (4, 5)


def test_layer_decay_scales_experts_and_router_with_their_block() -> None:
    model = micro()
    groups = param_groups_layer_decay(
        model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    settings = {id(p): group for group in groups for p in group["params"]}
    assert settings.keys() == {id(parameter) for parameter in model.parameters()}
    mlp, last = model.blocks[2].mlp, model.blocks[3].mlp
    for ours, theirs in zip(mlp.parameters(), last.parameters(), strict=True):
        assert settings[id(ours)]["lr_scale"] * 2 == settings[id(theirs)]["lr_scale"]
    assert settings[id(mlp.experts.fc1_weight)]["weight_decay"] > 0
    assert settings[id(mlp.phi)]["weight_decay"] == settings[id(mlp.scale)]["weight_decay"] == 0


def save_as_timm(model: SoftMoEVisionTransformer, name: str, folder: Path) -> str:
    """A checkpoint as training writes it; returns what `timm.create_model` takes."""
    objective = ClassificationObjective(model, ClassifierConfig(name), model.num_classes)
    save_file(model.state_dict(), folder / "model.safetensors")
    for file, content in objective.config_files().items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return f"local-dir:{folder}"


@pytest.mark.parametrize("name", TEST_NAMES)
def test_checkpoint_opens_in_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=6)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    source = save_as_timm(model, name, tmp_path)
    same = timm.create_model(source, pretrained=True)
    assert type(same) is SoftMoEVisionTransformer
    assert torch.equal(same(images()), model(images()))
    # A new head and a larger image, as fine-tuning wants them.
    other = timm.create_model(source, pretrained=True, num_classes=9, img_size=96)
    assert other(images(96)).shape == (2, 9)
    resampled = resample_abs_pos_embed(model.pos_embed, [6, 6], [4, 4], 0)
    torch.testing.assert_close(other.pos_embed, resampled)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "pos_embed"))}
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in kept.items())


def test_image_tower_of_an_open_clip_checkpoint_opens_in_timm(tmp_path: Path) -> None:
    model = timm.create_model(TEST_NAMES[0], num_classes=0)
    tower = {f"visual.trunk.{key}": value for key, value in model.state_dict().items()}
    save_file(tower | {"logit_scale": torch.zeros(())}, tmp_path / "clip.safetensors")
    same = timm.create_model(
        TEST_NAMES[0],
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "clip.safetensors")},
    )
    assert torch.equal(same(images()), model(images()))


def test_every_token_pooling_of_timm_works() -> None:
    for pool in ("avg", "max", "avgmax", "map", "token"):
        model = micro(global_pool=pool, class_token=pool == "token", num_classes=0)
        assert model(images()).shape == (2, 24)
        assert sum(isinstance(block.mlp, SoftMoE) for block in model.blocks) == 2


def test_images_of_any_size_with_dynamic_positions() -> None:
    model = micro(dynamic_img_size=True)
    torch.testing.assert_close(model(images()), micro()(images()))
    assert model(images(80)).shape == (2, 5)
    assert math.isfinite(model(images(40)).sum().item())
