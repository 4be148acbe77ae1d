"""Initialising towers: differences that are refused, explained and allowed by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.contrastive.weight_runs import (
    ARGUMENTS,
    TEST,
    TINY,
    classification_run,
    contrastive_run,
    refused,
    start,
)
from training.checkpoint import CheckpointError


def test_weights_of_another_architecture_are_explained(
    classifier: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, weights = classifier
    other = timm.create_model(TEST, num_classes=3, embed_dim=16).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "blocks.1.mlp" not in name},
        tmp_path / "dense.safetensors",
    )
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    for place, problem in (
        ("other.safetensors", r"trunk\.pos_embed is \(1, 16, 16\), expected \(1, 16, 32\)"),
        ("dense.safetensors", r"missing trunk\.blocks\.1\.mlp\.phi"),
        ("dense.safetensors", r"match these names in image\.init_allow"),
        ("nowhere", "does not exist"),
        ("empty", "holds no complete checkpoint"),
        ("bare", r"has no model\.safetensors; only safetensors are read"),
    ):
        refused(problem, image={"init_from": str(tmp_path / place)})


def test_differences_are_allowed_by_name(
    classifier: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, weights = classifier
    changed = {name: value for name, value in weights.items() if name != "norm.bias"}
    changed |= {"pos_embed": torch.zeros(1, 4, 32), "extra": torch.zeros(2)}
    save_file(changed, tmp_path / "w.safetensors")
    source = {"init_from": str(tmp_path / "w.safetensors")}
    allow = [r"trunk\.(pos_embed|norm\.bias)", "trunk.extra"]
    fresh, _ = start()
    model, (line, _) = start(source | {"init_allow": allow})
    trunk, before = model.visual.trunk.state_dict(), fresh.visual.trunk.state_dict()
    for name, value in trunk.items():
        expected = before if name in ("pos_embed", "norm.bias") else weights
        assert torch.equal(value, expected[name]), name
    assert line.endswith(
        "allowed: missing trunk.norm.bias, unexpected trunk.extra, trunk.pos_embed is (1, 4, 32),"
        " expected (1, 16, 32)"
    )
    refused(
        "missing trunk.norm.bias", image=source | {"init_allow": ["trunk.pos_embed", ".*extra"]}
    )
    refused(r"'head' matches no parameter", image=source | {"init_allow": [*allow, "head"]})
    refused(r"image\.init_allow '\('", image=source | {"init_allow": ["("]})
    refused(r"image\.init_allow allows differences to nothing", image={"init_allow": ["x"]})


def test_another_width_of_the_joint_space_is_a_difference(dual_encoder: tuple[Path, Any]) -> None:
    source = {"init_from": str(dual_encoder[0])}
    refused(r"head\.proj\.weight is \(8, 32\), expected \(4, 32\)", image=source, embed_dim=4)
    allow = {"init_allow": [r"head\..*"]}, {"init_allow": ["text_projection"]}
    _, lines = start(source | allow[0], TINY | source | allow[1], embed_dim=4)
    assert all("; allowed: " in line for line in lines)


def test_arguments_must_be_those_of_the_source(tmp_path: Path) -> None:
    """Weights of another router fit by name and shape."""
    for make in (classification_run, contrastive_run):
        run_dir = make(tmp_path / make.__name__, **ARGUMENTS)
        model, _ = start({"init_from": str(run_dir), "arguments": ARGUMENTS})
        assert model.visual.trunk.router == "experts_choice"
        assert model.visual.image_size == (48, 48)
        (file,) = run_dir.glob("checkpoints/*/*model.safetensors")
        with pytest.raises(CheckpointError) as error:
            start({"init_from": str(file)})
        told = str(error.value).rpartition("write --image.arguments ")[2]
        assert json.loads(told.strip("'")) == ARGUMENTS
        other = ARGUMENTS | {"router": "soft"}
        refused(
            'image.arguments is {.*"soft"', image={"init_from": str(run_dir), "arguments": other}
        )
        name = {"name": TEST.replace("soft_moe", "dense")}
        refused(f"is a {TEST}: set image.name", image={"init_from": str(run_dir)} | name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": 4}, r"has heads 2, the tower here 4: set text\.heads"),
        ({"moe_blocks": 1}, r"causal_soft_moe null, .* set text\.moe_blocks"),
        ({"context_length": 9}, r"positional_embedding is \(8, 16\), expected \(9, 16\)"),
        ({"init_from": "none"}, r"text\.init_from 'none' does not exist"),
    ],
)
def test_a_text_tower_of_another_shape_is_refused(
    dual_encoder: tuple[Path, Any], changes: dict[str, Any], problem: str
) -> None:
    refused(problem, text=TINY | {"init_from": str(dual_encoder[0])} | changes)


def test_sources_without_a_text_tower_are_refused(
    classifier: tuple[Path, dict[str, Tensor]], bert: Path, tmp_path: Path
) -> None:
    save_file(classifier[1], tmp_path / "w.safetensors")
    for source, problem in (
        (classifier[0], r"has no open_clip_config\.json"),
        (bert, r"a Hugging Face model goes into text\.folder"),
        (tmp_path / "w.safetensors", "holds no text tower"),
    ):
        refused(problem, text=TINY | {"init_from": str(source)})
    refused("describes no timm model", image={"init_from": str(bert)})
