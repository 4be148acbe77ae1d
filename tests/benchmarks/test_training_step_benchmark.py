"""The benchmark's loops do the same work."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import training_loops
from benchmarks.training_loops import LOOPS, Turns, batches, build
from benchmarks.training_step import QUICK, SETTINGS
from training.objective import Objective


def weights_after_two_steps(
    loop: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    built: list[Objective] = []
    monkeypatch.setattr(
        training_loops, "build", lambda setting: built.append(build(setting)) or built[0]
    )
    here, there = Pipe()
    here.send(2)
    here.send("stop")
    turns = Turns(there, batches(QUICK), torch.device("cpu"), run_dir)
    try:
        LOOPS[loop](QUICK, turns, "fp32", False)
    except StopIteration:  # what the engine makes of a stream that ends
        assert loop == "engine"
    seconds, memory = here.recv()
    assert seconds > 0
    assert memory > 0
    return built[0].state_dict()


@pytest.mark.usefixtures("fresh_accelerate")
def test_all_loops_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = build(QUICK).state_dict()
    bare = weights_after_two_steps("bare", tmp_path, monkeypatch)
    engine = weights_after_two_steps("engine", tmp_path, monkeypatch)
    theirs = weights_after_two_steps("open_clip", tmp_path, monkeypatch)
    name = "model.visual.trunk.blocks.0.attn.qkv.weight"
    moved = float((bare[name] - start[name]).abs().max())
    assert moved > 1e-7
    # The engine's warm-up has no steps, so its rates are the bare loop's; open_clip decays more.
    torch.testing.assert_close(engine, bare, rtol=1e-5, atol=1e-7)
    assert float((theirs[name] - bare[name]).abs().max()) < moved / 10


def test_operations_are_counted_without_computing() -> None:
    dense = next(setting for setting in SETTINGS if setting.label == "ViT S/16")
    # Table 1 of arXiv 2308.00951: 9.2 GFLOP per image; the backward pass takes twice as many.
    assert (build(dense).training_flops() or 0) / 1e9 == pytest.approx(3 * 9.2, rel=0.02)
