"""What the training loop does when a step, an update or an evaluation fails."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from torch import nn

from tests.training.test_loop import Probe, Regression, make_trainer, metrics, outcome
from training.checkpoint import checkpoint_name as name_of
from training.checkpoint import newest_checkpoint
from training.finite import NonFiniteError


class Failing:
    """An evaluator that disturbs every generator and then fails."""

    name = "failing"

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        Probe()(model)
        raise OSError("the disk is gone")


def test_a_failing_evaluation_loses_no_step(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    make_trainer(unbroken, save_every=4).fit()
    trainer = make_trainer(broken, evaluators=(Failing(),), save_every=4, eval_every=4)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    newest, _ = newest_checkpoint(broken / "checkpoints")
    assert newest == trainer.last_checkpoint == broken / "checkpoints" / name_of(4)
    make_trainer(broken, save_every=4, resume=newest).fit()
    assert outcome(broken) == outcome(unbroken)


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_rescued_out_of_an_evaluation_once(
    tmp_path: Path, background: bool
) -> None:
    words = []

    class Stuck:
        name = "stuck"

        def __call__(self, model: nn.Module) -> dict[str, float | None]:
            words.append(trainer.milestones.rescue())  # as the watch does beside it
            newest, _ = newest_checkpoint(tmp_path / "checkpoints")
            assert newest == tmp_path / "checkpoints" / name_of(4)
            return {"one": 1.0}

    trainer = make_trainer(tmp_path, evaluators=(Stuck(),), steps=4, save_in_background=background)
    trainer.fit()
    assert words == [f"checkpoint {tmp_path / 'checkpoints' / name_of(4)}"]
    assert trainer.milestones.rescue() == ""  # the evaluation is over


def test_two_evaluation_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a name of its own, got probe, probe"):
        make_trainer(tmp_path, evaluators=(Probe(), Probe()))


@pytest.mark.parametrize("name", ["ema", "ema/probe"])
def test_no_evaluation_set_is_called_as_figures_of_averaged_weights(
    tmp_path: Path, name: str
) -> None:
    evaluator = Probe()
    evaluator.name = name
    with pytest.raises(ValueError, match=f"^evaluation: rename the set '{name}', "):
        make_trainer(tmp_path, evaluators=(evaluator,))


def test_skipped_samples_are_counted_in_the_metrics(tmp_path: Path) -> None:
    make_trainer(tmp_path).fit()
    counts = [row.get("skipped") for row in metrics(tmp_path)]
    assert counts == [None, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert metrics(tmp_path)[-1]["skipped_reasons"] == {"broken image": 6}


@pytest.mark.parametrize(("log_every", "steps"), [(1, "5 to 5"), (3, "5 to 6"), (100, "5 to 8")])
def test_where_no_step_waits_no_checkpoint_holds_what_is_not_finite(
    tmp_path: Path, log_every: int, steps: str
) -> None:
    poisoned = partial(Regression, poison=5)
    trainer = make_trainer(tmp_path, poisoned, save_every=4, log_every=log_every)
    trainer.guard.deferred = True  # as on a GPU
    with pytest.raises(NonFiniteError, match=f"in one of the steps {steps}: no checkpoint"):
        trainer.fit()
    newest, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == name_of(4)
    assert all(row["loss"] is not None for row in metrics(tmp_path))


def test_updates_that_are_skipped_in_a_row_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, steps=60)
    skips = iter([True] * 19 + [False] + [True] * 20)  # what the gradient scaler says
    monkeypatch.setattr(type(trainer.updater), "step_was_skipped", property(lambda _: next(skips)))
    with pytest.raises(NonFiniteError, match="in 20 steps in a row up to step 40"):
        trainer.fit()
    rows = metrics(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [*range(1, 20), *range(19, 39)]


def test_skipped_updates_survive_a_resume(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.guard.count(True, 1)
    trainer.save()
    assert make_trainer(tmp_path, resume=trainer.last_checkpoint).guard.skipped == 1
