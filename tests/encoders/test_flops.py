"""Operations per image: against torch's counter, against the paper, and what they depend on."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoders import variants
from encoders.experts import ExpertMLP
from encoders.flops import expert_rows, image_flops, mlp_flops
from encoders.model_size import measure
from encoders.soft_moe import SoftMoE
from encoders.sparse_base import SparseMoE
from encoders.sparse_moe import ExpertsChoice, TokensChoice

# Paper, Tables 1 and 8: GFLOP per image, with JFT's 29,593 classes.
PAPER = {
    "dense_vit_small_patch16_224": (0, 9.2),
    "soft_moe_vit_small_patch16_224": (128, 8.6),
    "soft_moe_vit_small_patch14_224": (256, 13.2),
    "dense_vit_base_patch16_224": (0, 35.1),
    "soft_moe_vit_base_patch16_224": (128, 32.0),
    "dense_vit_large_patch16_224": (0, 122.9),
    "soft_moe_vit_large_patch16_224": (128, 111.1),
    "dense_vit_huge_patch14_224": (0, 334.2),
    "soft_moe_vit_huge_patch14_224": (256, 342.4),
}
TEST = "soft_moe_vit_test_patch16_64"


def counted(model: torch.nn.Module, *shape: int) -> int:
    # torch 2.11 does not count its fused attention on the CPU.
    attention = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention:
        model.eval()(torch.zeros(shape))
    return counter.get_total_flops()


def fake(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_blocks": 2, "slots_per_expert": 3, "mlp_ratio": 2.5},
        {"moe_blocks": 0, "num_classes": 0},
        {"class_token": True, "global_pool": "token", "reg_tokens": 2, "img_size": 96},
        {"representation_size": 24, "pos_embed": "sincos2d"},
    ],
)
def test_closed_form_equals_torchs_counter(options: dict[str, Any]) -> None:
    model = timm.create_model(TEST, **options)
    assert sum(image_flops(model).values()) == counted(model, 1, 3, *model.patch_embed.img_size)


def test_closed_form_holds_for_timms_own_model() -> None:
    model = timm.create_model("test_vit")
    assert sum(image_flops(model).values()) == counted(model, 1, 3, *model.patch_embed.img_size)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("vit_tiny_patch16_224", True),
        ("deit_tiny_distilled_patch16_224", True),
        ("vit_tiny_r_s16_p8_224", False),  # a ResNet stem
        ("vit_small_patch16_18x2_224", False),  # parallel blocks
        ("test_vit2", True),
        ("test_vit4", True),
    ],
)
def test_timms_models_have_the_closed_form_or_are_counted(name: str, closed: bool) -> None:
    model = fake(name)
    size = model.pretrained_cfg["input_size"][-2:]
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device="meta"))
    if closed:
        assert sum(image_flops(model, size).values()) == counter.get_total_flops()
    else:
        with pytest.raises(ValueError, match="no closed form for"):
            image_flops(model, size)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"dynamic_img_size": True}, (96, 64)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 72}, (72, 72)),
    ],
)
def test_other_image_sizes_are_counted(options: dict[str, Any], size: tuple[int, int]) -> None:
    model = timm.create_model(TEST, **options)
    with pytest.raises(ValueError, match="the closed form is that of"):
        image_flops(model, size)
    assert measure(model, size).flops == counted(model, 1, 3, *size)


@pytest.mark.parametrize("name", PAPER)
def test_figures_are_the_papers(name: str) -> None:
    experts, gflop = PAPER[name]
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=29_593, num_experts=experts or 1)
    assert 0.994 < sum(image_flops(model).values()) / 1e9 / gflop < 1


def test_huge_with_fewer_experts_is_cheaper_than_dense() -> None:
    with torch.device("meta"):
        model = timm.create_model(
            "soft_moe_vit_huge_patch14_224", num_classes=29_593, num_experts=128
        )
    assert sum(image_flops(model).values()) / 1e9 == pytest.approx(284.6, rel=0.006)


def test_cost_follows_slots_not_experts() -> None:
    costs = set()
    for experts, slots in ((16, 8), (128, 1), (2, 64)):
        layer = SoftMoE(16, experts, slots, 32)
        costs.add(counted(layer, 2, 20, 16))
        costs.add(2 * mlp_flops("soft", 20, 16, 32, experts, slots_per_expert=slots))
    assert len(costs) == 1
    assert counted(SoftMoE(16, 64, 1, 32), 2, 20, 16) * 2 == costs.pop()


def test_rows_of_the_other_routers() -> None:
    rows = [
        expert_rows("dense", 196),
        expert_rows("identity", 196, 196),
        expert_rows("uniform", 196, 32, slots_per_expert=4),
        expert_rows("experts_choice", 196, 32, capacity_factor=2.0),
        expert_rows("tokens_choice", 196, 32, capacity_factor=1.05, top_k=2, group_size=8),
        expert_rows("token_mixture", 196, 8),
    ]
    # 32 x round(12.25); 8 images: 32 x ceil(102.9) = 103, to a multiple of 4, 104, over 8.
    assert rows == [196, 196, 32, 32 * 12, 32 * 104 / 8, 8 * 196]


@pytest.mark.parametrize("multiple", [None, 1, 7])
@pytest.mark.parametrize("kind", [TokensChoice, ExpertsChoice])
def test_rows_follow_the_layers_capacity(kind: type[SparseMoE], multiple: int | None) -> None:
    options: dict[str, Any] = {"capacity_factor": 1.3, "group_size": 3}
    if multiple is not None:
        options["capacity_multiple"] = multiple
    router = "tokens_choice" if kind is TokensChoice else "experts_choice"
    rows = expert_rows(router, 19, 5, **options)
    assert rows == 5 * kind(2, 5, **options).capacity(3 * 19) / 3


def test_every_row_costs_one_dense_mlp() -> None:
    dense = mlp_flops("dense", 10, 16, 32)
    assert dense == counted(ExpertMLP(1, 16, 32), 1, 10, 16)
    scores = weighing = 2 * 10 * 16 * 4
    assert mlp_flops("token_mixture", 10, 16, 32, 4) == 4 * dense + scores + weighing
    assert mlp_flops("image_mixture", 10, 16, 32, 4) == 4 * dense + scores / 10 + weighing
    assert mlp_flops("identity", 10, 16, 32, 10) == dense
    assert mlp_flops("experts_choice", 10, 16, 32, 5) == dense + 2 * 10 * 16 * 5


def test_what_has_no_closed_form_is_refused() -> None:
    with pytest.raises(ValueError, match="router 'magic' has no closed form"):
        mlp_flops("magic", 10, 16, 32)
    model = variants.soft_moe_vit_test_patch16_64()
    model.blocks[0].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: no closed form for Identity"):
        image_flops(model)
    model.blocks[0].attn.proj = torch.nn.Linear(32, 64)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: no closed form for BiasFreeQKNorm"):
        image_flops(model)
    with pytest.raises(ValueError, match="global_pool='map'"):
        image_flops(timm.create_model(TEST, global_pool="map"))
