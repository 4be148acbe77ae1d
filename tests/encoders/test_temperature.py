"""Temperatures: their values, their state, and the way of the training step to a schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from contrastive.objective import ContrastiveObjective
from encoders.temperature import (
    FixedTemperature,
    LearnedTemperature,
    ScheduledTemperature,
    build_temperature,
    changing_temperatures,
    set_training_step,
    temperature_metrics,
)
from encoders.token_mixture import TokenMixture
from training.checkpoint import load_tensors
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer

TEST = "soft_moe_vit_test_patch16_64"
SCHEDULE = {"start": 2.0, "minimum": 0.5, "decay": 0.5, "every": 2}
HALF = (0.5, 0.5, 0.5)


def routed(temperature: Any) -> TokenMixture:
    """What takes the MLP's place in the routed block of the test models."""
    return TokenMixture(32, 4, 8, temperature=temperature)


def classifier(temperature: Any) -> ClassificationObjective:
    torch.manual_seed(0)
    model = build_classifier(ClassifierConfig(TEST), 3)
    model.blocks[1].mlp = routed(temperature)
    return ClassificationObjective(model, ClassifierConfig(TEST), 3)


class Pictures:
    """Batches that depend on the step only."""

    def __len__(self) -> int:
        return 4

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Any:
        step = start_step
        while True:
            draw = torch.Generator().manual_seed(step)
            images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=draw)
            yield {"image": images, "label": torch.tensor([0, 1, 2, 1])}
            step += 1


def fit(
    objective: ClassificationObjective, run_dir: Path, steps: int, resume: Path | None = None
) -> dict[str, Tensor]:
    """Train and return the weights of the last checkpoint."""
    run_dir.mkdir(exist_ok=True)
    train = TrainConfig(steps=steps, batch_size=4, log_every=1, save_every=3)
    Trainer(
        objective, Pictures(), (), train, OptimizerConfig(lr=0.01), ScheduleConfig("constant"),
        Accelerator(cpu=True), run_dir, resume,
    ).fit()  # fmt: skip
    return load_tensors(run_dir / "checkpoints" / f"step_{steps:08d}" / "model.safetensors")


def test_logits_are_divided() -> None:
    logits = torch.tensor([3.0, -1.0])
    assert build_temperature(2.0)(logits).tolist() == [1.5, -0.5]
    assert build_temperature(float("inf"))(logits).tolist() == [0.0, 0.0]
    learned = LearnedTemperature()
    assert torch.equal(learned(logits), logits)
    learned.log_value.data.fill_(0.5)
    torch.testing.assert_close(learned(logits), logits / torch.tensor(0.5).exp())
    assert learned(logits.double()).dtype == torch.float64


def test_a_learned_temperature_is_trained() -> None:
    learned = LearnedTemperature()
    learned(torch.tensor(3.0)).backward()
    assert learned.log_value.grad is not None
    assert learned.log_value.grad.item() == -3.0  # d (z exp(-t)) / dt at t = 0


def test_a_schedule_decays_to_its_minimum() -> None:
    schedule = build_temperature(SCHEDULE)
    values = []
    for step in (0, 1, 2, 4, 5, 1_000_000):
        set_training_step(changing_temperatures(schedule), step)
        values.append(schedule.value().item())
    assert values == pytest.approx([2.0, 2 * 0.5**0.5, 1.0, 0.5, 0.5, 0.5])
    recipe = ScheduledTemperature(1.0, 0.1, 0.99, 100)
    set_training_step(changing_temperatures(recipe), 12_345)
    assert recipe.value().item() == pytest.approx(0.99**123.45, rel=1e-5)


def test_the_step_is_saved_with_the_model() -> None:
    first, second = build_temperature(SCHEDULE), build_temperature(SCHEDULE)
    set_training_step(changing_temperatures(first), 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.value(), first.value())
    second.reset_parameters()
    assert second.value().item() == 2.0


def test_eval_mode_keeps_the_step() -> None:
    model = nn.ModuleList([build_temperature(SCHEDULE), build_temperature(SCHEDULE).eval()])
    set_training_step(changing_temperatures(model), 2)
    assert [temperature.value().item() for temperature in model] == [1.0, 2.0]


def test_metrics_name_what_changes() -> None:
    model = nn.ModuleDict(
        {"a": routed(1.0), "b": routed("learned"), "c": routed(SCHEDULE)}
    )  # fmt: skip
    metrics = temperature_metrics(changing_temperatures(model))
    assert set(metrics) == {"temperature/b.temperature", "temperature/c.temperature"}
    assert [value.item() for value in metrics.values()] == [1.0, 2.0]
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (0.0, "must be positive, got 0"),
        (-1.0, "must be positive"),
        (float("nan"), "must be positive, got nan"),
        ("learn", "give a number, 'learned', or a schedule"),
        ({"start": 1.0}, "give start and minimum"),
        ({"start": 1.0, "minimum": 0.1, "rate": 2}, "is no schedule"),
        ({"start": 0.0, "minimum": 0.1}, "start must be positive"),
        ({"start": 1.0, "minimum": 0.0}, "minimum must be positive"),
        ({"start": 1.0, "minimum": 0.1, "decay": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"start": 1.0, "minimum": 0.1, "every": 0}, "every must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        build_temperature(settings)


def test_settings_describe_the_temperature() -> None:
    kinds = [type(build_temperature(settings)) for settings in (0.7, "learned", SCHEDULE)]
    assert kinds == [FixedTemperature, LearnedTemperature, ScheduledTemperature]


def test_the_loop_advances_a_schedule_and_logs_it(tmp_path: Path) -> None:
    weights = fit(classifier(SCHEDULE), tmp_path, 4)
    assert weights["blocks.1.mlp.temperature.step"].item() == 3  # of the latest update
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [row["temperature/blocks.1.mlp.temperature"] for row in rows]
    assert logged == pytest.approx([2.0, 2 * 0.5**0.5, 1.0, 0.5**0.5])


def test_a_training_step_does_not_search_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = classifier(SCHEDULE)
    monkeypatch.delattr(nn.Module, "named_modules")  # what every search of a model goes through
    objective.before_step(2)
    labels = torch.tensor([0, 1])
    _, metrics = objective({"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "label": labels})
    assert metrics["temperature/blocks.1.mlp.temperature"].item() == 1.0


@pytest.mark.parametrize("temperature", [SCHEDULE, "learned"])
def test_a_resumed_run_has_the_same_temperature(tmp_path: Path, temperature: Any) -> None:
    unbroken = fit(classifier(temperature), tmp_path / "a", 6)
    fit(classifier(temperature), tmp_path / "b", 3)
    start = tmp_path / "b" / "checkpoints" / "step_00000003"
    resumed = fit(classifier(temperature), tmp_path / "b", 6, start)
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())
    step = unbroken.get("blocks.1.mlp.temperature.step")
    trained = unbroken.get("blocks.1.mlp.temperature.log_value")
    assert (step is not None and step == 5) or (trained is not None and trained != 0)


def test_a_frozen_tower_keeps_its_temperature() -> None:
    image = ImageTowerConfig(TEST, init_from="runs/pretrain", frozen=True)
    text = TextTowerConfig(width=32, heads=2, layers=1, context_length=8)
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(image, text, config)
    model = build_dual_encoder(description)
    model.visual.trunk.blocks[1].mlp = routed(SCHEDULE)
    set_training_step(changing_temperatures(model.visual), 4)
    head = model.visual.head
    head.add_module("temperature", build_temperature(SCHEDULE))
    frozen = frozen_parts(model, image, text)
    objective = ContrastiveObjective(model, description, config, HALF, HALF, frozen)
    objective.before_step(0)
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    _, metrics = objective({"image": images, "text": torch.ones(2, 8, dtype=torch.int64)})
    assert metrics["temperature/visual.trunk.blocks.1.mlp.temperature"].item() == 0.5
    assert metrics["temperature/visual.head.temperature"].item() == 2.0
