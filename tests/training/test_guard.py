"""Updates that are left out: not finite up to a number in a row, and spikes of the loss."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_loop import Regression, make_trainer, metrics, outcome
from training.checkpoint import checkpoint_name as name_of
from training.finite import NonFiniteError
from training.objective import Batch, Metrics
from training.spikes import WINDOW, SpikeWindow
from training.step import TrainingStep


class Disturbed(Regression):
    """Multiplies the loss by `factor` at some steps, counted from 1."""

    def __init__(self, factor: float, steps: tuple[int, ...]) -> None:
        super().__init__(noise=False)
        self.factor, self.steps, self.now = factor, steps, 0

    def before_step(self, step: int) -> None:
        self.now = step + 1

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        loss, metrics = super().forward(batch)
        return loss * (self.factor if self.now in self.steps else 1.0), metrics


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.objective.parameters()]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_an_update_that_is_left_out_changes_nothing(
    tmp_path: Path, factor: float, fused: bool
) -> None:
    trainer = make_trainer(tmp_path, partial(Disturbed, factor, (1,)), steps=2, skip_updates=1)
    trainer.optimizer.defaults["fused"] = fused  # False takes the path of other optimizers
    before = weights(trainer)
    trainer.plan.steps = 1
    trainer.fit()
    for one, two in zip(before, weights(trainer), strict=True):
        assert torch.equal(one, two)
    assert [float(s.get("step", 0)) for s in trainer.optimizer.state.values()] in ([], [0.0] * 4)
    assert metrics(tmp_path)[0]["left_out_updates"] == 1


def test_more_in_a_row_than_allowed_stop_the_run(tmp_path: Path) -> None:
    allowed = partial(Disturbed, torch.nan, (3, 4, 6))
    make_trainer(tmp_path / "fine", allowed, skip_updates=2).fit()
    assert metrics(tmp_path / "fine")[-1]["left_out_updates"] == 3
    trainer = make_trainer(
        tmp_path / "stop", partial(Disturbed, torch.nan, (3, 4, 5)), skip_updates=2, save_every=2
    )
    with pytest.raises(NonFiniteError, match="3 updates in a row up to step 5 were not usable"):
        trainer.fit()
    once = partial(Disturbed, torch.nan, (3,))  # watching for spikes allows nothing else
    with pytest.raises(NonFiniteError, match="1 updates in a row up to step 3 were not usable"):
        make_trainer(tmp_path / "spikes", once, spike_sigmas=6.0).fit()


def test_the_report_names_step_process_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, partial(Regression, poison=3))
    update = TrainingStep.__call__

    def named(self: TrainingStep, batch: Batch, step: int) -> tuple[Tensor, Tensor, Metrics]:
        return update(self, batch | {"key": [f"{step}-{row}" for row in range(8)]}, step)

    monkeypatch.setattr(TrainingStep, "__call__", named)
    with pytest.raises(NonFiniteError, match=r"samples: .*non_finite_0\.json"):
        trainer.fit()
    report = json.loads((tmp_path / "non_finite_0.json").read_text())
    assert (report["step"], report["rank"], report["loss"]) == (3, 0, "nan")
    assert report["keys"] == [f"2-{row}" for row in range(8)]


def test_spikes_are_found_when_the_window_is_full() -> None:
    window = SpikeWindow(6.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    accepted = torch.tensor(True)
    for number in range(WINDOW):
        pair = torch.tensor([2.0, 1.0]) + 0.1 * torch.randn(2, generator=generator)
        assert not window.is_spike(torch.tensor([99.0, 99.0])), number
        window.add(pair, accepted)
    for pair, expected in (([2.4, 1.4], False), ([3.0, 1.0], True), ([2.0, 2.0], True)):
        assert bool(window.is_spike(torch.tensor(pair))) is expected
    values = window.values.clone()
    window.add(torch.tensor([3.0, 1.0]), ~accepted)
    assert torch.equal(window.values, values)
    window.add(torch.tensor([3.0, 1.0]), accepted)
    assert float(window.values[0, -1]) == 3.0
    assert torch.equal(window.values[:, :-1], values[:, 1:])


def test_a_spike_is_left_out_and_its_window_survives_a_resume(tmp_path: Path) -> None:
    spiky = partial(Disturbed, 1e4, (133, 135))
    settings: dict[str, Any] = {"steps": 140, "save_every": 134, "keep_last": 9}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    make_trainer(whole, spiky, spike_sigmas=6.0, **settings).fit()
    assert metrics(whole)[-1]["left_out_updates"] == 2
    shutil.copytree(whole, resumed)
    middle = resumed / "checkpoints" / name_of(134)
    make_trainer(resumed, spiky, spike_sigmas=6.0, resume=middle, **settings).fit()
    assert outcome(resumed, 140) == outcome(whole, 140)
    kept = shutil.copytree(middle, tmp_path / "lost")
    (kept / "guard.safetensors").unlink()  # the comparison notices what is lost
    make_trainer(tmp_path / "other", spiky, spike_sigmas=6.0, resume=kept, **settings).fit()
    assert outcome(tmp_path / "other", 140)[0] != outcome(whole, 140)[0]
