"""Time and memory of the contrastive losses on several processes, against open_clip's exact ones.

    python -m benchmarks.contrastive_worlds [--local 2048] [--worlds 1 2 4] [--quick]

Every process has as many pairs, so the global batch grows with the world. A step is forward and
backward from a process's own unit rows (b, 512) in float32, exchange over gloo included, to their
gradients and those of scale and bias. open_clip's ClipLoss gets `local_loss` and
`gather_with_grad`, the flags that make it exact; SigLipLoss its default exchange. Every case has
its own processes, and the cases of a world take turns. Time is CPU time of a process, which does
not count waiting for another, median over processes and rounds; memory is the peak of a step above
what a process held with its features, the largest of them. The result is kept in
`benchmarks/results/contrastive_worlds_cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, distributed

from benchmarks.contrastive_loss import WIDTH, leaves, step
from benchmarks.machine import RESULTS, machine
from benchmarks.routed_layers import peak_memory, used_memory
from contrastive.gather import gather_rows, rank, world_size
from contrastive.ring import ring_siglip_loss
from contrastive.tiled_losses import tiled_clip_loss, tiled_siglip_loss

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A loss, and how or by whom features are exchanged."""

    loss: str
    exchange: str

    @property
    def label(self) -> str:
        return f"{self.loss}, {self.exchange}"


CASES = (
    Case("clip", "gather"),
    Case("siglip", "gather"),
    Case("siglip", "ring"),
    Case("clip", "open_clip"),
    Case("siglip", "open_clip"),
)


def build(case: Case) -> Callable[[list[Tensor]], Tensor]:
    """The loss of own image rows, own text rows, scale and bias, in a world that is there."""
    if case == Case("clip", "gather"):
        return lambda x: tiled_clip_loss(
            x[0], x[1], gather_rows(x[0]), gather_rows(x[1]), x[2], rank() * len(x[0])
        )[0]
    if case == Case("siglip", "gather"):
        return lambda x: tiled_siglip_loss(x[0], gather_rows(x[1]), x[2], x[3], rank() * len(x[0]))[
            0
        ]
    if case == Case("siglip", "ring"):
        return lambda x: ring_siglip_loss(x[0], x[1], x[2], x[3])[0]
    place = {"rank": rank(), "world_size": world_size()}
    if case.loss == "clip":
        clip = ClipLoss(local_loss=True, gather_with_grad=True, **place)
        return lambda x: clip(x[0], x[1], x[2])
    siglip = SigLipLoss(**place)
    return lambda x: siglip(x[0], x[1], x[2], x[3])


def work(pipe: Connection, case: Case, number: int, world: int, local: int, store: str) -> None:
    """Process `number`: answers "step" with seconds, "memory" with bytes, "loss" with it."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=world
    )
    loss = build(case)
    step(loss, leaves(64, WIDTH, CPU))
    inputs = [  # other rows than those of other processes
        (tensor.detach().roll(number, 1) if tensor.ndim else tensor.detach()).requires_grad_()
        for tensor in leaves(local, WIDTH, CPU)
    ]
    before, value = used_memory(CPU), 0.0
    while (order := pipe.recv()) != "stop":
        if order == "memory":
            pipe.send(peak_memory(CPU) - before)
        elif order == "loss":
            pipe.send(value)
        else:
            start = time.process_time()
            value = step(loss, inputs)
            pipe.send(time.process_time() - start)
    distributed.destroy_process_group()


def measure(world: int, local: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All cases in one world."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once for all
    context.set_forkserver_preload(["benchmarks.contrastive_worlds"])
    pipes: dict[Case, list[Connection]] = {case: [] for case in CASES}
    processes = []
    for case in CASES:
        store = str(folder / f"{world}-{case.loss}-{case.exchange}")
        for number in range(world):
            near_end, far_end = context.Pipe()
            arguments = (far_end, case, number, world, local, store)
            processes.append(context.Process(target=work, args=arguments, daemon=True))
            processes[-1].start()
            far_end.close()
            pipes[case].append(near_end)

    def ask(case: Case, order: str) -> list[float]:
        for pipe in pipes[case]:
            pipe.send(order)
        return [pipe.recv() for pipe in pipes[case]]

    seconds: dict[Case, list[float]] = {}
    peaks: dict[Case, float] = {}
    losses: dict[Case, float] = {}
    for case in CASES:
        ask(case, "step")  # grows the heap and connects the processes
        peaks[case] = max(ask(case, "memory"))
        losses[case], seconds[case] = statistics.mean(ask(case, "loss")), []
    for _ in range(rounds):
        for case in CASES:
            seconds[case].append(statistics.median(ask(case, "step")))
    for case in CASES:
        for pipe in pipes[case]:
            pipe.send("stop")
    for process in processes:
        process.join()
    return [summarise(case, seconds, peaks, losses[case]) for case in CASES]


def summarise(
    case: Case, seconds: dict[Case, list[float]], peaks: dict[Case, float], loss: float
) -> dict[str, Any]:
    """Medians in milliseconds and MiB, also as shares of open_clip's."""
    row: dict[str, Any] = {
        "case": case.label,
        "loss": loss,
        "step_ms": round(1000 * statistics.median(seconds[case]), 1),
        "peak_mib": round(peaks[case] / 2**20, 1),
    }
    other = Case(case.loss, "open_clip")
    if case != other:
        ratios = [a / b for a, b in zip(seconds[case], seconds[other], strict=True)]
        row["time_ratio"] = round(statistics.median(ratios), 3)
        row["memory_ratio"] = round(peaks[case] / peaks[other], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local", type=int, default=2048, help="pairs of each process")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="measurements per case")
    parser.add_argument("--quick", action="store_true", help="512 pairs each, 2 rounds, no file")
    options = parser.parse_args()
    local, rounds = (512, 2) if options.quick else (options.local, options.rounds)
    worlds: dict[int, list[dict[str, Any]]] = {}
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            worlds[world] = measure(world, local, rounds, Path(folder))
        print(f"{world} process(es) of {local} pairs, width {WIDTH}")
        for row in worlds[world]:
            line = f"  {row['case']:18} {row['step_ms']:10.1f} ms {row['peak_mib']:9.1f} MiB"
            if "time_ratio" in row:
                line += f"   time {row['time_ratio']:.2f}, memory {row['memory_ratio']:.3f}"
                line += " of open_clip's"
            print(line, flush=True)
    if not options.quick:
        report = {
            "machine": machine("cpu", 1),
            "width": WIDTH,
            "local_pairs": local,
            "rounds": rounds,
            "worlds": worlds,
        }
        path = RESULTS / "contrastive_worlds_cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
