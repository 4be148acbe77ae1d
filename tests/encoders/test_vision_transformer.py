"""Soft MoE ViT against arrays computed by google-research/vmoe, and timm's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from encoders import variants
from encoders.soft_moe import SoftMoE
from encoders.vision_transformer import SoftMoEVisionTransformer, resolve_moe_blocks

GOLDEN = Path(__file__).parents[1] / "golden"
MICRO = "soft_moe_vit_micro_patch8_64"
# Four float32 blocks deep; observed 4e-7 for values and 1.2e-6 for gradients, of the maximum.
VALUE_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-5


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays if key != "settings"}


def flax_block(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One encoder block in timm's names; serves parameters and gradients alike."""

    def take(name: str) -> Tensor:
        return arrays[f"{prefix}{name}"]

    out: dict[str, Tensor] = {}
    for norm in (0, 1):
        out[f"norm{norm + 1}.weight"] = take(f"LayerNorm_{norm}/scale")
        out[f"norm{norm + 1}.bias"] = take(f"LayerNorm_{norm}/bias")
    qkv = [f"SelfAttention/{name}" for name in ("query", "key", "value")]
    out["attn.qkv.weight"] = torch.cat([take(f"{n}/kernel").flatten(1).T for n in qkv])
    out["attn.qkv.bias"] = torch.cat([take(f"{n}/bias").flatten() for n in qkv])
    out["attn.q_norm.weight"] = take("SelfAttention/query_ln/scale")
    out["attn.k_norm.weight"] = take("SelfAttention/key_ln/scale")
    out["attn.proj.weight"] = take("SelfAttention/out/kernel").flatten(0, 1).T
    out["attn.proj.bias"] = take("SelfAttention/out/bias")
    if f"{prefix}Moe/Router/mu" in arrays:
        out["mlp.phi"], out["mlp.scale"] = take("Moe/Router/mu"), take("Moe/Router/scale")
        for layer in (0, 1):
            out[f"mlp.experts.fc{layer + 1}_weight"] = take(f"Moe/Mlp/Dense_{layer}/kernel")
            out[f"mlp.experts.fc{layer + 1}_bias"] = take(f"Moe/Mlp/Dense_{layer}/bias")
    else:
        for layer in (0, 1):
            out[f"mlp.fc{layer + 1}.weight"] = take(f"Mlp/Dense_{layer}/kernel").T
            out[f"mlp.fc{layer + 1}.bias"] = take(f"Mlp/Dense_{layer}/bias")
    return out


def flax_vit(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The whole model in timm's names."""
    out = {
        "patch_embed.proj.weight": arrays[f"{prefix}embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays[f"{prefix}embedding/bias"],
        "pos_embed": arrays[f"{prefix}Encoder/posembed_input/pos_embedding"],
        "norm.weight": arrays[f"{prefix}Encoder/encoder_norm/scale"],
        "norm.bias": arrays[f"{prefix}Encoder/encoder_norm/bias"],
        "head.weight": arrays[f"{prefix}head/kernel"].T,
        "head.bias": arrays[f"{prefix}head/bias"],
    }
    for index in range(4):
        block = flax_block(arrays, f"{prefix}Encoder/encoderblock_{index}/")
        out |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    return out


def assert_close(actual: Tensor | None, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Largest difference, relative to the largest expected element (at least 1 for a scalar)."""
    assert actual is not None, name
    scale = expected.abs().max().clamp_min(1e-6 if expected.ndim else 1.0)
    error = ((actual.detach() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def micro(**kwargs: Any) -> SoftMoEVisionTransformer:
    """Micro/8 cut down to four thin blocks, the last two routed, with a head that answers."""
    defaults = {"embed_dim": 24, "depth": 4, "moe_blocks": 2, "num_experts": 4, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model(MICRO, **(defaults | kwargs))
    nn.init.normal_(model.head.weight)
    return model


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_model_equals_the_reference() -> None:
    arrays = golden("vit_soft")
    model = SoftMoEVisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=1.5,
        num_classes=7, moe_blocks=2, num_experts=4, slots_per_expert=4,
    )  # fmt: skip
    model.load_state_dict(flax_vit(arrays, "params/"))
    x = arrays["in/images"].permute(0, 3, 1, 2).clone().requires_grad_()
    final, tokens = model.forward_intermediates(x, output_fmt="NLC")
    for index, output in enumerate(tokens):
        expected = arrays[f"f32/tokens/encoderblock_{index}"]
        assert_close(output, expected, VALUE_TOLERANCE, f"block {index}")
    assert_close(final, arrays["f32/tokens/encoder_norm"], VALUE_TOLERANCE, "norm")
    pooled = model.forward_head(final, pre_logits=True)
    assert_close(pooled, arrays["f32/pre_logits"], VALUE_TOLERANCE, "pre-logits")
    logits = model(x)
    assert_close(logits, arrays["f32/logits"], VALUE_TOLERANCE, "logits")

    (logits * arrays["w/logits"]).sum().backward()
    expected = arrays["f32/grad/in/images"].permute(0, 3, 1, 2)
    assert_close(x.grad, expected, GRADIENT_TOLERANCE, "images")
    gradients = flax_vit(arrays, "f32/grad/params/")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], GRADIENT_TOLERANCE, name)


def test_block_equals_the_reference() -> None:
    arrays = golden("encoder_block_soft")
    block = SoftMoEVisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, mlp_ratio=32 / 24,
        moe_blocks=1, num_experts=4, slots_per_expert=2,
    ).blocks[0]  # fmt: skip
    block.load_state_dict(flax_block(arrays, "params/"))
    x = arrays["in/x"].clone().requires_grad_()
    attended = block.attn(block.norm1(x))
    assert_close(attended, arrays["out/SelfAttention"], VALUE_TOLERANCE, "attention")
    assert_close(block.norm2(x + attended), arrays["out/LayerNorm_1"], VALUE_TOLERANCE, "norm2")
    out = block(x)
    assert_close(out, arrays["f32/out"], VALUE_TOLERANCE, "block")

    (out * arrays["w/out"]).sum().backward()
    assert_close(x.grad, arrays["f32/grad/in/x"], GRADIENT_TOLERANCE, "x")
    gradients = flax_block(arrays, "f32/grad/params/")
    for name, parameter in block.named_parameters():
        assert_close(parameter.grad, gradients[name], GRADIENT_TOLERANCE, name)


@pytest.mark.parametrize(
    ("size", "num_classes", "parameters"),
    [
        ("small", 0, 922_316_166),
        ("small", 1000, 922_701_166),
        ("small", 29_593, 933_709_471),
        ("base", 0, 3_684_881_670),
        ("base", 1000, 3_685_650_670),
        ("base", 29_593, 3_707_638_687),
    ],
)
def test_parameter_counts_are_the_papers(size: str, num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"soft_moe_vit_{size}_patch16_224", num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_every_registered_name_builds_and_routes_its_second_half() -> None:
    assert set(timm.list_models("soft_moe_vit_*")) == set(variants.default_cfgs)
    for name in variants.default_cfgs:
        with torch.device("meta"):
            model = timm.create_model(name)
        depth = len(model.blocks)
        assert model.moe_blocks == tuple(range(depth // 2, depth))
        routed = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, SoftMoE)]
        assert tuple(routed) == model.moe_blocks
        assert model.default_cfg["input_size"][-1] == model.patch_embed.img_size[0]
        assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model(MICRO, num_classes=10, class_token=True, reg_tokens=2)
    # Zero head kernel and bias -log(C): every class starts with a sigmoid of about 1/C.
    torch.testing.assert_close(model(images()), torch.full((2, 10), -float(np.log(10))))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert 0 < model.reg_token.abs().max() < 1e-5
    kernel = model.patch_embed.proj.weight
    assert kernel.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.03)
    assert kernel.abs().max() <= 2 * (3 * 8 * 8) ** -0.5 / 0.8796
    for projection in model.blocks[0].attn.qkv.weight.chunk(3):
        bound = (6 / (192 + 192)) ** 0.5
        assert 0.99 * bound < projection.abs().max() <= bound
    assert model.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    experts = model.blocks[-1].mlp.experts.fc1_weight
    assert torch.equal(experts, experts[:1].expand_as(experts))


def test_weights_drawn_after_the_meta_device_are_complete() -> None:
    with torch.device("meta"):
        model = micro()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(model.norm.weight, torch.ones(24))


def test_reset_classifier_leaves_pooled_features() -> None:
    model = micro()
    features = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_features == model.head_hidden_size == 24
    assert torch.equal(model(images()), features)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)


def test_intermediate_features_are_feature_maps() -> None:
    model = timm.create_model(MICRO, features_only=True, out_indices=(1, 3))
    assert [tuple(output.shape) for output in model(images())] == [(2, 192, 8, 8)] * 2


def test_checkpointing_does_not_change_gradients() -> None:
    model = micro()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_input_size_can_change() -> None:
    model = micro()
    model.set_input_size((96, 96))
    twin = micro(img_size=96)
    twin.load_state_dict(model.state_dict())
    assert twin.pos_embed.shape == (1, 144, 24)
    assert torch.equal(model(images(96)), twin(images(96)))


def test_dropped_patches_and_paths_act_in_training_only() -> None:
    plain = micro()
    dropped = micro(patch_drop_rate=0.5, drop_path_rate=0.3)
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


def test_layer_groups_cover_every_parameter() -> None:
    model = micro()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    assert layers["pos_embed"] == 0
    for index, block in enumerate(model.blocks):
        names = [f"blocks.{index}.{name}" for name, _ in block.named_parameters()]
        assert {layers[name] for name in names} == {index + 1}
    assert (layers["norm.weight"], layers["head.weight"]) == (4, 5)
    decayed = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay())
    grouped = sum(len(group["params"]) for group in decayed)
    assert grouped == len(list(model.parameters()))


def test_dense_twin_has_no_router() -> None:
    dense = micro(moe_blocks=())
    assert not any(isinstance(module, SoftMoE) for module in dense.modules())
    assert dense.no_weight_decay() >= {"pos_embed"}
    assert dense(images()).shape == (2, 5)


def test_router_options_reach_the_layer() -> None:
    layer = micro(slots_per_expert=3, router_noise_std=0.2, identical_experts=False).blocks[-1].mlp
    assert layer.phi.shape == (24, 4, 3)
    assert layer.noise_std == 0.2
    assert not torch.equal(layer.experts.fc1_weight[0], layer.experts.fc1_weight[1])


def test_moe_blocks_resolve() -> None:
    assert resolve_moe_blocks(2, 6) == (4, 5)
    assert resolve_moe_blocks(0, 6) == resolve_moe_blocks((), 6) == ()
    assert resolve_moe_blocks([5, 1, 5], 6) == (1, 5)


@pytest.mark.parametrize(("blocks", "named"), [(7, "7"), (-1, "-1"), ([2, 6], "6"), ([-1], "-1")])
def test_blocks_that_do_not_exist_are_refused(blocks: int | list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        micro(depth=6, moe_blocks=blocks)
