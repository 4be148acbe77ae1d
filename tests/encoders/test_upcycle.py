"""Upcycling: what is copied, resampled, drawn and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from encoders import variants
from encoders.upcycle import upcycle

SOFT, DENSE = "soft_moe_vit_test_patch16_64", "dense_vit_test_patch16_64"
TIMM_SIZES: dict[str, Any] = {
    "img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5,
}  # fmt: skip
FROM_TIMM = ("cls_token", "*.[qk]_norm.weight")


def soft(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(SOFT, **({"num_classes": 5} | kwargs))


def randomised(model: Any) -> Any:
    """Every parameter away from its initial value, so that nothing agrees by chance."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def dense(**kwargs: Any) -> Any:
    return randomised(timm.create_model(DENSE, **({"num_classes": 5} | kwargs)))


def timm_dense(**kwargs: Any) -> Any:
    return randomised(timm.create_model("vit_small_patch16_224", **(TIMM_SIZES | kwargs)))


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("experts", "ratio"), [(1, 4.0), (4, 4.0), (7, 0.5)])
def test_each_expert_computes_the_dense_mlp(experts: int, ratio: float) -> None:
    source = dense(mlp_ratio=ratio).double()
    independent = {"identical_experts": False}
    model = soft(mlp_ratio=ratio, num_experts=experts, router_options=independent).double()
    upcycle(model, source.state_dict())
    mlp, bank = source.blocks[1].mlp, model.blocks[1].mlp.experts
    for layer in ("fc1", "fc2"):
        dense_layer = getattr(mlp, layer)
        assert all(torch.equal(w.T, dense_layer.weight) for w in getattr(bank, f"{layer}_weight"))
        assert all(torch.equal(b, dense_layer.bias) for b in getattr(bank, f"{layer}_bias"))
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    outputs = bank(x.expand(experts, -1, -1))
    torch.testing.assert_close(outputs, mlp(x).expand_as(outputs), rtol=1e-13, atol=1e-13)


def test_report_names_every_parameter_once() -> None:
    source, model = dense(), soft()
    report = upcycle(model, source.state_dict())
    bank = {f"blocks.1.mlp.experts.fc{i}_{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert set(report.copied_into_experts) == bank
    assert report.initialised == ["blocks.1.mlp.phi", "blocks.1.mlp.scale"]
    assert report.resampled == report.unused == []
    named = report.copied + report.copied_into_experts + report.initialised
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    state = model.state_dict()
    assert all(torch.equal(state[name], source.state_dict()[name]) for name in report.copied)
    assert "copied into experts: blocks.*.mlp.experts.fc1_weight" in str(report)


def test_routers_are_drawn_anew() -> None:
    model = randomised(soft())
    phi = model.blocks[1].mlp.phi.detach().clone()
    upcycle(model, dense().state_dict())
    assert model.blocks[1].mlp.scale.item() == 1
    assert not torch.isclose(model.blocks[1].mlp.phi, phi).any()


def test_untouched_blocks_compute_what_they_did() -> None:
    source, model = dense(), soft()
    upcycle(model, source.state_dict())
    ours, theirs = (m.forward_intermediates(images(), indices=[0])[1][0] for m in (model, source))
    assert torch.equal(ours, theirs)


def test_no_routed_block_gives_the_dense_model_back() -> None:
    source, model = dense(), soft(moe_blocks=())
    report = upcycle(model, source.state_dict())
    assert report.initialised == report.copied_into_experts == []
    assert torch.equal(model(images()), source(images()))


def test_timms_model_with_a_class_token() -> None:
    source, model = timm_dense(act_layer="gelu_tanh"), soft(qk_norm=False)
    report = upcycle(model, source.state_dict(), allow=FROM_TIMM)
    assert report.unused == ["cls_token"]
    assert report.initialised == ["blocks.1.mlp.phi", "blocks.1.mlp.scale"]
    assert torch.equal(model.pos_embed, source.pos_embed[:, 1:])
    # With its class token kept and no routed block it is the same model.
    twin = soft(qk_norm=False, moe_blocks=(), class_token=True, global_pool="token")
    assert upcycle(twin, source.state_dict()).unused == []
    torch.testing.assert_close(twin(images()), source(images()))


def test_register_tokens_without_positions() -> None:
    source = timm_dense(class_token=False, global_pool="avg", reg_tokens=2, no_embed_class=True)
    model = soft()
    allow = ("reg_token", "*.[qk]_norm.weight", "fc_norm.*", "norm.*")
    report = upcycle(model, source.state_dict(), allow=allow)
    assert torch.equal(model.pos_embed, source.pos_embed)
    assert report.unused == ["fc_norm.bias", "fc_norm.weight", "reg_token"]
    assert {"norm.weight", "norm.bias"} < set(report.initialised)


def test_other_grid_and_patch_size_are_resampled() -> None:
    source, model = timm_dense(), soft(img_size=96, patch_size=12)
    report = upcycle(model, source.state_dict(), allow=FROM_TIMM)
    assert report.resampled == ["pos_embed", "patch_embed.proj.weight"]
    expected = resample_abs_pos_embed(source.pos_embed[:, 1:], [8, 8], [4, 4], 0)
    assert torch.equal(model.pos_embed, expected)
    assert model.patch_embed.proj.weight.shape == (32, 3, 12, 12)
    assert model(images(96)).isfinite().all()


def test_missing_qkv_bias_can_be_allowed() -> None:
    source, model = timm_dense(qkv_bias=False), soft()
    with pytest.raises(ValueError, match=r"no blocks\.\*\.attn\.qkv\.bias \(x 2\)"):
        upcycle(model, source.state_dict(), allow=FROM_TIMM)
    report = upcycle(model, source.state_dict(), allow=(*FROM_TIMM, "*.qkv.bias"))
    assert {f"blocks.{i}.attn.qkv.bias" for i in (0, 1)} <= set(report.initialised)
    assert not model.blocks[0].attn.qkv.bias.any()  # so that nothing is added, as in the source


def test_noise_sets_experts_apart() -> None:
    source, model = dense(), soft(embed_dim=32, num_experts=16)
    upcycle(model, source.state_dict(), expert_noise_std=0.01)
    experts = model.blocks[1].mlp.experts
    difference = experts.fc1_weight - source.blocks[1].mlp.fc1.weight.T
    assert difference.std().item() == pytest.approx(0.01, rel=0.02)
    assert not torch.isclose(difference[0], difference[1]).all()
    assert torch.equal(experts.fc1_bias, source.blocks[1].mlp.fc1.bias.expand(16, -1))
    with pytest.raises(ValueError, match=r"expert_noise_std must not be negative, got -0\.1"):
        upcycle(model, source.state_dict(), expert_noise_std=-0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, r"head\.weight: the checkpoint has \(7, 32\) for \(5, 32\)"),
        ({"mlp_ratio": 2.0}, r"fc1_weight: the checkpoint has \(64, 32\) for \(4, 32, 128\)"),
        ({"depth": 3}, r"blocks\.\*\.norm1\.weight: the model has no place for it"),
        ({"class_token": True}, "cls_token: the model has no place for it"),
        (
            {"moe_blocks": 1, "num_experts": 4},
            r"the checkpoint has no blocks\.\*\.mlp\.fc1\.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str
) -> None:
    model = soft()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        upcycle(model, dense(**options).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_positions_that_no_square_holds_do_not_fit() -> None:
    weights = dense().state_dict()
    weights["pos_embed"] = weights["pos_embed"][:, :-1]
    with pytest.raises(ValueError, match=r"pos_embed: the checkpoint has \(1, 15, 32\)"):
        upcycle(soft(), weights)


def test_from_a_file_in_half_precision(tmp_path: Path) -> None:
    source = dense()
    save_file({k: v.half() for k, v in source.state_dict().items()}, tmp_path / "dense.safetensors")
    model = variants.soft_moe_vit_test_patch16_64(num_classes=5)
    upcycle(model, load_file(tmp_path / "dense.safetensors"))
    assert model.blocks[1].mlp.experts.fc1_weight.dtype == torch.float32
    expected = source.blocks[0].attn.qkv.weight.half().float()
    assert torch.equal(model.blocks[0].attn.qkv.weight, expected)
