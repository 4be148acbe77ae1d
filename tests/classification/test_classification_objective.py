"""The classification objective: targets, mixup, and checkpoints that timm opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from encoders.sparse_moe import TokensChoice
from training.checkpoint import CheckpointWriter

TEST = "soft_moe_vit_test_patch16_64"
CLASSES = 5


def make_objective(**settings: Any) -> ClassificationObjective:
    torch.manual_seed(0)
    config = ClassifierConfig(TEST, **settings)
    model = build_classifier(config, CLASSES)
    with torch.no_grad():
        model.head.weight.normal_()  # a fresh head is zero, which hides what the images are
    return ClassificationObjective(model, config, CLASSES)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.tensor([0, 3, 3, 1])}


def logits(objective: ClassificationObjective) -> Tensor:
    return objective.model((batch()["image"] / 255 - 0.5) / 0.5)


def test_plain_labels() -> None:
    objective = make_objective()
    loss, metrics = objective(batch())
    expected = logits(objective)
    torch.testing.assert_close(loss, F.cross_entropy(expected, batch()["label"]))
    accuracy = (expected.argmax(1) == batch()["label"]).float().mean()
    assert metrics["batch_accuracy"] == accuracy


def test_smoothing_is_torchs() -> None:
    objective = make_objective(label_smoothing=0.1)
    expected = F.cross_entropy(logits(objective), batch()["label"], label_smoothing=0.1)
    torch.testing.assert_close(objective(batch())[0], expected)


def test_sigmoid_with_soft_labels() -> None:
    objective = make_objective(loss="sigmoid")
    soft = torch.full((4, CLASSES), 0.2)
    loss, metrics = objective(batch() | {"label": soft})
    terms = F.binary_cross_entropy_with_logits(logits(objective), soft, reduction="none")
    torch.testing.assert_close(loss, terms.sum(1).mean())
    assert metrics == {}


def test_mixup_blends_pictures_and_labels_in_training_only() -> None:
    objective = make_objective(mixup=0.4)
    images, labels = (batch()["image"] / 255 - 0.5) / 0.5, F.one_hot(batch()["label"], CLASSES)
    np.random.seed(3)
    np.random.rand()  # timm first asks whether to mix at all
    share = float(np.random.beta(0.4, 0.4))
    mixed = share * images + (1 - share) * images.flip(0)
    targets = share * labels + (1 - share) * labels.flip(0)
    np.random.seed(3)
    loss, _ = objective(batch())
    torch.testing.assert_close(loss, F.cross_entropy(objective.model(mixed), targets))
    assert 0.01 < share < 0.99
    objective.eval()
    plain = F.cross_entropy(logits(objective), batch()["label"])
    torch.testing.assert_close(objective(batch())[0], plain)


def test_auxiliary_losses_of_the_model_are_added_in_training() -> None:
    objective = make_objective()
    plain = objective(batch())[1]
    assert set(plain) == {"batch_accuracy"}
    for block in objective.model.blocks:
        block.mlp = TokensChoice(objective.model.embed_dim, 4, group_size=2, noise_std=0)
    objective = ClassificationObjective(objective.model, objective.config, CLASSES)
    loss, metrics = objective(batch())
    term = metrics["auxiliary/importance"]
    assert set(metrics) == {"batch_accuracy", "auxiliary/importance"}
    assert term > 0
    assert not term.requires_grad
    task = F.cross_entropy(logits(objective), batch()["label"])
    torch.testing.assert_close(loss, task + term)
    both = [
        torch.autograd.grad(value, objective.model.blocks[0].mlp.router)[0]
        for value in (loss, task)
    ]
    assert not torch.allclose(*both, rtol=1e-3, atol=0)
    objective.eval()
    loss, metrics = objective(batch())
    torch.testing.assert_close(loss, F.cross_entropy(logits(objective), batch()["label"]))
    assert set(metrics) == {"batch_accuracy"}


@pytest.mark.parametrize("settings", [{"label_smoothing": 1.0}, {"mixup": -1}, {"cutmix": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        make_objective(**settings)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="'soft_moe_vit_huge' is unknown"):
        build_classifier(ClassifierConfig("soft_moe_vit_huge"), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 3}, "must not set num_classes"),
        ({"rooter": "soft"}, "model.arguments do not suit soft_moe_vit_test_patch16_64: .*rooter"),
        ({"router": "sotf"}, "'sotf' does not exist; did you mean soft"),
    ],
)
def test_arguments_that_do_not_suit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier(ClassifierConfig(TEST, arguments=arguments), 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (TEST, {}),
        ("test_vit", {}),
        ("test_resnet", {}),
        (TEST, {"router": "soft_uniform", "num_experts": 6}),
        (TEST, {"router": "experts_choice", "moe_blocks": "every_1"}),
        (TEST, {"router_options": {"normalize": False}, "pos_embed": "none"}),
    ],
)
def test_a_checkpoint_opens_in_timm(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(name, drop_path=0.1, arguments=arguments)
    model = build_classifier(config, CLASSES).eval()
    objective = ClassificationObjective(model, config, CLASSES)
    writer = CheckpointWriter(tmp_path, 1)
    writer.begin()
    writer.add_tensors(objective.weights_file, model.state_dict())
    for file, content in objective.config_files().items():
        writer.add_json(file, content)
    folder = writer.publish(1)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.rand(2, *size)
    with torch.no_grad():
        assert torch.equal(opened(images), model(images))
    for setting in ("input_size", "mean", "std", "interpolation", "crop_pct", "classifier"):
        saved, ours = opened.pretrained_cfg[setting], model.pretrained_cfg[setting]
        assert (tuple(saved) if isinstance(saved, list) else saved) == ours
    # Another number of classes gives a new head on the same trunk.
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2)
    assert other(images).shape == (2, 2)
