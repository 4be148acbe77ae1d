"""The routed vision transformer: options, initial values, and what the paper promises."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from encoders.soft_moe import SoftMoE
from encoders.vision_transformer import (
    SoftMoEVisionTransformer,
    resolve_moe_blocks,
    sincos_position_embedding,
)

MICRO = "soft_moe_vit_micro_patch8_64"


def micro(**kwargs: Any) -> SoftMoEVisionTransformer:
    """Micro/8 cut down to four thin blocks, the last two routed, with a head that answers."""
    defaults = {"embed_dim": 24, "depth": 4, "moe_blocks": 2, "num_experts": 4, "num_classes": 5}
    torch.manual_seed(0)
    model = timm.create_model(MICRO, **(defaults | kwargs))
    nn.init.normal_(model.head.weight)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def routings(model: nn.Module, x: Tensor) -> list[Any]:
    found: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, _: found.append(layer.route(args[0])))
        for layer in model.modules()
        if isinstance(layer, SoftMoE)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        MICRO, num_classes=10, class_token=True, reg_tokens=2, representation_size=64
    )
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
    assert model.representation[0].weight.std().item() == pytest.approx(192**-0.5, rel=0.03)
    assert model.blocks[0].mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    experts = model.blocks[-1].mlp.experts.fc1_weight
    assert torch.equal(experts, experts[:1].expand_as(experts))


@pytest.mark.parametrize("pos_embed", ["learn", "sincos2d"])
def test_weights_drawn_after_the_meta_device_are_complete(pos_embed: str) -> None:
    with torch.device("meta"):
        model = micro(pos_embed=pos_embed, representation_size=6)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.equal(model.norm.weight, torch.ones(24))
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("assign", [True, False])
def test_weights_loaded_after_the_meta_device_are_complete(assign: bool) -> None:
    """Fixed positions are in no checkpoint."""
    whole = micro(pos_embed="sincos2d").double().eval()
    with torch.device("meta"):
        model = micro(pos_embed="sincos2d").eval()
    if not assign:
        model.double().to_empty(device="cpu").pos_embed.fill_(torch.nan)
    model.load_state_dict(whole.state_dict(), assign=assign)
    assert model.pos_embed.dtype == torch.float64
    torch.testing.assert_close(model(images().double()), whole(images().double()))
    pickle.dumps(model)


def test_initialisation_can_be_skipped() -> None:
    model = micro(weight_init="skip")
    assert model.head.bias.unique().numel() == 5  # torch's own initial values, not -log(5)


def test_dense_twin_has_no_router() -> None:
    dense = micro(moe_blocks=())
    assert not any(isinstance(module, SoftMoE) for module in dense.modules())
    assert dense(images()).shape == (2, 5)


def test_router_options_reach_the_layer() -> None:
    layer = micro(
        slots_per_expert=3,
        router_options={"normalize": False, "noise_std": 0.2, "identical_experts": False},
    ).blocks[-1]
    assert layer.mlp.phi.shape == (24, 4, 3)
    assert layer.mlp.noise_std == 0.2
    assert not layer.mlp.normalize
    assert not torch.equal(layer.mlp.experts.fc1_weight[0], layer.mlp.experts.fc1_weight[1])


def test_capacity_counts_every_token() -> None:
    assert micro(capacity_factor=1.0).blocks[-1].mlp.phi.shape[2] == 64 // 4
    with_tokens = micro(capacity_factor=1.0, class_token=True, reg_tokens=3)
    assert with_tokens.blocks[-1].mlp.phi.shape[2] == 68 // 4
    assert micro(capacity_factor=0.5, img_size=96).blocks[-1].mlp.phi.shape[2] == 144 // 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "sofd", "moe_blocks": ()}, "router 'sofd' does not exist; did you mean soft"),
        ({"router_options": {"normalise": False}}, "did you mean normalize"),
        ({"router_options": {"slots_per_expert": 1}, "slots_per_expert": 2}, "give one"),
        ({"slots_per_expert": 1, "capacity_factor": 1.0}, "exclude each other"),
        ({"capacity_factor": 0.01}, "4 experts without a slot for 64 tokens"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"pos_embed": "rotary"}, "pos_embed='rotary': choose learn, none or sincos2d"),
        ({"pos_embed": "sincos2d", "embed_dim": 30}, "embed_dim=30 must be a multiple of 4"),
        ({"representation_size": 0}, "representation_size must be at least 1"),
        ({"img_size": 65}, "patches of 8 pixels do not divide img_size 65: take 64 or 72"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(**options)


def test_moe_blocks_resolve() -> None:
    assert resolve_moe_blocks(2, 6) == (4, 5)
    assert resolve_moe_blocks(0, 6) == resolve_moe_blocks((), 6) == ()
    assert resolve_moe_blocks([5, 1, 5], 6) == (1, 5)
    assert resolve_moe_blocks("every_2", 6) == (1, 3, 5)
    assert resolve_moe_blocks("every_2", 5) == (1, 3)
    assert resolve_moe_blocks("every_2_last_2", 12) == (9, 11)
    assert resolve_moe_blocks("every_3", 12) == (2, 5, 8, 11)
    assert resolve_moe_blocks("every_1_last_3", 4) == (1, 2, 3)


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        (7, "7"), (-1, "-1"), ([2, 6], "6"), ([-1], "-1"), ("last_2", "every_K"),
        ("every_7", "at most 6"), ("every_0", "every_K"), ("every_2_last_4", "every_2_last_4"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_exist_are_refused(blocks: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        micro(depth=6, moe_blocks=blocks)


def test_fixed_positions_tell_rows_from_columns() -> None:
    table = sincos_position_embedding((2, 3), 8)[0].view(2, 3, 8)
    # sin x, cos x, sin y, cos y at frequencies 1 and 1 / 10,000.
    expected = torch.tensor([2.0, 2e-4, 2.0, 2e-4, 1.0, 1e-4, 1.0, 1e-4])
    expected = torch.where(torch.arange(8) // 2 % 2 == 0, expected.sin(), expected.cos())
    torch.testing.assert_close(table[1, 2], expected)


def test_fixed_positions_are_no_parameter_and_spare_the_class_token() -> None:
    model = micro(pos_embed="sincos2d", class_token=True, reg_tokens=1)
    assert "pos_embed" not in dict(model.named_parameters())
    assert model.pos_embed.shape == (1, 64, 24)
    tokens = model._pos_embed(torch.zeros(1, 64, 24))
    assert torch.equal(tokens[:, :1], model.cls_token)
    assert torch.equal(tokens[:, 2:], model.pos_embed)
    assert model.double().pos_embed.dtype == torch.float64


def test_no_token_is_dropped_and_every_slot_sees_every_token() -> None:
    model = micro(num_experts=32)
    nn.init.constant_(model.blocks[-1].mlp.scale, 10.0)  # far from uniform
    for _, dispatch, combine in routings(model, images()):
        assert dispatch.min() > 0
        assert combine.min() > 0
        torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 32))
        torch.testing.assert_close(combine.sum(2), torch.ones(2, 64))


def test_an_image_never_depends_on_its_batch_mates() -> None:
    model = micro().eval()
    x, others = images(4), torch.randn(4, 3, 64, 64)
    others[2] = x[2]
    with torch.no_grad():
        assert torch.equal(model(x)[2], model(others)[2])
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-5)
        assert torch.equal(model(x), model(x))


def test_gradients_of_an_image_stay_with_it() -> None:
    x = images(3).requires_grad_()
    micro()(x)[1].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().amax((1, 2, 3)).bool().tolist() == [False, True, False]


def largest_weights(width: int, normalize: bool) -> tuple[float, float]:
    """Mean of the largest dispatch weight of a slot and the largest combine weight of a token."""
    torch.manual_seed(0)
    layer = SoftMoE(width, 16, hidden_dim=1, normalize=normalize)
    nn.init.normal_(layer.phi)  # training moves every number of phi about equally at any width
    weights = layer.route(torch.randn(4, 64, width))
    return weights.dispatch.amax(1).mean().item(), weights.combine.amax(2).mean().item()


def test_only_normalisation_keeps_weights_soft_at_any_width() -> None:
    """Paper, section 2.3 and appendix E: without it, wide models route to one token and slot."""
    without = [largest_weights(width, False) for width in (32, 128, 512)]
    for narrow, middle, wide in zip(*without, strict=True):
        assert narrow < middle < wide
        assert wide > 0.8
    normal = [largest_weights(width, True) for width in (32, 128, 512)]
    for (narrow, middle, wide), uniform in zip(
        zip(*normal, strict=True), (1 / 64, 1 / 16), strict=True
    ):
        assert narrow > middle > wide
        assert wide < 1.2 * uniform


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=5 must divide embed_dim=32"):
        SoftMoEVisionTransformer(embed_dim=32, num_heads=5, depth=2)
