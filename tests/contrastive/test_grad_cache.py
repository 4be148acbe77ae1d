"""Gradient caching: the gradient of a split batch is that of the whole one, for every parameter.

Several processes are in `test_distributed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from contrastive import grad_cache
from contrastive.cached_towers import tower_fingerprint
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from encoders.sparse_moe import TokensChoice
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.finite import NonFiniteError
from training.loop import Trainer
from training.objective import Batch, Metrics, split_batch

ROOT = Path(__file__).parents[2]
WORLD, BATCH = 2, 8
HALF = (0.5, 0.5, 0.5)
LOSSES: tuple[Literal["clip", "siglip"], ...] = ("clip", "siglip")
SPLITS = (1, 2, 4)


class ToUnit(nn.Module):
    """Pixels to [0, 1] in float64."""

    def forward(self, images: Tensor) -> Tensor:
        return images.double() / 255


def make_objective(
    loss: Literal["clip", "siglip"] = "clip", noise: float = 0.0, routed: bool = False
) -> ContrastiveObjective:
    """In float64; `noise` is the rate of stochastic depth, patch dropout and text dropout."""
    torch.manual_seed(0)
    image = ImageTowerConfig("soft_moe_vit_test_patch16_64", drop_path=noise, patch_dropout=noise)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    # A small scale and no bias keep the loss away from zero, where gradients lose their digits.
    config = ContrastiveConfig(embed_dim=8, loss=loss, logit_scale=5.0, logit_bias=-1.0)
    description = model_config(image, text, config)
    model = build_dual_encoder(description)
    model.text.ln_final = nn.Sequential(model.text.ln_final, nn.Dropout(noise))
    if routed:
        trunk = model.visual.trunk
        trunk.blocks[-1].mlp = TokensChoice(trunk.embed_dim, 4, group_size=2, noise_std=0)
        model.text.ln_final.append(TokensChoice(16, 4, group_size=2, noise_std=0))
    model.double()
    objective = ContrastiveObjective(model, description, config, HALF, HALF)
    objective.normalize = ToUnit()
    return objective


def make_batch(seed: int = 3, size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 49000, (size, 8), generator=generator),
        "group": torch.tensor([1, 2, 1, 3, 4, 2, 5, 6])[:size],  # marks repeat between the parts
    }


class Batches:
    """An endless stream of `make_batch`."""

    def __init__(self, size: int = BATCH) -> None:
        self.size = size

    def __len__(self) -> int:
        return BATCH

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        step = start_step
        while True:
            yield make_batch(step, self.size)
            step += 1


def make_trainer(
    objective: ContrastiveObjective,
    run_dir: Path,
    stream: Batches | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Trainer:
    run_dir.mkdir(exist_ok=True, parents=True)
    train = TrainConfig(**{"steps": 4, "batch_size": BATCH, "log_every": 1} | settings)
    return Trainer(
        objective, stream or Batches(), (), train, OptimizerConfig(clip_norm=0.5),
        ScheduleConfig("constant"), Accelerator(cpu=True), run_dir, resume,
    )  # fmt: skip


def collect(objective: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; takes them away."""
    found = {
        name: parameter.grad
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }
    objective.zero_grad()
    return found


def whole(objective: ContrastiveObjective) -> dict[str, Tensor]:
    loss, _ = objective(make_batch())
    loss.backward()
    return collect(objective) | {"loss": loss.detach()}


def in_parts(
    objective: ContrastiveObjective, parts: list[Batch]
) -> tuple[dict[str, Tensor], list[Metrics]]:
    losses = []
    metrics = []
    for loss, some in objective.part_losses(objective, parts):
        (loss / len(parts)).backward()
        losses.append(loss.detach())
        metrics.append(some)
    return collect(objective) | {"loss": torch.stack(losses).mean()}, metrics


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-12 of the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-2
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-12, atol=1e-12 * largest, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (1, 3, 4)])
def test_parts_have_the_gradient_of_the_whole_batch(
    loss: Literal["clip", "siglip"], sizes: tuple[int, ...]
) -> None:
    objective = make_objective(loss)
    batch = make_batch()
    columns = {name: value.split(sizes) for name, value in batch.items()}
    parts = [{name: columns[name][n] for name in batch} for n in range(len(sizes))]
    found, metrics = in_parts(objective, parts)
    expected = whole(objective)
    check(found, expected)
    _, single = objective(batch)
    assert all(set(some) == set(single) for some in metrics)
    assert all(some["batch_accuracy"] == single["batch_accuracy"] for some in metrics)


def one_after_the_other(objective: ContrastiveObjective, parts: list[Batch]) -> dict[str, Tensor]:
    """The whole batch with the random numbers of the parts, and all graphs at once in memory."""
    recorded: list[dict[str, Tensor]] = []

    def keep(features: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        recorded.append(features)
        return torch.zeros(()), {}

    for part in parts:
        objective(part, keep)
    rows = {name: torch.cat([features[name] for features in recorded]) for name in grad_cache.ROWS}
    loss, _ = objective.loss(recorded[0] | rows, make_batch())
    loss.backward()
    return collect(objective) | {"loss": loss.detach()}


@pytest.mark.parametrize("count", [2, 4])
def test_random_numbers_repeat(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_objective(noise=0.3)
    parts = split_batch(make_batch(), count)
    torch.manual_seed(5)
    expected = one_after_the_other(objective, parts)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found, _ = in_parts(objective, parts)
    check(found, expected)
    assert torch.equal(torch.get_rng_state(), after)

    monkeypatch.setattr(grad_cache, "_random_state", lambda _: lambda: None)
    torch.manual_seed(5)
    found, _ = in_parts(objective, parts)
    with pytest.raises(AssertionError):
        check(found, expected)


def test_auxiliary_losses_are_counted_once() -> None:
    objective = make_objective(routed=True)
    _, single = objective(make_batch())
    found, metrics = in_parts(objective, split_batch(make_batch(), 4))
    check(found, whole(objective))
    mean = torch.stack([some["auxiliary/importance"] for some in metrics]).mean()
    torch.testing.assert_close(mean, single["auxiliary/importance"], rtol=1e-12, atol=0)
    assert mean > 0
    objective.zero_grad()


def test_activations_of_one_part_are_kept() -> None:
    objective = make_objective()

    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def saved(call: Callable[[], object]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = call()  # its graph holds the storages until the count is done
        assert kept is not None
        return sum(sizes.values())

    at_once = saved(lambda: objective(make_batch()))
    losses = objective.part_losses(objective, split_batch(make_batch(), 8))
    assert 0 < saved(lambda: next(losses)) < 0.2 * at_once


def test_a_run_in_parts_resumes_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files(run_dir: Path) -> dict[str, bytes]:
        final = run_dir / "checkpoints" / "step_00000004"
        # The manifest tells the wall time; what it lists is compared itself.
        listed = (p for p in final.rglob("*") if p.is_file() and p.name != "manifest.json")
        return {p.name: p.read_bytes() for p in listed}

    settings: dict[str, Any] = {"accumulation": 4, "save_every": 2, "keep_last": 9}
    make_trainer(make_objective(noise=0.3), tmp_path / "a", **settings).fit()
    assert "gradient caching; negatives of each pair are the global batch's 7" in (
        capsys.readouterr().out
    )
    middle = tmp_path / "a" / "checkpoints" / "step_00000002"
    make_trainer(make_objective(noise=0.3), tmp_path / "b", resume=middle, **settings).fit()
    assert files(tmp_path / "b") == files(tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "batch_accuracy", "logit_scale"} < set(rows[0])
    assert any(name.startswith("routing/") for name in rows[0])


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    objective = make_objective()
    with torch.no_grad():
        objective.model.visual.head.proj.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="loss nan"):
        make_trainer(objective, tmp_path, accumulation=2).fit()
    for name, value in objective.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_uneven_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 samples cannot be split into 3"):
        split_batch(make_batch(), 3)
    trainer = make_trainer(make_objective(), tmp_path, Batches(6), accumulation=2)
    with pytest.raises(ValueError, match="gave 6 samples at step 1, expected 8"):
        trainer.fit()


def test_batch_norm_is_not_split() -> None:
    image = ImageTowerConfig("test_resnet")
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(image, text, config)
    model = build_dual_encoder(description)
    objective = ContrastiveObjective(model, description, config, HALF, HALF)
    with pytest.raises(ValueError, match=r"must be 1, got 2: 'visual\.trunk\.conv1\.1' normalises"):
        objective.check_accumulation(2, 8)
    trunk = model.visual.trunk
    frozen = ContrastiveObjective(model, description, config, HALF, HALF, (trunk,))
    assert "global batch" in frozen.check_accumulation(2, 8)


def test_parts_that_would_route_other_pictures_together_are_refused() -> None:
    router = {"router": "tokens_choice", "router_options": {"group_size": 4}}
    image = ImageTowerConfig("soft_moe_vit_test_patch16_64", arguments=router)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(image, text, config)
    model = build_dual_encoder(description)
    frozen = (model.visual.trunk,)
    objective = ContrastiveObjective(model, description, config, HALF, HALF, frozen)
    assert "global batch" in objective.check_accumulation(2, 8)
    with pytest.raises(ValueError, match="parts of 2 samples, no multiple of the 4"):
        objective.check_accumulation(4, 8)
    with pytest.raises(ValueError, match="cannot be cached: the tower routes several pictures"):
        tower_fingerprint(model, description, "image")
