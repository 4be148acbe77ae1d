"""Several CPU processes from one `accelerate launch`.

`accelerate launch --num_processes N` with `--cpu`, or on a machine without an accelerator, starts
a single process unless there is MPI, and says nothing (accelerate 1.15, `commands/launch.py`: the
simple launcher). It leaves a trace, though: it sets MASTER_ADDR only when more than one process
was asked for, and no RANK. From that this module starts the N processes through torchrun, in place
of the lonely one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# The ways to spell the launcher: `accelerate launch`, the script, the module.
LAUNCHERS = ("launch", "accelerate-launch", "accelerate.commands.launch", "launch.py")


def only_one_was_started(environment: Mapping[str, str]) -> bool:
    """Whether the launcher was asked for several CPU processes and started this one alone."""
    ranks = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return (
        "ACCELERATE_USE_CPU" in environment
        and "MASTER_ADDR" in environment
        and "ACCELERATE_MIXED_PRECISION" in environment
        and not any(name in environment for name in ranks)
        and (environment["ACCELERATE_USE_CPU"].lower() == "true" or not _has_accelerator())
    )


def _has_accelerator() -> bool:
    import torch  # slow to import, so only where the answer decides

    return torch.accelerator.is_available()


def torchrun_command(
    launcher: list[str], module: str, arguments: list[str], environment: Mapping[str, str]
) -> list[str]:
    """The command that starts what the launcher was asked for.

    Args:
        launcher: command line of `accelerate launch`.
        module: the module to run, with its arguments.
        environment: for MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: the number of processes is not on the command line, or several machines.
    """
    from accelerate.commands.launch import launch_command_parser

    names = [os.path.basename(word) for word in launcher]
    start = next((i for i, name in enumerate(names) if name in LAUNCHERS), len(names))
    options, _ = launch_command_parser().parse_known_args([*launcher[start + 1 :], module])
    if options.num_processes is None or (options.num_machines or 1) > 1:
        raise ValueError(
            "accelerate starts several CPU processes only through MPI: use torchrun"
            f" --nproc_per_node N -m {module}, with ACCELERATE_USE_CPU=true in the environment"
        )
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node", str(options.num_processes),
        "--master_addr", environment["MASTER_ADDR"], "--master_port", environment["MASTER_PORT"],
        "-m", module, *arguments,
    ]  # fmt: skip


def start_cpu_processes(module: str, arguments: list[str]) -> None:
    """Replace this process by the ones that were asked for; does nothing in any other case."""
    if not only_one_was_started(os.environ):
        return
    import psutil

    parent = psutil.Process().parent()
    command = torchrun_command(parent.cmdline() if parent else [], module, arguments, os.environ)
    print(f"starting {command[4]} CPU processes with torchrun", file=sys.stderr, flush=True)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.execv(command[0], command)
