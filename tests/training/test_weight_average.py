"""Averaged weights follow a known formula, are evaluated and exported, and resume bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective
from encoders.variants import create_encoder
from tests.training.test_loop import make_trainer, metrics, outcome, quiet
from training.checkpoint import CheckpointError, load_tensors
from training.checkpoint import checkpoint_name as name_of
from training.ema import WeightAverage


def test_the_average_is_the_recursion_of_its_decay() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    average = WeightAverage(module, 0.5)
    expected = module.weight.detach().clone()
    for n in range(12):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)
    assert set(average.average) == {"weight"}
    present = module.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, present)


class Weights:
    """An evaluator that tells one weight."""

    name = "weight"

    def __call__(self, model: Any) -> dict[str, float | None]:
        return {"first": float(model[0].bias[0].detach())}


@pytest.mark.parametrize("exports", [False, True])
def test_averages_are_evaluated_exported_and_resumed(tmp_path: Path, exports: bool) -> None:
    settings: dict[str, Any] = {"ema_decay": 0.9, "ema_export": exports, "save_every": 4}
    settings |= {"keep_last": 9, "eval_every": 4, "evaluators": (Weights(),)}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trainer = make_trainer(whole, **settings)
    figures = trainer.fit()
    shutil.copytree(whole, resumed)
    middle = resumed / "checkpoints" / name_of(4)
    make_trainer(resumed, resume=middle, **settings).fit()
    assert outcome(resumed) == outcome(whole)
    assert metrics(resumed, "eval") == metrics(whole, "eval")
    plain = make_trainer(tmp_path / "plain", save_every=4)
    plain.fit()  # averaging changes nothing else
    one, two = plain.objective.model.state_dict(), trainer.objective.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    final = whole / "checkpoints" / name_of(12)
    opened = load_tensors(final / "model.safetensors")["0.bias"]
    assert trainer.average is not None
    averaged = trainer.average.average["0.bias"]
    assert torch.equal(opened, averaged if exports else one["0.bias"])
    assert figures["weight/first"] == float(one["0.bias"][0])
    assert figures["ema/weight/first"] == float(averaged[0]) != figures["weight/first"]


def test_a_checkpoint_without_averages_is_explained(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4).fit()
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        make_trainer(tmp_path, resume=tmp_path / "checkpoints" / name_of(4), ema_decay=0.9)


def test_compiled_training_learns_the_same(tmp_path: Path) -> None:
    make_trainer(tmp_path / "eager", quiet, steps=3, log_routing=False).fit()
    make_trainer(
        tmp_path / "compiled", quiet, steps=3, log_routing=False, compile="aot_eager"
    ).fit()
    for one, two in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert two.pop("skipped_reasons", None) == one.pop("skipped_reasons", None)
        assert two == pytest.approx(one, rel=1e-5)
    names = [
        set(load_tensors(tmp_path / run / "checkpoints" / name_of(3) / "model.safetensors"))
        for run in ("eager", "compiled")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("router", ["soft", "tokens_choice"])
def test_gradient_checkpointing_has_the_same_loss_and_gradients(router: str) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        name = "soft_moe_vit_test_patch16_64"
        model = create_encoder(name, {"router": router}, num_classes=3)
        objective = ClassificationObjective(model, ClassifierConfig(name), 3)
        if checkpointing:
            objective.checkpoint_gradients()
        nn.init.normal_(model.head.weight)
        objective.wants_details = True
        torch.manual_seed(1)
        images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
        loss, found = objective({"image": images, "label": torch.arange(8) % 3})
        loss.backward()
        results.append((loss.detach(), found, [p.grad for p in objective.parameters()]))
    (loss, found, gradients), (other_loss, other_found, others) = results
    assert torch.equal(loss, other_loss)
    assert found.keys() == other_found.keys()
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one)
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_models_without_gradient_checkpointing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing: Layers does not offer it"):
        make_trainer(tmp_path, gradient_checkpointing=True)
