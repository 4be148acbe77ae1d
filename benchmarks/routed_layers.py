"""Time and memory of routed layers against a dense MLP and public Soft MoE packages.

    python -m benchmarks.routed_layers [--device cuda] [--threads 1] [--quick]

Peers are skipped when they are not installed. To measure them without touching the environment:

    pip install --no-deps --target /tmp/peers soft-moe-pytorch soft_moe einops
    PYTHONPATH=/tmp/peers python -m benchmarks.routed_layers

Every case runs in a process of its own, as a model that is trained alone, and the cases of a
setting take turns (A B C A B C ...), so that a slow minute of the machine hits all of them. Figures
are medians; ratios are medians of the ratios within one round. The clock is the process's CPU time
on a CPU, which other programs on the machine disturb least, and wall time on a GPU. A training step
is forward and backward with a gradient for the tokens and all parameters, released in between as
`zero_grad()` does. Memory is the peak of a training step above the built model. The result is
kept in `benchmarks/results/routed_layers_<device>.json`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import platform
import resource
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from timm.layers import GELUTanh
from torch import Tensor, nn

from benchmarks.machine import RESULTS, machine
from encoders.expert_products import batched_expert_mlp
from encoders.experts import ExpertMLP
from encoders.soft_moe import SoftMoE

TOKENS = 196
PASSES = ("forward", "training")


@dataclass(frozen=True)
class Case:
    """A layer `module.name(width, **arguments)`, and the case that its figures are divided by."""

    label: str
    module: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    against: str | None = None


@dataclass(frozen=True)
class Setting:
    """Cases that take turns on the same tokens, (batch, 196, width)."""

    label: str
    batch: int
    width: int
    cases: tuple[Case, ...]


class BatchedExperts(ExpertMLP):
    """Batched over the bank on every device, as a GPU runs it."""

    def forward(self, x: Tensor) -> Tensor:
        bank = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return batched_expert_mlp(x, *bank)


class BatchedSoftMoE(SoftMoE):
    """Soft MoE on batched experts."""

    def __init__(self, dim: int, num_experts: int, slots_per_expert: int) -> None:
        super().__init__(dim, num_experts, slots_per_expert)
        self.experts = BatchedExperts(num_experts, dim, 4 * dim)


def soft(experts: int, slots: int, against: str | None = "dense MLP") -> Case:
    arguments = {"num_experts": experts, "slots_per_expert": slots}
    return Case(f"SoftMoE {experts}x{slots}", "encoders.soft_moe", "SoftMoE", arguments, against)


def others(experts: int, slots: int) -> tuple[Case, ...]:
    """The batched form and the PyPI packages; how many times ours they take."""
    ours, shape = f"SoftMoE {experts}x{slots}", f"{experts}x{slots}"
    lucidrains = {"num_experts": experts, "num_slots": slots}
    bwconrad = {"num_experts": experts, "slots_per_expert": slots}
    return (
        Case(f"batched {shape}", "benchmarks.routed_layers", "BatchedSoftMoE", bwconrad, ours),
        Case(f"soft-moe-pytorch {shape}", "soft_moe_pytorch", "SoftMoE", lucidrains, ours),
        Case(f"soft_moe {shape}", "soft_moe", "SoftMoELayerWrapper", bwconrad, ours),
    )


# The dense twin of our vision transformers has tanh GELU, as the reference and our experts.
DENSE = Case("dense MLP", "timm.layers", "Mlp", {"act_layer": GELUTanh})
TOKENS_CHOICE = Case("TokensChoice 32", "encoders.sparse_moe", "TokensChoice", {"num_experts": 32})
EXPERTS_CHOICE = replace(TOKENS_CHOICE, label="ExpertsChoice 32", name="ExpertsChoice")
SPARSE = tuple(replace(case, against=DENSE.label) for case in (TOKENS_CHOICE, EXPERTS_CHOICE))
SETTINGS = (
    Setting("S/16, 32 experts", 16, 384, (DENSE, soft(32, 6), *others(32, 6), *SPARSE)),
    Setting("S/16, 196 experts", 16, 384, (DENSE, soft(196, 1), *others(196, 1))),
    Setting("S/16, more experts", 16, 384, (DENSE, soft(16, 12), soft(49, 4), soft(98, 2))),
    Setting("S/16, batch 64", 64, 384, (soft(16, 8, None), soft(128, 1, "SoftMoE 16x8"))),
    Setting("B/16, 32 experts", 16, 768, (DENSE, soft(32, 6), *others(32, 6), *SPARSE)),
    Setting("B/16, more experts", 16, 768, (DENSE, soft(16, 12), soft(98, 2), soft(196, 1))),
)


def build(case: Case, width: int) -> nn.Module:
    """The layer with experts of hidden width 4 * width."""
    layer = getattr(importlib.import_module(case.module), case.name)
    if case.name == "Mlp":
        return layer(width, 4 * width, **case.arguments)
    if case.name == "SoftMoELayerWrapper":  # takes the expert's class and its arguments
        # With torch's default GELU, which is its faster one on some CPUs.
        expert = partial(build, replace(DENSE, arguments={}), width)
        return layer(width, layer=expert, **case.arguments)
    return layer(width, **case.arguments)


def run_pass(layer: nn.Module, tokens: Tensor, name: str) -> None:
    if name == "forward":
        with torch.no_grad():
            layer(tokens)
        return
    layer.zero_grad()
    tokens.grad = None
    # A plain sum would hand on a gradient without memory of its own.
    layer(tokens).square().sum().backward()


def used_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(
    pipe: Connection, case: Case, batch: int, width: int, device_name: str, threads: int
) -> None:
    """One case: answers the name of a pass with its seconds, and "memory" with bytes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    layer = build(case, width).to(device)
    tokens = torch.randn(batch, TOKENS, width, device=device, requires_grad=True)
    before = used_memory(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    while (order := pipe.recv()) != "stop":
        if order == "memory":
            pipe.send(peak_memory(device) - before)
            continue
        start = clock()
        run_pass(layer, tokens, order)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        pipe.send(clock() - start)


def present(case: Case) -> bool:
    try:
        return importlib.util.find_spec(case.module) is not None
    except ModuleNotFoundError:
        return False


def measure(setting: Setting, device: str, threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round and peak bytes, by case."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for case in setting.cases:
        if not present(case):
            print(f"  {case.label}: skipped, no module {case.module}")
            continue
        pipes[case.label], far_end = context.Pipe()
        arguments = (far_end, case, setting.batch, setting.width, device, threads)
        processes.append(context.Process(target=work, args=arguments, daemon=True))
        processes[-1].start()
        far_end.close()

    def ask(label: str, order: str) -> float:
        pipes[label].send(order)
        return pipes[label].recv()

    seconds: dict[str, dict[str, Any]] = {label: {name: [] for name in PASSES} for label in pipes}
    for label in pipes:
        for _ in range(2):  # the first passes grow the heap and choose kernels
            ask(label, "training")
        seconds[label]["peak_bytes"] = ask(label, "memory")
    for name in PASSES:
        for _ in range(rounds):
            for label in pipes:
                seconds[label][name].append(ask(label, name))
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()
    return seconds


def summarise(setting: Setting, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians in milliseconds and MiB, and the ratios to the case that each is held against."""
    rows = []
    for case in setting.cases:
        if case.label not in measured:
            continue
        own = measured[case.label]
        row: dict[str, Any] = {"case": case.label}
        for name in PASSES:
            row[f"{name}_ms"] = round(1000 * statistics.median(own[name]), 2)
            row[f"{name}_min_ms"] = round(1000 * min(own[name]), 2)
        row["peak_mib"] = round(own["peak_bytes"] / 2**20, 1)
        if case.against in measured:
            other = measured[case.against]
            row["against"] = case.against
            for name in PASSES:
                ratios = [a / b for a, b in zip(own[name], other[name], strict=True)]
                row[f"{name}_ratio"] = round(statistics.median(ratios), 3)
            row["peak_ratio"] = round(own["peak_bytes"] / other["peak_bytes"], 3)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"  {'case':24} {'forward':>9} {'training':>9} {'peak MiB':>9}   ratios")
    for row in rows:
        line = f"  {row['case']:24} {row['forward_ms']:9.1f} {row['training_ms']:9.1f}"
        line += f" {row['peak_mib']:9.0f}"
        if "against" in row:
            ratios = (row["forward_ratio"], row["training_ratio"], row["peak_ratio"])
            line += "   " + " / ".join(f"{ratio:.2f}" for ratio in ratios)
            line += f" of {row['against']}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per case")
    parser.add_argument("--rounds", type=int, default=11, help="measurements per case and pass")
    parser.add_argument("--quick", action="store_true", help="first setting, 3 rounds, no file")
    options = parser.parse_args()
    device, threads = options.device, options.threads
    rounds = 3 if options.quick else options.rounds
    report: dict[str, Any] = {"machine": machine(device, threads), "rounds": rounds, "settings": []}
    for setting in SETTINGS[:1] if options.quick else SETTINGS:
        print(f"{setting.label}: batch {setting.batch}, {TOKENS} tokens, width {setting.width}")
        rows = summarise(setting, measure(setting, device, threads, rounds))
        show(rows)
        described = {key: value for key, value in asdict(setting).items() if key != "cases"}
        report["settings"].append(described | {"rows": rows})
    if not options.quick:
        path = RESULTS / f"routed_layers_{device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
