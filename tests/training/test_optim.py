"""Which parameters decay: kernels, and nothing else."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from training.config import OptimizerConfig
from training.objective import Objective
from training.optim import build_optimizer

MICRO = "soft_moe_vit_micro_patch8_64"
TEST = "soft_moe_vit_test_patch16_64"
DECAY = OptimizerConfig(weight_decay=0.25)


def groups(objective: Objective) -> tuple[set[str], set[str]]:
    """Names of the decayed parameters and of the others that are trained."""
    optimizer = build_optimizer(
        objective, {f"model.{name}" for name in objective.no_weight_decay()}, DECAY
    )
    names = {parameter: name for name, parameter in objective.named_parameters()}
    found: dict[float, set[str]] = {0.25: set(), 0.0: set()}
    for group in optimizer.param_groups:
        found[group["weight_decay"]] |= {names[p].removeprefix("model.") for p in group["params"]}
    return found[0.25], found[0.0]


def dual_encoder(
    frozen_image: bool = False, frozen_text: bool = False, loss: str = "siglip"
) -> ContrastiveObjective:
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    contrastive = ContrastiveConfig(embed_dim=8, loss="clip" if loss == "clip" else "siglip")
    description = model_config(ImageTowerConfig(TEST), text, contrastive)
    model = build_dual_encoder(description)
    half = (0.5, 0.5, 0.5)
    towers = ((model.visual.trunk, frozen_image), (model.text, frozen_text))
    frozen = tuple(tower for tower, is_frozen in towers if is_frozen)
    return ContrastiveObjective(model, description, contrastive, half, half, frozen)


def test_classifier_decays_its_kernels() -> None:
    model = timm.create_model(MICRO, num_classes=5)
    decayed, plain = groups(ClassificationObjective(model, ClassifierConfig(MICRO), 5))
    assert decayed | plain == {name for name, _ in model.named_parameters()}
    kernels = {"patch_embed.proj.weight", "head.weight"}
    for block in range(6):
        kernels |= {f"blocks.{block}.attn.{part}.weight" for part in ("qkv", "proj")}
        mlp = ("experts.fc1_weight", "experts.fc2_weight") if block > 2 else (
            "fc1.weight", "fc2.weight"
        )  # fmt: skip
        kernels |= {f"blocks.{block}.mlp.{part}" for part in mlp}
    assert decayed == kernels
    router = {"phi", "scale", "experts.fc1_bias", "experts.fc2_bias"}
    assert {f"blocks.5.mlp.{name}" for name in router} | {"pos_embed", "norm.weight"} <= plain


def test_dual_encoder_decays_its_kernels() -> None:
    decayed, plain = groups(dual_encoder())
    assert {"logit_scale", "logit_bias", "text.positional_embedding"} <= plain
    assert {"visual.trunk.pos_embed", "visual.trunk.blocks.1.mlp.phi"} <= plain
    assert {"visual.head.proj.weight", "text.token_embedding.weight"} <= decayed
    assert {"text.text_projection", "visual.trunk.blocks.1.mlp.experts.fc1_weight"} <= decayed
    forbidden = ("bias", "norm", "ln_", "pos", "phi", "logit", "scale")
    assert [name for name in decayed if any(part in name for part in forbidden)] == []


def test_frozen_towers_have_no_optimizer_state() -> None:
    decayed, plain = groups(dual_encoder(frozen_image=True, frozen_text=True))
    assert decayed == {"visual.head.proj.weight"}
    assert plain == {"logit_scale", "logit_bias"}


def test_clip_has_no_logit_bias() -> None:
    decayed, plain = groups(dual_encoder(loss="clip"))
    assert "logit_bias" not in decayed | plain


def test_position_embeddings_of_hugging_face_towers_do_not_decay() -> None:
    objective = dual_encoder()
    objective.model.text = nn.ModuleDict(
        {"position_embeddings": nn.Embedding(4, 8), "word_embeddings": nn.Embedding(4, 8)}
    )
    decayed, plain = groups(objective)
    assert "text.position_embeddings.weight" in plain
    assert "text.word_embeddings.weight" in decayed


def test_a_module_without_anything_to_train_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer(frozen, set(), DECAY)
    with pytest.raises(ValueError, match=r"unknown parameters: \['phi'\]"):
        build_optimizer(nn.Linear(2, 2), {"phi"}, DECAY)


def test_decay_is_multiplied_by_the_learning_rate() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, set(), OptimizerConfig(lr=0.1, weight_decay=0.25))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), before * (1 - 0.1 * 0.25))
