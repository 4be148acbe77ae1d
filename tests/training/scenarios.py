"""Runs of the tiny task of `test_loop` in forked processes to which something happens.

`python tests/training/scenarios.py FOLDER NAME...` plays the named scenarios and prints what became
of each as JSON. One interpreter for all, because importing torch takes longer than they do.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import training.processes
import training.signals
from tests.training.test_loop import Regression, RowStream
from training.checkpoint import newest_checkpoint
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer
from training.objective import Batch

STEPS, BATCH = 8, 8
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
AT = 5  # the step, counted from 1, in which something happens


@dataclass
class Scenario:
    """What happens: `event` at a `place`, on one `rank` of `world`."""

    place: str = ""
    event: Callable[[], None] = lambda: None
    world: int = 1
    rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def sends(number: int) -> Callable[[], None]:
    """Signal oneself, then do nothing for longer than a test lasts."""

    def event() -> None:
        os.kill(os.getpid(), number)
        time.sleep(100)

    return event


def passing(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fails() -> None:
    raise ValueError("this sample is cursed")


def interrupts_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    end = time.monotonic() + 100
    while time.monotonic() < end:  # a step that does not end
        time.sleep(2 * training.signals.ECHO)
        os.kill(os.getpid(), signal.SIGINT)


COMPILED = {"compile": "eager", "log_routing": False}
BESIDE = {"save_in_background": True}
TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
SCENARIOS = {
    "unbroken": Scenario(),
    "term in a step": Scenario("step", passing(TERM)),
    "int while waiting": Scenario("data", sends(INT)),
    "usr1 in the evaluation": Scenario("evaluation", sends(USR1)),
    "term in the last evaluation": Scenario("last evaluation", sends(TERM)),
    "twice": Scenario("step", interrupts_twice),
    "time": Scenario("data", lambda: time.sleep(100), settings={"max_time": "0.5 s"}),
    "stall": Scenario("data", lambda: time.sleep(100), settings={"stall_limit": "1 s"}),
    "unbroken pair": Scenario(world=2),
    "term in a step of one": Scenario("step", passing(TERM), 2, 1),
    "int while one waits": Scenario("data", sends(INT), 2, 1),
    "usr1 in an evaluation of one": Scenario("evaluation", sends(USR1), 2, 1),
    "term while compiling": Scenario("compilation", passing(TERM), settings=COMPILED),
    "int while an evaluation compiles": Scenario(
        "compilation of an evaluation", sends(INT), settings=COMPILED
    ),
    "term while one compiles": Scenario("compilation", passing(TERM), 2, 1, COMPILED),
    "one dies": Scenario("step", passing(signal.SIGKILL), 2, 1),
    "one fails": Scenario("data", fails, 2, 1),
    "nan of one": Scenario("loss", lambda: None, 2, 1),
    "nan of one left out": Scenario("loss", lambda: None, 2, 1, {"skip_updates": 1}),
    "one stalls": Scenario("data", lambda: time.sleep(100), 2, 1, {"stall_limit": "1 s"}),
    "a late save fails": Scenario("disk", world=2, settings=BESIDE),
    "the last save fails": Scenario("last disk", world=2, settings=BESIDE),
}


class FullDisk(dict[str, Any]):
    """What a JSON file shall hold, but it cannot be written, as is found out after a while."""

    def items(self) -> Any:
        time.sleep(0.5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Eventful:
    """The places of a scenario, each of which calls its event once on its process."""

    def __init__(self, scenario: Scenario, rank: int) -> None:
        self.scenario, self.rank = scenario, rank

    def at(self, place: str, step: int) -> None:
        chosen = self.scenario
        due = STEPS if place == "last evaluation" else AT
        if (place, self.rank, step) == (chosen.place, chosen.rank, due):
            chosen.event()


class Rows(RowStream):
    """This process's rows; counts what was handed out in a file."""

    def __init__(self, events: Eventful, world: int, log: Path) -> None:
        self.events, self.world, self.log = events, world, log

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        return self._own_rows(super().batches(start_step), start_step)

    def _own_rows(self, batches: Iterator[Batch], start_step: int) -> Iterator[Batch]:
        share = BATCH // self.world
        rows = slice(self.events.rank * share, (self.events.rank + 1) * share)
        for step, batch in enumerate(batches, start_step + 1):
            self.events.at("data", step)
            numbers = list(range((step - 1) * BATCH, step * BATCH))[rows]
            with open(self.log, "a") as file:
                file.write(f"{step} {numbers}\n")
            yield {"x": batch["x"][rows], "y": batch["y"][rows], "skipped": []}


class Task(Regression):
    def __init__(self, events: Eventful, noise: bool) -> None:
        super().__init__(noise=noise)
        self.events, self.breaks = events, False

    def before_step(self, step: int) -> None:
        self.events.at("step", step + 1)
        chosen = self.events.scenario
        if (chosen.place, chosen.rank, step + 1) == ("loss", self.events.rank, AT):
            self.poison = self.seen + 1
        due = {"disk": AT, "last disk": STEPS}.get(chosen.place)
        self.breaks = self.breaks or step + 1 == due

    def config_files(self) -> dict[str, dict[str, Any]]:
        return {"late.json": FullDisk(never="written")} if self.breaks else {}


class Probe:
    name = "probe"

    def __init__(self, events: Eventful) -> None:
        self.events, self.trainer = events, None

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        step = self.trainer.step
        last = step == STEPS
        self.events.at("last evaluation" if last else "evaluation", step + (not last))
        if self.events.scenario.world > 1:
            torch.distributed.barrier()
        return {"zero": float(model(torch.zeros(1, 4)))}


def train(folder: Path, scenario: Scenario, rank: int, noise: bool = True) -> int:
    """What each process does; its exit code."""
    training.processes.INTERVAL, training.signals.ECHO = 0.1, 0.2
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(0)
    events = Eventful(scenario, rank)
    task, probe = Task(events, noise), Probe(events)
    torch.manual_seed(rank)
    newest, _ = newest_checkpoint(folder / "checkpoints")
    settings = {"save_every": 3, "eval_every": 2, "log_every": 1, "keep_last": 9}
    trainer = Trainer(
        task,
        Rows(events, scenario.world, folder / f"rows_{rank}"),
        (probe,),
        TrainConfig(**{"steps": STEPS, "batch_size": BATCH} | settings | scenario.settings),
        OptimizerConfig(lr=0.05),
        ScheduleConfig("cosine", warmup_steps=2),
        Accelerator(cpu=True),
        folder,
        newest,
    )
    probe.trainer = trainer
    if "compilation" in scenario.place and rank == scenario.rank:
        happens_in_compilation(scenario, task)
    if trainer.step < STEPS or trainer.owes_evaluation():
        trainer.fit()
    return 75 if trainer.stopped else 0


def happens_in_compilation(scenario: Scenario, task: nn.Module) -> None:
    """Let the event of a scenario happen once, when a graph begins to be compiled."""
    from torch._dynamo.callback import on_compile_start

    pending = [scenario.event]

    def begins(_: Any) -> None:
        if pending and task.training == (scenario.place == "compilation"):
            pending.pop()()

    on_compile_start(begins)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, scenario: Scenario, run: Callable[[int], int]) -> list[int]:
    """Fork the processes of a run; their ids. Each does `run(rank)` and exits with what it says."""
    folder.mkdir(exist_ok=True, parents=True)
    sys.stdout.flush()
    children, port = [], free_port()
    for rank in range(scenario.world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.setsid()
        output = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if scenario.world > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(scenario.world),
                LOCAL_WORLD_SIZE=str(scenario.world), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
            )  # fmt: skip
        code = 1
        try:
            code = run(rank)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(code)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes; minus the number of the signal for those that one has ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def play(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Run until it ends, then resume without the event; what came of both."""
    codes = wait(start(folder, scenario, lambda rank: train(folder, scenario, rank)))
    newest, messages = newest_checkpoint(folder / "checkpoints")
    output = [(folder / f"output_{rank}").read_text() for rank in range(scenario.world)]
    calm = Scenario(world=scenario.world)
    again = wait(start(folder, calm, lambda rank: train(folder, calm, rank)))
    return {
        "codes": codes,
        "newest": newest.name if newest else None,
        "messages": messages,
        "output": output,
        "again": again,
    }


def change_world(folder: Path, worlds: tuple[int, int]) -> dict[str, Any]:
    """Stop a run without noise in its fifth step and go on with other processes."""
    codes = []
    for event, world in zip((passing(TERM), lambda: None), worlds, strict=True):
        scenario = Scenario("step", event, world)
        run = partial(train, folder, scenario, noise=False)
        codes += wait(start(folder, scenario, run))
    return {"codes": codes}


def seconds_of_a_run(folder: Path) -> float:
    """How long a run lasts that nobody disturbs, on this machine."""
    scenario = Scenario()
    begun = time.perf_counter()
    wait(start(folder, scenario, partial(train, folder, scenario)))
    return time.perf_counter() - begun


def kill_at_random(folder: Path, number: int, kills: int, seconds: float) -> dict[str, Any]:
    """Kill a run `kills` times at a moment of its `seconds` drawn by `number`, then let it end."""
    draw, scenario = random.Random(number), Scenario(settings=BESIDE if number % 3 else {})
    run = partial(train, folder, scenario)
    codes = []
    for _ in range(kills):
        children = start(folder, scenario, run)
        time.sleep(draw.uniform(0.0, seconds))
        os.kill(children[0], signal.SIGKILL)
        codes += wait(children)
    return {"codes": codes, "end": wait(start(folder, scenario, run))}


def watch_writer(report: Path, kill_at: int) -> None:
    """Count the file operations of the thread that writes checkpoints, and kill this process before
    the one numbered `kill_at`; a report gets the count at the end of each rename."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not threading.current_thread().name.startswith("checkpoint"):
            return
        if event in CHANGES or (event == "open" and str(report.parent) in str(arguments[0])):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at == 0 and event == "os.rename":
                with open(report, "a") as file:
                    file.write(f"{count}\n")

    sys.addaudithook(watch)


def kill_the_writer(folder: Path, world: int, points: int) -> dict[str, Any]:
    """Kill the first process of a run at operations of its background writer, from the naming of
    its first checkpoint to that of its second; what came of each and of its continuation."""
    scenario = Scenario(world=world, settings=BESIDE)

    def run(where: Path, kill_at: int) -> list[int]:
        def one(rank: int) -> int:
            if rank == 0:
                watch_writer(where / "operations", kill_at)
            return train(where, scenario, rank)

        return wait(start(where, scenario, one))

    run(folder / "counted", 0)
    first, second = map(int, (folder / "counted" / "operations").read_text().split()[:2])
    step = max(1, (second - first) // points)
    found = []
    for point in range(first, second + 1, step):
        where = folder / str(point)
        codes = run(where, point)
        newest, messages = newest_checkpoint(where / "checkpoints")
        again = run(where, -1)
        found.append([point, codes, newest and newest.name, messages, again])
    return {"operations": second - first, "runs": found}


def main(folder: Path, names: list[str]) -> dict[str, Any]:
    """Play scenarios by name, `killed N` for N runs that are killed, `writer W N` for W processes
    whose writer is killed at N of its operations, or `A to B` processes."""
    train_here(folder / "warm up")
    found: dict[str, Any] = {}
    for name in names:
        words = name.split()
        if words[0] == "killed":
            seconds = seconds_of_a_run(folder / "timed")
            found[name] = [
                kill_at_random(folder / f"killed {number}", number, 1 + number % 2, seconds)
                for number in range(int(words[1]))
            ]
        elif words[0] == "writer":
            found[name] = kill_the_writer(folder / name, *map(int, words[1:]))
        elif words[0] in ("quiet", "1", "2"):
            worlds = (1, 1) if words[0] == "quiet" else (int(words[0]), int(words[-1]))
            found[name] = change_world(folder / name, worlds)
        else:
            found[name] = play(folder / name, SCENARIOS[name])
    return found


def train_here(folder: Path) -> None:
    """What this process imports now, the forked ones need not."""
    folder.mkdir()
    train(folder, Scenario(), 0)
    AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
