"""When `accelerate launch --cpu` starts too few processes, and what is started instead."""

from __future__ import annotations

import pytest

from scripts.cpu_processes import only_one_was_started, torchrun_command

LAUNCHED = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, True),
        ({"RANK": "0"}, False),
        ({"PMI_RANK": "1"}, False),
    ],
)
def test_a_lonely_process_is_recognised(changes: dict[str, str], alone: bool) -> None:
    assert only_one_was_started(LAUNCHED | changes) is alone


@pytest.mark.parametrize("accelerator", [False, True])
def test_without_an_accelerator_the_cpu_need_not_be_named(
    monkeypatch: pytest.MonkeyPatch, accelerator: bool
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    assert only_one_was_started(LAUNCHED | {"ACCELERATE_USE_CPU": "False"}) is not accelerator


def test_one_process_is_what_plain_launches_ask_for() -> None:
    plain = {name: value for name, value in LAUNCHED.items() if not name.startswith("MASTER")}
    assert not only_one_was_started(plain)
    assert not only_one_was_started({})


@pytest.mark.parametrize(
    "launcher",
    [
        ["python", "/bin/accelerate", "launch"],
        ["/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "/site-packages/accelerate/commands/launch.py"],
    ],
)
@pytest.mark.parametrize(
    "spelling", [["--num_processes", "3"], ["--num-processes=3"], ["--num_processes=3"]]
)
def test_the_number_comes_from_the_launcher(launcher: list[str], spelling: list[str]) -> None:
    words = [*launcher, "--cpu", *spelling, "-m", "scripts.x", "-a"]
    command = torchrun_command(words, "scripts.x", ["-a"], LAUNCHED)
    assert command[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "3"]
    assert command[command.index("--master_port") + 1] == "29511"
    assert command[-3:] == ["-m", "scripts.x", "-a"]


def test_an_unknown_number_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc_per_node N"):
        torchrun_command(["python", "launch", "--cpu", "-m", "x"], "x", [], LAUNCHED)
