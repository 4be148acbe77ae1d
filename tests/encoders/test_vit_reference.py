"""The vision transformer against arrays computed by google-research/vmoe: values and gradients."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from encoders.vision_transformer import SoftMoEVisionTransformer
from tests.encoders.reference import Golden, assert_close

# Four float32 blocks deep; observed 4e-7 for values and 1.2e-6 for gradients, of the maximum.
VALUE_TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 1e-5


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
    if f"{prefix}SelfAttention/query_ln/scale" in arrays:
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
        "norm.weight": arrays[f"{prefix}Encoder/encoder_norm/scale"],
        "norm.bias": arrays[f"{prefix}Encoder/encoder_norm/bias"],
        "head.weight": arrays[f"{prefix}head/kernel"].T,
        "head.bias": arrays[f"{prefix}head/bias"],
    }
    optional = {
        "pos_embed": "Encoder/posembed_input/pos_embedding",
        "cls_token": "cls",
        "representation.0.bias": "pre_logits/bias",
    }
    out |= {
        ours: arrays[prefix + name] for ours, name in optional.items() if prefix + name in arrays
    }
    if f"{prefix}pre_logits/kernel" in arrays:
        out["representation.0.weight"] = arrays[f"{prefix}pre_logits/kernel"].T
    blocks = {match[1] for name in arrays if (match := re.match(rf"{prefix}.*block_(\d+)/", name))}
    for index in blocks:
        block = flax_block(arrays, f"{prefix}Encoder/encoderblock_{index}/")
        out |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    return out


def test_model_equals_the_reference() -> None:
    arrays = Golden("vit_soft").arrays
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
    arrays = Golden("encoder_block_soft").arrays
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


DENSE: dict[str, dict[str, Any]] = {
    "vit_dense_token": {
        "class_token": True, "global_pool": "token", "qk_norm": False, "depth": 2,
        "representation_size": 12,
    },
    "vit_dense_sincos2d": {"pos_embed": "sincos2d", "depth": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_arrangements_equal_the_reference(name: str) -> None:
    arrays = Golden(name).arrays
    model = SoftMoEVisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, num_heads=2, mlp_ratio=1.5, num_classes=5,
        **DENSE[name],
    )  # fmt: skip
    model.load_state_dict(flax_vit(arrays, "params/"))
    x = arrays["in/images"].permute(0, 3, 1, 2)
    final, tokens = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    for index, output in enumerate(tokens):
        if isinstance(output, tuple):
            output = torch.cat(output[::-1], dim=1)  # the class token stands in front
        assert_close(output, arrays[f"f32/tokens/encoderblock_{index}"], VALUE_TOLERANCE)
    assert_close(final, arrays["f32/tokens/encoder_norm"], VALUE_TOLERANCE)
    pooled = model.forward_head(final, pre_logits=True)
    expected = arrays["f32/pre_logits"]
    if "representation_size" in DENSE[name]:
        expected = expected.tanh()  # the file has the linear layer's output
    assert_close(pooled, expected, VALUE_TOLERANCE)
    assert_close(model(x), arrays["f32/logits"], VALUE_TOLERANCE)
