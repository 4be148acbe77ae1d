"""Runs whose text tower has Soft MoE blocks."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import Accelerator

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from eval.open_model import open_model
from tests.contrastive.test_objective import HALF, TEST, Batches, batch, fit
from training.checkpoint import load_tensors
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer

ROUTED_TEXT = TextTowerConfig(
    width=16, heads=2, layers=2, context_length=8, moe_blocks=1, num_experts=3, slot_block_size=2
)


def routed_objective() -> ContrastiveObjective:
    torch.manual_seed(0)
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(ImageTowerConfig(TEST), ROUTED_TEXT, config)
    model = build_dual_encoder(description)
    return ContrastiveObjective(model, description, config, HALF, HALF)


def test_a_routed_text_tower_trains_and_opens_again(tmp_path: Path) -> None:
    objective = routed_objective()
    start = {name: value.clone() for name, value in objective.model.state_dict().items()}
    fit(objective, tmp_path)
    layer = "text.transformer.resblocks.1.mlp"
    trained = objective.model.state_dict()
    for name in ("phi", "scale", "experts.fc1_weight", "experts.fc2_weight"):
        assert not torch.equal(trained[f"{layer}.{name}"], start[f"{layer}.{name}"]), name
    undecayed = {f"{layer}.{name}" for name in ("phi", "scale", "experts.fc1_bias")}
    assert undecayed <= objective.no_weight_decay()
    opened = open_model(str(tmp_path))
    assert all(
        torch.equal(value, trained[name]) for name, value in opened.model.state_dict().items()
    )
    assert (opened.image_size, opened.mean, opened.resize_mode) == (64, HALF, "squash")
    assert opened.tokenizer(["a cat"]).shape == (1, 8)
    tokens = batch(9)["text"]
    with torch.no_grad():
        ours = objective.model.eval().encode_text(tokens)
        assert torch.equal(opened.model.encode_text(tokens), ours)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    with pytest.raises(TypeError, match="causal_soft_moe"):
        open_clip.create_model(f"local-dir:{checkpoint}")


def test_a_run_with_a_routed_text_tower_resumes(tmp_path: Path) -> None:
    fit(routed_objective(), tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    other = routed_objective()
    other.model.text.transformer.resblocks[1].mlp.init_weights()
    trainer = Trainer(
        other, Batches(), (), TrainConfig(steps=4, batch_size=6), OptimizerConfig(),
        ScheduleConfig("constant"), Accelerator(cpu=True), tmp_path, checkpoint,
    )  # fmt: skip
    saved = load_tensors(checkpoint / other.weights_file)
    assert all(torch.equal(value, saved[name]) for name, value in other.model.state_dict().items())
    assert trainer.step == 3


def test_routed_text_blocks_need_open_clips_tower() -> None:
    text = TextTowerConfig(kind="hugging_face", folder="anywhere", moe_blocks=1)
    with pytest.raises(ValueError, match=r"text\.moe_blocks needs text\.kind open_clip"):
        model_config(ImageTowerConfig(TEST), text, ContrastiveConfig())
