"""A writer beside the training is killed, or fails: the run goes on from what has its name."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.training.scenarios import STEPS
from tests.training.test_loop import metrics, outcome
from training.background import Background
from training.checkpoint import CheckpointWriter

FILE = Path(__file__).with_name("scenarios.py")
UNBROKEN = {1: "unbroken", 2: "unbroken pair"}


FAILURES = {"a late save fails": 3, "the last save fails": 6}
KILLS = [(1, 13), (2, 4)]  # processes, and moments


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, run_python: Any) -> tuple[Path, Any]:
    """The folder of all scenarios, and what became of them."""
    folder = tmp_path_factory.mktemp("scenarios")
    kills = [f"writer {world} {points}" for world, points in KILLS]
    result = run_python(FILE, folder, *UNBROKEN.values(), *FAILURES, *kills, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "points"), KILLS)
def test_a_kill_between_operations_of_the_writer_continues_from_the_last_name(
    played: tuple[Path, Any], world: int, points: int
) -> None:
    tmp_path, name = played[0], f"writer {world} {points}"
    found = played[1][name]
    assert found["operations"] >= 20
    assert len(found["runs"]) >= points
    unbroken = tmp_path / UNBROKEN[world]
    for point, codes, newest, messages, again in found["runs"]:
        assert (codes, messages) == ([-9, 1][:world], [])
        assert newest in ("step_00000003", "step_00000006")
        assert again == [0] * world
        run_dir = tmp_path / name / str(point)
        assert outcome(run_dir, STEPS) == outcome(unbroken, STEPS), point
        assert metrics(run_dir, "eval") == metrics(unbroken, "eval"), point
        assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "newest"), FAILURES.items())
def test_a_save_that_fails_late_ends_every_process_and_gets_no_name(
    played: tuple[Path, Any], name: str, newest: int
) -> None:
    folder, found = played[0], played[1][name]
    assert (found["codes"], found["messages"]) == ([1, 1], [])
    assert found["newest"] == f"step_{newest:08d}"
    first, second = found["output"]
    assert first.count("cannot be written: [Errno 28] No space left on device") == 1
    assert f"the newest is '{folder / name}/checkpoints/step_{newest:08d}'" in first
    assert "process 0 has failed at step 8, see its message" in second
    assert found["again"] == [0, 0]
    assert outcome(folder / name, STEPS) == outcome(folder / "unbroken pair", STEPS)


def test_nothing_is_done_after_a_task_that_fails_while_others_wait() -> None:
    begun, done = threading.Event(), []

    def fails() -> None:
        begun.wait(10)
        raise OSError("no disk")

    background = Background(threaded=True)
    background.do(fails)
    background.do(lambda: done.append("named"))
    begun.set()
    with pytest.raises(OSError, match="no disk"):
        background.finish()
    background.do(lambda: done.append("later"))
    background.finish()
    assert done == ["later"]


def test_what_a_failed_save_has_removed_is_not_published(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 3)
    writer.begin()
    writer.partial.rmdir()
    for write in (lambda: writer.add_json("state.json", {}), lambda: writer.publish(3)):
        with pytest.raises(FileNotFoundError):
            write()
    assert list(tmp_path.iterdir()) == []
