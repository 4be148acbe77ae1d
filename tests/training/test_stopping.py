"""Runs that are asked to stop, or whose processes die, fail or stall, with real processes."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.scenarios import BATCH, SCENARIOS, STEPS
from tests.training.test_loop import metrics, outcome
from training.checkpoint import load_tensors
from training.durations import parse_duration
from training.signals import StopRequests

FILE = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, run_python: Any) -> tuple[Path, Any]:
    """The folder of all scenarios, and what became of them."""
    folder = tmp_path_factory.mktemp("scenarios")
    result = run_python(FILE, folder, *SCENARIOS, "quiet", "2 to 1", "1 to 2", "killed 4")
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codes", "step"),
    [
        ("term in a step", [75], 5),
        ("int while waiting", [75], 4),
        ("usr1 in the evaluation", [75], 4),
        ("term in the last evaluation", [75], STEPS),
        ("twice", [130], 3),
        ("time", [75], 4),
        ("term in a step of one", [75, 75], 5),
        ("int while one waits", [75, 75], 4),
        ("usr1 in an evaluation of one", [75, 75], 4),
        ("term while compiling", [75], 1),
        ("int while an evaluation compiles", [75], 2),
        ("term while one compiles", [75, 75], 1),
        ("stall", [1], 3),
        ("one dies", [1, -9], 3),
        ("one fails", [1, 1], 3),
        ("one stalls", [1, 1], 3),
        ("nan of one", [1, 1], 3),
    ],
)
def test_a_run_that_is_stopped_continues_to_the_unbroken_end(
    played: tuple[Path, Any], name: str, codes: list[int], step: int
) -> None:
    folder, found = played[0] / name, played[1][name]
    unbroken = played[0] / ("unbroken pair" if len(codes) > 1 else "unbroken")
    assert found["codes"] == codes
    assert found["newest"] == f"step_{step:08d}"
    assert found["messages"] == []
    assert found["again"] == [0] * len(codes)
    assert outcome(folder, STEPS) == outcome(unbroken, STEPS)
    assert metrics(folder, "eval") == metrics(unbroken, "eval")
    assert not list((folder / "checkpoints").glob(".*"))
    for rank in range(len(codes)):  # every row was handed out, at the step it belongs to
        lines = set((folder / f"rows_{rank}").read_text().splitlines())
        share = BATCH // len(codes)
        assert lines >= {
            f"{number + 1} {list(range(first, first + share))}"
            for number in range(STEPS)
            for first in [number * BATCH + rank * share]
        }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stall", "process 0 is waiting for data since "),
        ("one dies", "another process of the run has died"),
        ("one fails", "process 1 has failed at step 4, see its message"),
        ("one stalls", "process 1 is waiting for data since "),
        ("twice", "stopped at once, without a checkpoint"),
        ("usr1 in an evaluation of one", "stopped during the evaluation after step 4; checkpoint"),
    ],
)
def test_every_process_says_why_it_ends(played: tuple[Path, Any], name: str, message: str) -> None:
    output = played[1][name]["output"]
    assert message in output[0]
    assert output[0].count(message) == 1
    if name == "one stalls":
        assert message in output[1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_concerns_all(played: tuple[Path, Any]) -> None:
    folder, found = played[0] / "nan of one", played[1]["nan of one"]
    assert all("NonFiniteError" in output for output in found["output"])
    report = json.loads((folder / "non_finite_1.json").read_text())
    assert (report["step"], report["rank"], report["loss_is_finite"]) == (5, 1, False)
    assert json.loads((folder / "non_finite_0.json").read_text())["loss"] != "nan"
    assert played[1]["nan of one left out"]["codes"] == [0, 0]
    rows = metrics(played[0] / "nan of one left out")
    assert [row.get("left_out_updates") for row in rows] == [None] * 4 + [1] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2 to 1", "1 to 2"])
def test_another_number_of_processes_goes_on_with_the_same_rows(
    played: tuple[Path, Any], name: str
) -> None:
    folder, alone = played[0] / name, played[0] / "quiet"
    first, then = int(name[0]), int(name[-1])
    assert played[1][name]["codes"] == [75] * first + [0] * then
    used: Counter[int] = Counter()
    for step in range(1, STEPS + 1):
        world = first if step <= 5 else then
        for rank in range(world):
            lines = (folder / f"rows_{rank}").read_text().splitlines()
            share = BATCH // world
            begin = (step - 1) * BATCH + rank * share
            expected = list(range(begin, begin + share))
            used.update(expected if f"{step} {expected}" in lines else [])
    assert used == Counter(range(STEPS * BATCH))  # each exactly once
    ends = [run / "checkpoints" / f"step_{STEPS:08d}" for run in (folder, alone)]
    one, two = [load_tensors(end / "model.safetensors") for end in ends]
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def check_killed(folder: Path, runs: list[dict[str, Any]], unbroken: Path) -> None:
    for number, run in enumerate(runs):
        assert set(run["codes"]) <= {-9, 0}
        assert run["end"] == [0]
        killed = folder / f"killed {number}"
        assert outcome(killed, STEPS) == outcome(unbroken, STEPS), number
        assert metrics(killed, "eval") == metrics(unbroken, "eval"), number
    assert any(-9 in run["codes"] for run in runs)


@pytest.mark.slow
def test_runs_killed_at_random_end_like_the_unbroken_one(played: tuple[Path, Any]) -> None:
    check_killed(played[0], played[1]["killed 4"], played[0] / "unbroken")


@pytest.mark.long
def test_thirty_runs_killed_at_random_end_like_the_unbroken_one(
    tmp_path: Path, run_python: Any
) -> None:
    result = run_python(FILE, tmp_path, "unbroken", "killed 30")
    assert result.returncode == 0, result.stderr[-2000:]
    runs = json.loads(result.stdout.splitlines()[-1])["killed 30"]
    check_killed(tmp_path, runs, tmp_path / "unbroken")


def test_handlers_come_back_and_a_budget_works_outside_the_main_thread() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    reasons: list[str | None] = []

    def elsewhere() -> None:
        with StopRequests(0.01) as requests:
            while requests.reason is None:
                time.sleep(0.01)
            reasons.append(requests.reason)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    assert reasons == ["train.max_time is over"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 epochs", (3, "epochs")),
        ("1.2M samples", (1.2e6, "samples")),
        ("1 step", (1, "steps")),
        ("500k steps", (5e5, "steps")),
        ("1_000 samples", (1000, "samples")),
        ("90 min", (90, "min")),
        ("11.5 hours", (11.5, "h")),
    ],
)
def test_durations_are_read(text: str, expected: tuple[float, str]) -> None:
    assert parse_duration(text, "x") == expected


@pytest.mark.parametrize("text", ["", "3", "three epochs", "3 epoch s", "-1 epochs", "2 K samples"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.steps: .* is no duration; write for example"):
        parse_duration(text, "train.steps")
