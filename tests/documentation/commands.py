"""Commands of the pages, parsed by what would run them: our scripts, launchers, pip, make."""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from open_clip_train import params

from scripts.cli import parse_config
from tests.conftest import ROOT

# In the place of programs that a page calls: they write down how they were called.
RECORDER = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" >> "$RECORD"
printf '\\n\\0' >> "$RECORD"
"""
STANDS_IN = {
    **dict.fromkeys(("accelerate", "make", "pip", "python", "ssh", "torchrun"), RECORDER),
    "srun": '#!/bin/sh\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho node0\n",
}
HARMLESS = ("head",)  # what a page may really call
SLURM = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}


class Parsed(Exception):
    """The command line was accepted, with these settings."""


def commands_of(script: str, folder: Path) -> list[list[str]]:
    """What a shell script calls, functions and variables resolved by bash itself.

    Raises:
        AssertionError: bash cannot read it, or it calls a program that is not expected.
    """
    programs, record = folder / "programs", folder / "record"
    programs.mkdir(exist_ok=True)
    record.write_bytes(b"")
    for name, text in STANDS_IN.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in HARMLESS:
        (programs / name).unlink(missing_ok=True)
        (programs / name).symlink_to(str(shutil.which(name)))
    environment = SLURM | {"PATH": str(programs), "RECORD": str(record)}
    result = subprocess.run(
        [str(shutil.which("bash")), "-e", "-u", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert result.returncode == 0, f"{script}\n{result.stderr}"
    calls = record.read_bytes().decode().split("\0\n\0")[:-1]
    return [call.split("\0") for call in calls]


def check(words: Sequence[str]) -> None:
    """Parse a command as the program that it calls would.

    Raises:
        AssertionError: it would be refused, or nothing here knows the program.
    """
    program, *rest = words
    checks: dict[str, Callable[[list[str]], None]] = {
        "python": check_python, "accelerate": check_accelerate, "torchrun": check_torchrun,
        "pip": check_pip, "make": check_make, "ssh": check_nothing,
    }  # fmt: skip
    assert program in checks, f"no test knows how to check: {' '.join(words)}"
    checks[program](rest)


def check_nothing(_words: list[str]) -> None:
    """For programs whose parser cannot be called without the rest."""


def check_python(words: list[str]) -> None:
    assert words[0] == "-m", words
    parse_module(words[1], words[2:])


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch", words
    options = launch_command_parser().parse_args(words[1:])
    assert options.module, "our commands are started with -m"
    settings = parse_module(options.training_script, options.training_script_args)
    fits_processes(settings, options.num_processes or 1)


def check_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module, "our commands are started with -m"
    if options.training_script == "open_clip_train.main":
        params.parse_args(options.training_script_args)
        return
    nodes = int(options.nnodes.split(":")[0])
    settings = parse_module(options.training_script, options.training_script_args)
    fits_processes(settings, nodes * int(options.nproc_per_node))


def check_pip(words: list[str]) -> None:
    """Extras of ours exist."""
    assert words[0] == "install"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    named = re.search(r"(?:\.|softmoe-clip)\[([\w,-]+)\]", " ".join(words))
    for extra in named[1].split(",") if named else ():
        assert extra in extras, extra


def check_make(words: list[str]) -> None:
    subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)


def parse_module(name: str, argv: list[str]) -> Any:
    """Settings of `python -m name argv...`, whose main goes no further than its parser.

    Raises:
        AssertionError: the parser refuses the words.
    """
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *argv])
        real = argparse.ArgumentParser.parse_args
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(real))
        if hasattr(module, "parse_config"):
            patch.setattr(module, "parse_config", stop_after(parse_config))
        try:
            module.main()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stop:
            raise AssertionError(f"{name} refuses {argv} (code {stop.code})") from stop
    raise AssertionError(f"{name} does not parse its words")


def stop_after(parse: Callable[..., Any]) -> Callable[..., Any]:
    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        raise Parsed(parse(*arguments, **options))

    return parse_and_stop


def fits_processes(settings: Any, processes: int) -> None:
    """What a run of ours asks of the number of its processes."""
    train = getattr(settings, "train", None)
    if train is not None:
        assert train.batch_size % (processes * train.accumulation) == 0
        assert processes % train.expert_parallel == 0


def run_command(line: Sequence[str], shorten: Callable[[str, list[str]], list[str]]) -> None:
    """Run a command of a page in this process, with what `shorten(module, words)` appends.

    Raises:
        AssertionError: its exit code is not 0.
    """
    words = list(line)
    if words[:2] != ["python", "-m"]:
        assert words[0] in ("mkdir", "tar", "cp"), f"mark it as not run: {' '.join(words)}"
        subprocess.run(words, check=True)
        return
    name, argv = words[2], words[3:]
    try:
        code = importlib.import_module(name).main([*argv, *shorten(name, argv)])
    except SystemExit as stop:
        code = stop.code
    assert not code, f"{' '.join(words)} ended with {code}"
