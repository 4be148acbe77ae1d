"""The registered names: sizes, parameter counts, neighbours in timm's registry."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from encoders import variants
from encoders.soft_moe import SoftMoE
from encoders.variants import VARIANTS, input_size

SOFT = [name for name in VARIANTS if name.startswith("soft_moe_vit_")]
DENSE = [name for name in VARIANTS if name.startswith("dense_vit_")]
PAPER = {
    "tiny_patch16": 8, "small_patch32": 32, "small_patch16": 128, "small_patch14": 256,
    "small_patch8": 512, "base_patch32": 32, "base_patch16": 128, "large_patch32": 32,
    "large_patch16": 128, "huge_patch14": 256,
}  # fmt: skip


def meta(name: str, **kwargs: int) -> VisionTransformer:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def test_every_name_is_registered_and_has_its_twin() -> None:
    assert set(timm.list_models("soft_moe_vit_*")) == set(SOFT)
    assert set(timm.list_models("dense_vit_*")) == set(DENSE)
    assert {name.replace("soft_moe", "dense") for name in SOFT} == set(DENSE)
    assert set(variants.__all__) == set(VARIANTS)
    assert all(timm.model_entrypoint(name) is getattr(variants, name) for name in VARIANTS)
    for size, experts in PAPER.items():
        assert VARIANTS[f"soft_moe_vit_{size}_224"][3] == experts
    # timm's own models are still timm's.
    assert timm.model_entrypoint("vit_small_patch16_224").__module__.startswith("timm.")


def test_importing_the_package_registers_the_names(run_python: Any) -> None:
    code = "import encoders, timm; assert all(map(timm.is_model, encoders.VARIANTS))"
    assert run_python("-c", code).returncode == 0


@pytest.mark.parametrize("name", SOFT)
def test_second_half_is_routed(name: str) -> None:
    model = meta(name)
    depth = len(model.blocks)
    routed = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, SoftMoE)]
    assert routed == list(model.moe_blocks) == list(range(depth // 2, depth))
    assert {model.blocks[i].mlp.phi.shape[1:] for i in routed} == {(VARIANTS[name][3], 1)}
    assert model.default_cfg["input_size"][-1] == model.patch_embed.img_size[0] == input_size(name)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", DENSE)
def test_twin_differs_in_the_routed_layers_only(name: str) -> None:
    dense, soft = meta(name), meta(name.replace("dense", "soft_moe"))
    assert not dense.moe_blocks
    ours, theirs = dense.state_dict(), soft.state_dict()
    assert all(".mlp." in key for key in ours.keys() ^ theirs.keys())
    assert all(ours[key].shape == theirs[key].shape for key in ours.keys() & theirs.keys())
    assert dense.pretrained_cfg["input_size"] == soft.pretrained_cfg["input_size"]


# With 29,593 classes (JFT), 1,000 and none; they round to the paper's Tables 1 and 8.
@pytest.mark.parametrize(
    ("name", "experts", "counts"),
    [
        ("dense_vit_small_patch16_224", 0, (33_059_737, 22_051_432, 21_666_432)),
        ("dense_vit_base_patch16_224", 0, (108_555_673, 86_567_656, 85_798_656)),
        ("dense_vit_large_patch16_224", 0, (333_635_481, 304_327_656, 303_302_656)),
        ("dense_vit_huge_patch14_224", 0, (668_675_993, 632_048_360, 630_767_360)),
        ("soft_moe_vit_small_patch16_224", 128, (933_709_471, 922_701_166, 922_316_166)),
        ("soft_moe_vit_small_patch14_224", 256, (1_841_402_527, 1_830_394_222, 1_830_009_222)),
        ("soft_moe_vit_base_patch16_224", 128, (3_707_638_687, 3_685_650_670, 3_684_881_670)),
        ("soft_moe_vit_large_patch16_224", 128, (13_127_249_829, 13_097_942_004, 13_096_917_004)),
        ("soft_moe_vit_huge_patch14_224", 128, (27_318_132_649, 27_281_505_016, 27_280_224_016)),
        ("soft_moe_vit_huge_patch14_224", 256, (54_177_406_889, 54_140_779_256, 54_139_498_256)),
    ],
)
def test_parameter_counts_are_the_papers(
    name: str, experts: int, counts: tuple[int, int, int]
) -> None:
    for classes, expected in zip((29_593, 1000, 0), counts, strict=True):
        model = meta(name, num_classes=classes, num_experts=experts or 128)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_tiny_fits_small_machines() -> None:
    model = meta("soft_moe_vit_tiny_patch16_224", num_classes=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_961_414


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean soft_moe_vit_tiny_patch16_224"):
        input_size("soft_moe_vit_tiny_patch16_225")
