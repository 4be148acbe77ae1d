"""Time and memory of the tiled contrastive losses against open_clip's and others.

    python -m benchmarks.contrastive_loss [--device cuda] [--dtype bfloat16] [--full] [--quick]

A step is forward and backward from unit rows (B, 512) to their gradients and those of scale and
bias, in one process without others to gather from (`benchmarks.contrastive_worlds` has several).
Every case runs in a fresh process, and the cases of a batch size take turns (A B A B ...), so that
a slow minute of the machine hits all of them. Figures are medians; ratios are medians of the ratios
within one round. The clock is the process's CPU time on a CPU and wall time on a GPU. Memory is the
peak of a step above what the process held with the features. `--full` adds ours at 32768, where
open_clip's logits would need tens of GiB. "linear_cross_entropy" is torch's own chunked operator
(from 2.13), once for each direction. On a GPU `siglip-kernel` takes part where it is installed. The
result is kept in `benchmarks/results/contrastive_loss_<device>.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import RESULTS, machine
from benchmarks.routed_layers import peak_memory, used_memory
from contrastive.tiled_losses import TILE_ROWS, tiled_clip_loss, tiled_siglip_loss

WIDTH = 512
SIZES = (4096, 8192, 16384)
LARGEST = 32768
# Largest allowed share of open_clip's memory and time at the last of SIZES, and MiB at LARGEST.
BARS = {"memory_ratio": 0.05, "time_ratio": 1.1, "largest_mib": 1024}


@dataclass(frozen=True)
class Case:
    """A loss and whose it is."""

    loss: str
    owner: str

    @property
    def label(self) -> str:
        return f"{self.loss}, {self.owner}"


@dataclass(frozen=True)
class Setup:
    """Where and how to run."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    tile_rows: int = TILE_ROWS


OURS = (Case("clip", "ours"), Case("siglip", "ours"))
THEIRS = (Case("clip", "open_clip"), Case("siglip", "open_clip"))
TORCH = Case("clip", "linear_cross_entropy")
KERNEL = Case("siglip", "siglip-kernel")


def cases_on(device: str) -> tuple[Case, ...]:
    """Ours, open_clip's, and what else there is."""
    cases = OURS + THEIRS
    if hasattr(F, "linear_cross_entropy"):
        cases += (TORCH,)
    if device == "cuda" and importlib.util.find_spec("siglip_kernel") is not None:
        cases += (KERNEL,)
    return cases


def build(case: Case, tile_rows: int) -> Callable[[list[Tensor]], Tensor]:
    """The loss of image rows, text rows, scale and bias."""
    if case == OURS[0]:
        return lambda x: tiled_clip_loss(x[0], x[1], x[0], x[1], x[2], tile_rows=tile_rows)[0]
    if case == OURS[1]:
        return lambda x: tiled_siglip_loss(x[0], x[1], x[2], x[3], tile_rows=tile_rows)[0]
    if case == THEIRS[0]:
        clip = ClipLoss()
        return lambda x: clip(x[0], x[1], x[2])
    if case == THEIRS[1]:
        siglip = SigLipLoss()
        return lambda x: siglip(x[0], x[1], x[2], x[3])
    if case == TORCH:
        return lambda x: linear_cross_entropy_clip(x[0], x[1], x[2], tile_rows)
    from siglip_kernel import fused_siglip_loss  # pyrefly: ignore

    return lambda x: fused_siglip_loss(x[0], x[1], x[2].log(), x[3])


def linear_cross_entropy_clip(image: Tensor, text: Tensor, scale: Tensor, tile_rows: int) -> Tensor:
    """The clip loss by torch's operator, which keeps no logits for backward either."""
    own = torch.arange(len(image), device=image.device)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=tile_rows, chunking_method=None)
    by_image = F.linear_cross_entropy(scale * image, text, own, options=options)
    by_text = F.linear_cross_entropy(scale * text, image, own, options=options)
    return (by_image + by_text) / 2


def leaves(
    batch: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Image rows and texts near them, (batch, width) each, scale and bias."""
    torch.manual_seed(0)
    image = torch.randn(batch, width, device=device)
    text = torch.randn(batch, width, device=device).add_(image)
    for rows in (image, text):
        F.normalize(rows, dim=1, out=rows)
    numbers = [torch.tensor(value, device=device) for value in (14.29, -9.7)]
    return [tensor.requires_grad_() for tensor in (image.to(dtype), text.to(dtype), *numbers)]


def step(loss: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> float:
    for tensor in inputs:
        tensor.grad = None
    value = loss(inputs)
    value.backward()
    return float(value.detach())


def work(pipe: Connection, case: Case, batch: int, setup: Setup) -> None:
    """One case: answers an order with seconds of a step, "memory" with bytes, "loss" with it."""
    torch.set_num_threads(setup.threads)
    device, dtype = torch.device(setup.device), getattr(torch, setup.dtype)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    loss, small = build(case, setup.tile_rows), leaves(64, WIDTH, device, dtype)
    step(loss, small)  # libraries take their own memory now
    inputs = leaves(batch, WIDTH, device, dtype)
    before, value = used_memory(device), 0.0
    while (order := pipe.recv()) != "stop":
        if order == "memory":
            pipe.send(peak_memory(device) - before)
        elif order == "loss":
            pipe.send(value)
        else:
            start = clock()
            value = step(loss, inputs)  # reading the value waits for a GPU
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            pipe.send(clock() - start)


def measure(
    cases: tuple[Case, ...], batch: int, setup: Setup, rounds: int
) -> dict[Case, dict[str, Any]]:
    """Loss, seconds of every round and peak bytes, by case."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[Case, Connection] = {}
    processes = []
    for case in cases:
        pipes[case], far_end = context.Pipe()
        arguments = (far_end, case, batch, setup)
        processes.append(context.Process(target=work, args=arguments, daemon=True))
        processes[-1].start()
        far_end.close()

    def ask(case: Case, order: str) -> float:
        pipes[case].send(order)
        return pipes[case].recv()

    found: dict[Case, dict[str, Any]] = {}
    for case in cases:
        ask(case, "step")  # grows the heap and chooses kernels
        found[case] = {"peak_bytes": ask(case, "memory"), "loss": ask(case, "loss"), "seconds": []}
    for _ in range(rounds):
        for case in cases:
            found[case]["seconds"].append(ask(case, "step"))
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()
    return found


def summarise(measured: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians in milliseconds and MiB; as shares of open_clip's too, where it is measured."""
    rows = []
    for case, own in measured.items():
        row: dict[str, Any] = {
            "case": case.label,
            "loss": own["loss"],
            "step_ms": round(1000 * statistics.median(own["seconds"]), 1),
            "peak_mib": round(own["peak_bytes"] / 2**20, 1),
        }
        other = measured.get(Case(case.loss, "open_clip"))
        if case.owner != "open_clip" and other is not None:
            ratios = [a / b for a, b in zip(own["seconds"], other["seconds"], strict=True)]
            row["time_ratio"] = round(statistics.median(ratios), 3)
            row["memory_ratio"] = round(own["peak_bytes"] / other["peak_bytes"], 4)
        rows.append(row)
    return rows


def show(batch: int, rows: list[dict[str, Any]]) -> None:
    print(f"batch {batch}, width {WIDTH}")
    for row in rows:
        line = f"  {row['case']:28} {row['step_ms']:10.1f} ms {row['peak_mib']:9.1f} MiB"
        if "time_ratio" in row:
            line += f"   time {row['time_ratio']:.2f}, memory {row['memory_ratio']:.3f}"
            line += " of open_clip's"
        print(line, flush=True)


def missed_bars(sizes: dict[int, list[dict[str, Any]]]) -> list[str]:
    """Sentences about bars that were measured and missed."""
    missed = []
    for row in sizes.get(SIZES[-1], []):
        if not row["case"].endswith("ours"):
            continue
        for name in ("memory_ratio", "time_ratio"):
            if row.get(name, 0) > BARS[name]:
                missed.append(f"{row['case']}: {name} {row[name]} is over {BARS[name]}")
    for row in sizes.get(LARGEST, []):
        if row["peak_mib"] > BARS["largest_mib"]:
            missed.append(f"{row['case']}: {row['peak_mib']} MiB is over {BARS['largest_mib']}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per case")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per case")
    parser.add_argument("--tile-rows", type=int, default=TILE_ROWS)
    parser.add_argument("--full", action="store_true", help=f"ours at {LARGEST} too")
    parser.add_argument("--quick", action="store_true", help=f"{SIZES[0]} only, 3 rounds, no file")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    setup = Setup(options.device, options.dtype, options.threads, options.tile_rows)
    sizes: dict[int, list[dict[str, Any]]] = {}
    cases = cases_on(options.device)
    runs = [(size, cases) for size in (SIZES[:1] if options.quick else SIZES)]
    for size, some in [*runs, (LARGEST, OURS)] if options.full else runs:
        sizes[size] = summarise(measure(some, size, setup, rounds))
        show(size, sizes[size])
    missed = missed_bars(sizes)
    print("\n".join(missed) or "no bar missed")
    if not options.quick:
        report = {
            "machine": machine(options.device, options.threads),
            "width": WIDTH,
            "dtype": options.dtype,
            "rounds": rounds,
            "tile_rows": options.tile_rows,
            "bars": BARS,
            "missed": missed,
            "sizes": sizes,
        }
        suffix = "" if options.dtype == "float32" else f"_{options.dtype}"
        path = RESULTS / f"contrastive_loss_{options.device}{suffix}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
