"""Two processes train like one with the same global batch; a killed command continues."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS = 6
CLOCK = {"time", "samples_per_second", "data_wait", "memory_gb", "tflops", "mfu"}


def arguments(shards: Path, run_dir: Path) -> list[str]:
    evaluation = {
        "name": "own", "shards": f"{shards}/train-*.tar", "classnames": f"{shards}/classnames.txt",
        "caption_key": "txt", "batch_size": 5,
    }  # fmt: skip
    return [
        f"--run_dir={run_dir}", "--image.name=soft_moe_vit_test_patch16_64",
        f"--data.shards={shards}/train-*.tar", "--text.width=16", "--text.heads=2",
        "--text.layers=1", "--text.context_length=8", "--contrastive.embed_dim=8",
        f"--train.steps={STEPS}", "--train.batch_size=8", "--train.log_every=1",
        "--train.threads=1", "--train.save_every=2", "--data.workers=0", "--optimizer.lr=0.001",
        f"--evaluation=[{json.dumps(evaluation)}]",
    ]  # fmt: skip


def rows(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    lines = (run_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def final_files(run_dir: Path) -> dict[str, bytes]:
    final = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    files = {str(p.relative_to(final)): p.read_bytes() for p in final.rglob("*") if p.is_file()}
    manifest = json.loads(files["manifest.json"])
    del manifest["clock"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory, run_python: Any) -> Path:
    """The run directory of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    result = run_python("-m", "scripts.train_contrastive", *arguments(shards, run_dir))
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(
    alone: Path, shards: Path, tmp_path: Path, run_python: Any
) -> None:
    run_dir = tmp_path / "run"
    result = run_python(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2",
        f"--main_process_port={free_port()}", "-m", "scripts.train_contrastive",
        *arguments(shards, run_dir),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es) on cpu" in result.stdout
    expected, found = rows(alone), rows(run_dir)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, expected, strict=True):
        # How unequal experts are is measured by each process for its own images.
        own = {name for name in theirs if name.endswith("_cv")}
        assert {k: v for k, v in ours.items() if k not in own} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in own}, rel=1e-4
        )
    (figures,), (expected_figures,) = rows(run_dir, "eval"), rows(alone, "eval")
    assert figures.pop("own/acc5") is expected_figures.pop("own/acc5") is None  # of four classes
    assert figures == pytest.approx(expected_figures, rel=1e-3)
    assert {"rng/rank_0.safetensors", "rng/rank_1.safetensors"} < set(final_files(run_dir))
    weights = "open_clip_model.safetensors"
    final = Path("checkpoints") / f"step_{STEPS:08d}" / weights
    one, two = load_file(alone / final), load_file(run_dir / final)
    for name in one:
        # The gradient of a key's bias is zero but for rounding, which Adam turns into steps.
        if not name.endswith(("in_proj_bias", "qkv.bias")):
            assert float((two[name] - one[name]).abs().max()) < 1e-5, name
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.01  # something was learnt


# Runs the command and kills its own process when the third checkpoint gets its name.
KILLED = """
import os, signal, sys
from scripts.train_contrastive import main
names = 0
def watch(event, arguments):
    global names
    if event == "os.rename" and "step_" in str(arguments[1]):
        names += 1
        if names == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_end(
    alone: Path, shards: Path, tmp_path: Path, run_python: Any
) -> None:
    run_dir = tmp_path / "run"
    killed = run_python("-c", KILLED, *arguments(shards, run_dir))
    assert killed.returncode == -signal.SIGKILL
    assert len(rows(run_dir)) == STEPS
    assert len(rows(run_dir, "eval")) == 1
    continued = [*arguments(shards, run_dir), "--resume=auto"]
    result = run_python("-m", "scripts.train_contrastive", *continued)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 4" in result.stdout
    assert final_files(run_dir) == final_files(alone)
    assert rows(run_dir) == rows(alone)
    assert rows(run_dir, "eval") == rows(alone, "eval")
