"""Rules by pattern, the paper's recipe, and optimizers that continue bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from encoders.variants import create_encoder
from scripts.cli import parse_config
from scripts.pretrain import PretrainRun
from training.checkpoint import load_optimizer_tensors, optimizer_tensors
from training.config import OptimizerConfig, ParameterRule
from training.optim import build_optimizer

PRESET = Path(__file__).parents[2] / "configs" / "pretrain_soft_s16.yaml"
REST = ParameterRule(".*")


def settings_of(objective: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Decay and learning-rate factor of every trained parameter."""
    no_decay = {f"model.{name}" for name in objective.no_weight_decay()}
    optimizer = build_optimizer(objective, no_decay, config, torch.device("cpu"))
    names = {parameter: name.removeprefix("model.") for name, parameter in
             objective.named_parameters()}  # fmt: skip
    return {
        names[parameter]: (group["weight_decay"], group["lr_factor"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def classifier(
    name: str = "soft_moe_vit_test_patch16_64", **options: Any
) -> ClassificationObjective:
    model = create_encoder(name, options, num_classes=3)
    return ClassificationObjective(model, ClassifierConfig(name), 3)


def test_the_preset_has_the_decays_of_the_paper() -> None:
    config = parse_config(PretrainRun, [f"--config={PRESET}"], "")
    with torch.device("meta"):
        objective = classifier(config.model.name)
    found = settings_of(objective, config.optimizer)
    assert len(found) == len(list(objective.parameters()))
    expected = {}
    for name in found:
        last = name.rpartition(".")[2]
        kernel = last in ("weight", "fc1_weight", "fc2_weight") and "norm" not in name
        expected[name] = 0.03 if kernel or name.endswith("mlp.scale") else 0.0
    expected["head.weight"] = 3.0
    assert {name: decay for name, (decay, _) in found.items()} == expected
    assert {name for name in found if name.endswith("phi")}
    assert {factor for _, factor in found.values()} == {1.0}


def test_the_first_rule_that_matches_counts() -> None:
    rules = [ParameterRule("head.*", lr=10), ParameterRule(".*norm.*", weight_decay=0.5), REST]
    found = settings_of(classifier(), OptimizerConfig(weight_decay=0.25, rules=rules))
    assert found["head.weight"] == (0.25, 10)
    assert found["head.bias"] == (0.0, 10)
    assert found["blocks.0.norm1.weight"] == (0.5, 1)
    assert found["blocks.1.mlp.phi"] == (0.0, 1)


def test_rules_freeze() -> None:
    objective = classifier()
    rules = [ParameterRule(r"blocks\.0\..*|pos_embed", freeze=True), REST]
    found = settings_of(objective, OptimizerConfig(rules=rules))
    frozen = {
        n.removeprefix("model.") for n, p in objective.named_parameters() if not p.requires_grad
    }
    assert frozen == {n for n, _ in objective.model.named_parameters()} - set(found)
    assert "pos_embed" in frozen
    assert all(name == "pos_embed" or name.startswith("blocks.0.") for name in frozen)


@pytest.mark.parametrize(
    ("options", "phi", "scale"),
    [
        ({}, {"blocks.1.mlp.phi"}, {"blocks.1.mlp.scale"}),
        ({"router": "experts_choice"}, {"blocks.1.mlp.router"}, set()),
        ({"router": "token_mixture"}, {"blocks.1.mlp.scores.embedding"}, set()),
    ],
)
def test_routed_layers_have_rules_of_their_own(
    options: dict[str, Any], phi: set[str], scale: set[str]
) -> None:
    rules = [
        ParameterRule(group="experts", weight_decay=0.1, lr=0.5),
        ParameterRule(group="phi", weight_decay=0.2),
        *([ParameterRule(group="scale", weight_decay=0.3)] if scale else []),
        REST,
    ]
    found = settings_of(classifier(**options), OptimizerConfig(weight_decay=0.4, rules=rules))
    bank = [f"blocks.1.mlp.experts.fc{n}_{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    assert {name for name, got in found.items() if got == (0.1, 0.5)} == set(bank)
    assert {name for name, got in found.items() if got == (0.2, 1)} == phi
    assert {name for name, got in found.items() if got == (0.3, 1)} == scale
    assert found["blocks.0.mlp.fc1.weight"] == (0.4, 1)


def test_experts_of_the_text_tower_are_of_the_same_group() -> None:
    text = TextTowerConfig(
        width=16, heads=2, layers=2, context_length=8, moe_blocks=1, num_experts=4
    )
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(ImageTowerConfig("soft_moe_vit_test_patch16_64"), text, config)
    half = (0.5, 0.5, 0.5)
    model = build_dual_encoder(description)
    objective = ContrastiveObjective(model, description, config, half, half)
    rules = [ParameterRule(group="experts", freeze=True), REST]
    settings_of(objective, OptimizerConfig(rules=rules))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 8
    assert {name.split(".")[0] for name in frozen} == {"text", "visual"}


def test_a_routed_layer_has_a_stochastic_depth_of_its_own() -> None:
    model: Any = classifier(drop_path_rate=0.4, routed_drop_path_rate=0.0).model
    dense, routed = model.blocks
    assert isinstance(routed.drop_path2, nn.Identity)
    assert routed.drop_path1.drop_prob == pytest.approx(0.4)
    more: Any = classifier(routed_drop_path_rate=0.25).model
    assert [type(block.drop_path2) for block in more.blocks] == [nn.Identity, DropPath]
    assert more.blocks[1].drop_path2.drop_prob == 0.25
    assert isinstance(dense.drop_path2, nn.Identity)
    with pytest.raises(ValueError, match=r"routed_drop_path_rate=1\.0 must be in"):
        classifier(routed_drop_path_rate=1.0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([ParameterRule("head.*")], "not pos_embed, .*: add a rule for them"),
        ([ParameterRule("heads.*"), REST], r"match no trained parameter .*\['heads\.\*'\]"),
        ([REST, ParameterRule("head.*")], r"that an earlier rule leaves: \['head\.\*'\]"),
        ([ParameterRule("("), REST], r"optimizer\.rules '\('"),
        ([ParameterRule(".*", weight_decay=-1)], "not negative"),
        ([ParameterRule(group="experts", match="a"), REST], "give each a match or a group"),
        ([ParameterRule(), REST], "give each a match or a group"),
        ([REST, ParameterRule(group="phi")], r"leaves: \['group phi'\]"),
        ([ParameterRule(".*", freeze=True)], "every parameter is frozen"),
    ],
)
def test_unusable_rules_are_refused(rules: list[ParameterRule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(classifier(), OptimizerConfig(rules=rules))


def test_rules_and_factors_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="not both"):
        settings_of(classifier(), OptimizerConfig(rules=[REST], lr_factors={".*": 2}))


class Small(nn.Module):
    """A bank of three axes, a matrix, an embedding and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(5, 8), nn.Linear(8, 16)
        self.bank = nn.Parameter(torch.randn(3, 16, 4) / 4)

    def forward(self) -> torch.Tensor:
        rows = self.linear(self.table(torch.arange(5)))
        return (torch.einsum("nd,edh->enh", rows, self.bank) - 1).square().mean()


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
        loss = module()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "muon"])
def test_every_optimizer_learns_and_continues_bit_for_bit(kind: Any) -> None:
    config = OptimizerConfig(kind, lr=0.01)
    module, other = Small(), Small()
    optimizer, fresh = build_optimizer(module, set(), config), build_optimizer(other, set(), config)
    first = advance(module, optimizer, 3)
    other.load_state_dict(module.state_dict())
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, module).items()}
    load_optimizer_tensors(fresh, other, saved)
    assert advance(module, optimizer, 4) == advance(other, fresh, 4) < first
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_muon_turns_matrices_only() -> None:
    module = Small()
    optimizer = build_optimizer(module, set(), OptimizerConfig("muon", lr=0.01))
    advance(module, optimizer, 1)
    turned = {
        name
        for name, parameter in module.named_parameters()
        if "momentum_buffer" in optimizer.state[parameter]
    }
    assert turned == {"linear.weight"}
