"""What is kept, what is written in the background, and disks that do not take it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.training.test_loop import Regression, make_trainer, metrics, outcome
from training.background import Background
from training.checkpoint import CheckpointError, newest_checkpoint, read_manifest
from training.checkpoint import checkpoint_name as name_of
from training.retention import figure, protected_checkpoints
from training.saving import SaveError
from training.snapshot import Snapshot


def names(run_dir: Path) -> list[int]:
    """Steps of the checkpoints; anything else in the folder is an error."""
    return sorted(int(p.name.removeprefix("step_")) for p in (run_dir / "checkpoints").iterdir())


class Falling:
    """An evaluator whose figure is largest at step 4."""

    name = "val"

    def __init__(self) -> None:
        self.values = iter([0.1, 0.9, 0.5, 0.4, 0.3, 0.2])

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        value = next(self.values)
        return {"acc1": value, "loss": -value, "none": None}


class Slow(Falling):
    """Takes its time, in which the average of the weights may stand in their place."""

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        time.sleep(0.05)
        return super().__call__(model)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [12]),
        ({"keep_last": 2, "keep_every": 6}, [6, 10, 12]),
        ({"keep_last": 1, "keep_best": "val/acc1"}, [4, 12]),
        ({"keep_last": 1, "keep_best": "-val/loss"}, [4, 12]),
        ({"keep_last": 1, "keep_best": "-val/acc1"}, [2, 12]),
        ({"keep_last": 1, "keep_best": "val/none"}, [12]),
        ({"keep_last": 1, "keep_best": "val/acc1", "save_every": 0}, [4, 12]),
        ({"keep_last": 1, "keep_every": "0.5 epochs", "save_in_background": True}, [4, 8, 12]),
    ],
)
def test_what_is_kept(tmp_path: Path, settings: dict[str, Any], kept: list[int]) -> None:
    settings = {"save_every": 2, "eval_every": 2} | settings
    make_trainer(tmp_path, evaluators=(Falling(),), **settings).fit()
    assert names(tmp_path) == kept


def test_of_equal_figures_the_newest_is_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        folder = tmp_path / name_of(step)
        folder.mkdir()
        figures = {"a": 0.5 if step < 3 else 0.4}
        (folder / "manifest.json").write_text(json.dumps({"step": step, "figures": figures}))
    assert protected_checkpoints(tmp_path, 0, "a") == {name_of(2)}
    assert protected_checkpoints(tmp_path, 3, "") == {name_of(3)}
    assert figure({"a": "text"}, "a") is None
    assert figure({"a": float("nan")}, "a") is None  # would be neither more nor less than others


def test_the_manifest_says_where_the_run_stands(tmp_path: Path) -> None:
    make_trainer(tmp_path, evaluators=(Falling(),), steps=4).fit()
    manifest = read_manifest(tmp_path / "checkpoints" / name_of(4))
    assert (manifest["step"], manifest["samples"], manifest["world"]) == (4, 32, 1)
    assert manifest["stream"] == {"seed": 7}
    assert manifest["figures"]["val/acc1"] == 0.1
    first = manifest["clock"]
    resumed = make_trainer(tmp_path, steps=5, resume=tmp_path / "checkpoints" / name_of(4))
    resumed.fit()
    later = read_manifest(tmp_path / "checkpoints" / name_of(5))["clock"]
    assert later["wall_seconds"] > first["wall_seconds"]  # adds up over resumes
    assert later["saved_at"] > first["saved_at"]


def test_moments_of_another_optimizer_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).fit()
    state = tmp_path / "checkpoints" / name_of(2) / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"optimizer": "Lion"}))
    with pytest.raises(CheckpointError, match=r"its optimizer is Lion, this run's AdamW; set opt"):
        make_trainer(tmp_path, steps=3, resume=state.parent)
    del content["optimizer"]  # as versions before this one wrote it
    state.write_text(json.dumps(content))
    assert make_trainer(tmp_path, steps=3, resume=state.parent).step == 2


def test_in_the_background_the_same_is_written(tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {"at_once": {}, "beside": {"save_in_background": True}}
    for name, settings in runs.items():
        make_trainer(tmp_path / name, save_every=1, keep_last=20, **settings).fit()
    for step in range(1, 13):
        assert outcome(tmp_path / "beside", step) == outcome(tmp_path / "at_once", step)


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "ema_export": True}])
def test_an_update_waits_for_a_copy_that_is_late(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(snapshot: Snapshot) -> None:
        time.sleep(0.08)  # several steps of this model
        copy(snapshot)

    copy = Snapshot.finish
    make_trainer(tmp_path / "at_once", save_every=4, keep_last=9, **settings).fit()
    monkeypatch.setattr(Snapshot, "finish", finish)
    more: dict[str, Any] = {"eval_every": 4, "ema_evaluate": bool(settings)} | settings
    beside = {"save_every": 4, "keep_last": 9, "save_in_background": True}
    late = make_trainer(tmp_path / "late", evaluators=(Slow(),), **beside, **more)
    late.fit()
    for step in (4, 8, 12):
        assert outcome(tmp_path / "late", step)[0] == outcome(tmp_path / "at_once", step)[0]


def test_an_error_in_the_background_surfaces_and_ends_what_follows() -> None:
    done = []

    def fails() -> None:
        raise OSError("no disk")

    background = Background(threaded=True)
    background.do(fails)
    with pytest.raises(OSError, match="no disk"):
        background.finish()
    background.do(partial(done.append, 1))
    background.finish()
    assert done == [1]


def wait_for(checkpoint: Path) -> None:
    """The background may still be at the save before."""
    while not checkpoint.exists():
        time.sleep(0.01)


def unwritable(folder: Path) -> None:
    """A folder that not even root can write to: the kernel's."""
    checkpoints = folder / "checkpoints"
    wait_for(checkpoints / name_of(4))
    shutil.move(checkpoints, folder / "moved")
    checkpoints.symlink_to("/proc/sys/kernel")


class Harm(Regression):
    """Does harm to the folder of checkpoints in step 6."""

    def __init__(self, harm: Callable[[], None]) -> None:
        super().__init__()
        self.harm = harm

    def before_step(self, step: int) -> None:
        if step == 5:
            self.harm()


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_that_cannot_be_written_ends_the_run_with_its_name(
    tmp_path: Path, background: bool
) -> None:
    task = partial(Harm, partial(unwritable, tmp_path))
    trainer = make_trainer(tmp_path, task, save_every=4, save_in_background=background)
    with pytest.raises(SaveError, match=r"'.*step_00000008' cannot be written: .*, then --resume"):
        trainer.fit()
    newest, _ = newest_checkpoint(tmp_path / "moved")
    assert newest is not None
    assert newest.name == name_of(4)
    if not background:  # else a few steps later
        assert len(metrics(tmp_path)) == 8


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.training.test_loop import Regression, make_trainer
from tests.training.test_saving import Harm, name_of, wait_for

def full():  # from here on no file can grow beyond a few bytes, as on a full disk
    wait_for(folder / "checkpoints" / name_of(4))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))

folder = Path(sys.argv[1])
task = lambda: Harm(full)
try:
    settings = {"log_every": 99, "save_in_background": sys.argv[2] == "1"}
    make_trainer(folder, task, save_every=4, **settings).fit()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("background", ["0", "1"])
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, run_python: Any, background: str
) -> None:
    result = run_python("-c", FULL, tmp_path, background)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("SaveError: the checkpoint '"), result.stderr[-1000:]
    assert f"the newest is '{tmp_path}/checkpoints/{name_of(4)}'" in last
    newest, messages = newest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert (newest.name, messages) == (name_of(4), [])
    assert names(tmp_path) == [4]


def test_too_little_space_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("training.saving.shutil.disk_usage", lambda _: usage)
    with pytest.raises(SaveError, match=r"GB are needed and 0\.00 GB free.*there is none yet"):
        trainer.save()
    assert names(tmp_path) == []
