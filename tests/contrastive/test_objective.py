"""The contrastive objective: frozen towers, logit scale, and checkpoints that open_clip opens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import open_clip
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from contrastive.objective import ContrastiveObjective
from encoders.sparse_moe import TokensChoice
from encoders.variants import input_size
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)


def batch(seed: int = 0, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 49000, (size, 8), generator=generator),
    }


def make_objective(
    loss: Literal["clip", "siglip"] = "clip", frozen: tuple[str, ...] = (), **contrastive: Any
) -> ContrastiveObjective:
    torch.manual_seed(0)
    image = ImageTowerConfig(TEST, drop_path=0.3, patch_dropout=0.3)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    config = ContrastiveConfig(embed_dim=8, loss=loss, **contrastive)
    description = model_config(image, text, config)
    model = build_dual_encoder(description)
    parts = tuple(model.get_submodule(name) for name in frozen)
    return ContrastiveObjective(model, description, config, HALF, HALF, parts)


class Batches:
    """An endless stream of `batch`."""

    def __len__(self) -> int:
        return 6

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Any:
        step = start_step
        while True:
            yield batch(step)
            step += 1


def fit(objective: ContrastiveObjective, run_dir: Path, lr: float = 0.01) -> None:
    run_dir.mkdir(exist_ok=True)
    Trainer(
        objective, Batches(), (), TrainConfig(steps=3, batch_size=6),
        OptimizerConfig(lr=lr, weight_decay=0.5), ScheduleConfig("constant"),
        Accelerator(cpu=True), run_dir,
    ).fit()  # fmt: skip


@pytest.mark.parametrize("tower", ["visual.trunk", "text"])
def test_a_frozen_tower_stays_as_it_is(tmp_path: Path, tower: str) -> None:
    objective = make_objective("siglip", (tower,))
    frozen = objective.model.get_submodule(tower)
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    objective.train()
    assert objective.model.training
    assert not any(module.training for module in frozen.modules())
    loss, _ = objective(batch())
    loss.backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    objective.zero_grad()
    fit(objective, tmp_path)
    for name, value in objective.model.state_dict().items():
        changed = not torch.equal(value, before[name])
        assert changed != name.startswith(f"{tower}."), name
    assert "visual.head.proj.weight" in before  # the projection on a frozen trunk is trained


def flops_of_a_step(objective: ContrastiveObjective, cached: tuple[str, ...] = ()) -> float:
    """Counted for one sample of a real batch, forward and backward through both towers."""
    found = batch(size=2)
    images, texts = objective.normalize(found["image"]), found["text"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = objective.model(
            None if "image" in cached else images, None if "text" in cached else texts
        )
        results = [features[f"{side}_features"] for side in ("image", "text") if side not in cached]
        torch.stack([one.sum() for one in results]).sum().backward()
    objective.zero_grad()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("frozen", [(), ("visual.trunk",), ("text.transformer",)])
def test_the_operations_of_a_step_are_those_that_are_done(
    frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real experts on a CPU run in blocks, which are not counted.
    monkeypatch.setattr("encoders.experts.can_run_blocked", lambda *_: False)
    objective = make_objective(frozen=frozen)
    before = torch.get_rng_state()
    flops = objective.training_flops()
    assert torch.equal(torch.get_rng_state(), before)
    assert flops == flops_of_a_step(objective)


def test_towers_with_cached_embeddings_cost_nothing() -> None:
    objective = make_objective(frozen=("visual.trunk",))
    objective.cached = frozenset({"image"})
    flops = objective.training_flops()
    assert flops == flops_of_a_step(objective, ("image",))
    assert flops is not None
    assert flops < 0.5 * flops_of_a_step(make_objective(frozen=("visual.trunk",)))


def test_a_run_tells_the_use_of_the_device_where_its_peak_is_known(tmp_path: Path) -> None:
    for name, peak in (("known", 0.5), ("unknown", 0.0)):
        objective = make_objective("siglip")
        (tmp_path / name).mkdir()
        train = TrainConfig(steps=2, batch_size=6, log_every=1, peak_tflops=peak)
        Trainer(
            objective, Batches(), (), train, OptimizerConfig(), ScheduleConfig(),
            Accelerator(cpu=True), tmp_path / name,
        ).fit()  # fmt: skip
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        row = json.loads(lines[-1])
        assert row["samples_per_second"] > 0
        assert ("mfu" in row, "tflops" in row) == (bool(peak), bool(peak))
        if peak:
            flops = objective.training_flops()
            assert flops is not None
            assert row["tflops"] == pytest.approx(
                1e-12 * flops * row["samples_per_second"], rel=0.01, abs=1e-4
            )


def test_auxiliary_losses_of_both_towers_are_added_in_training() -> None:
    model = make_objective().model
    plain = make_objective()
    names = {"batch_accuracy", "batch_accuracy_text", "positive_logit", "negative_logit"}
    assert set(plain(batch())[1]) == names | {"logit_scale"}
    trunk = model.visual.trunk
    trunk.blocks[-1].mlp = TokensChoice(trunk.embed_dim, 4, group_size=2, noise_std=0)
    routed = TokensChoice(16, 4, group_size=2, noise_std=0)
    model.text.ln_final = torch.nn.Sequential(model.text.ln_final, routed)

    def term(frozen: tuple[Any, ...]) -> Tensor:
        objective = ContrastiveObjective(
            model, plain.model_config, plain.config, HALF, HALF, frozen
        )  # fmt: skip
        torch.manual_seed(0)
        loss, metrics = objective(batch())
        torch.manual_seed(0)
        pixels = objective.normalize(batch()["image"])
        features = model(pixels, batch()["text"])
        task, _ = objective.loss(features, {})
        torch.testing.assert_close(loss, task + metrics["auxiliary/importance"])
        return metrics["auxiliary/importance"]

    both, image_alone, text_alone = term(()), term((model.text,)), term((trunk,))
    assert min(image_alone, text_alone) > 0
    torch.testing.assert_close(both, image_alone + text_alone)


def test_settings_freeze_what_was_pretrained() -> None:
    model = make_objective().model
    image = ImageTowerConfig(TEST, init_from="runs/pretrain", frozen=True)
    text = TextTowerConfig(kind="hugging_face", frozen=True)
    assert frozen_parts(model, image, text) == (model.visual.trunk, model.text.transformer)
    assert frozen_parts(model, ImageTowerConfig(TEST), TextTowerConfig()) == ()


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (ImageTowerConfig(TEST, frozen=True), TextTowerConfig(), "set image.init_from"),
        (
            ImageTowerConfig(TEST),
            TextTowerConfig(frozen=True),
            "set text.init_from to an open_clip",
        ),
    ],
)
def test_frozen_noise_is_refused(
    image: ImageTowerConfig, text: TextTowerConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_config(image, text, ContrastiveConfig())


def test_initial_scale_and_bias() -> None:
    clip, siglip = make_objective("clip").model, make_objective("siglip").model
    assert float(clip.logit_scale.exp().detach()) == pytest.approx(1 / 0.07)
    assert clip.logit_bias is None
    assert float(siglip.logit_scale.exp().detach()) == pytest.approx(10)
    assert float(siglip.logit_bias.detach()) == -10
    chosen = make_objective("siglip", logit_scale=2.0, logit_bias=0.0).model
    assert float(chosen.logit_scale.exp().detach()) == pytest.approx(2)
    assert float(chosen.logit_bias.detach()) == 0


def test_a_bias_for_the_batch_weighs_positives_and_negatives_alike() -> None:
    config = ContrastiveConfig(embed_dim=8, loss="siglip", logit_bias="batch")
    found = model_config(ImageTowerConfig(TEST), TextTowerConfig(), config, batch_size=512)
    bias = torch.tensor(found["init_logit_bias"])
    torch.testing.assert_close((-bias).sigmoid(), 511 * bias.sigmoid())
    with pytest.raises(ValueError, match="batch of two pairs at least, got 1"):
        model_config(ImageTowerConfig(TEST), TextTowerConfig(), config, batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale must be positive, got 0"),
        ({"logit_scale": -1.0}, "logit_scale must be positive"),
        ({"max_logit_scale": -1.0}, "max_logit_scale must not be negative"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1"),
        ({"tile_rows": 0}, "tile_rows must be at least 1, got 0"),
        ({"logit_bias": "batch"}, "batch of two pairs at least, got None"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective("siglip", **settings)


def test_unknown_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="'soft_moe_vit_huge' is unknown"):
        model_config(ImageTowerConfig("soft_moe_vit_huge"), TextTowerConfig(), ContrastiveConfig())
    assert input_size(TEST) == 64


@pytest.mark.parametrize(("limit", "expected"), [(100.0, math.log(100)), (0.0, 9.0)])
def test_the_logit_scale_is_clamped_after_a_step(limit: float, expected: float) -> None:
    objective = make_objective(max_logit_scale=limit)
    with torch.no_grad():
        objective.model.logit_scale.fill_(9.0)
    objective.after_step()
    assert float(objective.model.logit_scale.detach()) == pytest.approx(expected)


def test_metrics_describe_the_batch() -> None:
    objective = make_objective("siglip").eval()
    loss, metrics = objective(batch())
    features = objective.model(objective.normalize(batch()["image"]), batch()["text"])
    similar = features["image_features"] @ features["text_features"].T
    accuracy = (similar.argmax(1) == torch.arange(6)).float().mean()
    assert metrics["batch_accuracy"] == accuracy
    torch.testing.assert_close(metrics["positive_logit"], 10 * similar.diagonal().mean() - 10)
    others = similar[~torch.eye(6, dtype=torch.bool)].mean()
    torch.testing.assert_close(metrics["negative_logit"], 10 * others - 10)
    assert float(metrics["logit_scale"]) == pytest.approx(10)
    assert float(metrics["logit_bias"]) == -10
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_a_group_mark_changes_the_loss() -> None:
    objective = make_objective().eval()
    plain, _ = objective(batch())
    marked, _ = objective(batch() | {"group": torch.tensor([1, 1, 2, 3, 4, 5])})
    assert marked < plain
    objective.config.same_group = "positive"
    spread, _ = objective(batch() | {"group": torch.tensor([1, 1, 2, 3, 4, 5])})
    assert spread not in (plain, marked)


def test_weights_of_samples_change_the_loss() -> None:
    objective = make_objective().eval()
    plain, _ = objective(batch())
    ones, _ = objective(batch() | {"weight": torch.ones(6)})
    halves, _ = objective(batch() | {"weight": torch.full((6,), 0.5)})
    torch.testing.assert_close(torch.stack([ones, 2 * halves]), torch.stack([plain, plain]))


def test_the_clip_loss_does_not_go_round_a_ring() -> None:
    with pytest.raises(ValueError, match="ring serves the siglip loss alone: set it to gather"):
        make_objective("clip", exchange="ring")
    ring, gathered = (
        make_objective("siglip", exchange=exchange).eval()(batch())[0]
        for exchange in ("ring", "gather")
    )
    assert torch.equal(ring, gathered)


def test_features_of_zero_train_nothing_and_break_nothing() -> None:
    objective = make_objective()
    with torch.no_grad():
        objective.model.visual.head.proj.weight.zero_()
    loss, _ = objective(batch())
    loss.backward()
    assert loss.isfinite()
    assert not objective.model.visual.head.proj.weight.grad.any()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_a_broken_feature_is_named_when_asked() -> None:
    objective = make_objective(check_features=True).eval()
    objective(batch())
    objective.normalize = torch.nn.Identity()
    pixels = torch.rand(6, 3, 64, 64)
    pixels[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"image features are not finite in 1 of 6 rows, .* row 2"):
        objective(batch() | {"image": pixels})
    objective.config.check_features = False
    assert torch.isnan(objective(batch() | {"image": pixels})[0])


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_checkpoint_opens_in_open_clip(tmp_path: Path, loss: Literal["clip", "siglip"]) -> None:
    objective = make_objective(loss)
    fit(objective, tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    opened = open_clip.create_model(f"local-dir:{checkpoint}").eval()
    ours = objective.model.eval()
    example = batch(9)
    pixels = objective.normalize(example["image"])
    with torch.no_grad():
        assert torch.equal(opened.encode_image(pixels), ours.encode_image(pixels))
        assert torch.equal(opened.encode_text(example["text"]), ours.encode_text(example["text"]))
    for name, value in ours.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    assert open_clip.get_tokenizer(f"local-dir:{checkpoint}")(["a cat"]).shape == (1, 8)
    assert opened.visual.preprocess_cfg["mean"] == list(HALF)
    assert (
        "custom_text" in json.loads((checkpoint / "open_clip_config.json").read_text())["model_cfg"]
    )
