"""The upcycling command: what it writes opens elsewhere, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.initial_weights import initialise_towers
from encoders.upcycle import upcycle
from eval.image_tower import open_image_tower
from scripts.upcycle import main

SOFT, DENSE = "soft_moe_vit_test_patch16_64", "dense_vit_test_patch16_64"


def save(folder: Path, name: str = DENSE, **options: Any) -> Any:
    """A model as timm saves it for its hub, with weights that nothing draws by chance."""
    torch.manual_seed(1)
    model = timm.create_model(name, **({"num_classes": 5} | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return model.eval()


def run(dense: Path, out: Path, *more: str) -> None:
    main([str(dense), f"--to={SOFT}", f"--out={out}", *more])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_result_opens_in_timm_and_in_a_dual_encoder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dense, out = save(tmp_path / "dense"), tmp_path / "new" / "soft"
    run(tmp_path / "dense", out, "--seed=3")
    printed = capsys.readouterr().out
    assert "copied into experts: blocks.*.mlp.experts.fc1_weight" in printed
    assert "initialised: blocks.*.mlp.phi, blocks.*.mlp.scale" in printed
    assert "note:" not in printed
    assert printed.endswith(f"written to {out}\n")

    torch.manual_seed(3)
    expected = timm.create_model(SOFT, num_classes=5).eval()
    upcycle(expected, dense.state_dict())
    opened = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(opened(images), expected(images))
    assert open_image_tower(str(out)).name == SOFT

    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    image = ImageTowerConfig(SOFT, init_from=str(out))
    description = model_config(image, text, ContrastiveConfig())
    model = build_dual_encoder(description)
    initialise_towers(model, image, text, description)
    assert torch.equal(model.visual.trunk.norm.weight, dense.norm.weight)


def test_timms_own_transformer_is_taken_with_its_class_token(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    dense = save(tmp_path / "dense", "vit_small_patch16_224", **sizes)
    config = tmp_path / "dense" / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"]["mean"] = [0.4, 0.4, 0.4]
    config.write_text(json.dumps(content))
    run(tmp_path / "dense", tmp_path / "soft", "--expert_noise_std=0.01")
    printed = capsys.readouterr().out
    assert "resampled: pos_embed" in printed
    assert "unused: cls_token" in printed
    assert "note: pixels had mean (0.4, 0.4, 0.4)" in printed
    bank = (
        timm.create_model(f"local-dir:{tmp_path / 'soft'}", pretrained=True).blocks[1].mlp.experts
    )
    spread = (bank.fc1_weight - dense.blocks[1].mlp.fc1.weight.T).std().item()
    assert spread == pytest.approx(0.01, rel=0.1)


def test_what_cannot_be_upcycled_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    save(dense)
    save(tmp_path / "wide", embed_dim=48)
    to_out = (f"--to={SOFT}", f"--out={out}")
    for arguments, problem in (
        ([], "checkpoint is not given"),
        ([str(dense)], "out is not given"),
        ([str(dense), f"--to={DENSE}", f"--out={out}"], "choose one of soft_moe_vit_nano"),
        ([str(dense), f"--to={SOFT}", f"--out={dense}"], "exists already"),
        ([DENSE, *to_out], "is no folder: give one with weights"),
        ([str(tmp_path / "none"), *to_out], "does not exist"),
        ([str(tmp_path / "wide"), *to_out], "the dense checkpoint does not fit"),
        ([str(dense), *to_out, "--expert_noise_std=-1"], "must not be negative"),
    ):
        assert problem in refusal(capsys, *arguments)
    assert not out.exists()
