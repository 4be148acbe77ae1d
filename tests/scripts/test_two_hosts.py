"""Two launchers that know each other by an address only, as on two machines, train as one process.

The recipe is that of docs/multi_node.md. One process of each host divides all parameters with the
other, as `accelerate launch --use_fsdp --fsdp_version 2` asks for, so that everything which can
cross hosts does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.scripts.test_two_processes import arguments, free_port, rows

STEPS = 3


def on_a_host(command: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_hosts_learn_what_one_process_learns(shards: Path, tmp_path: Path) -> None:
    module = "scripts.train_contrastive"
    short = [f"--train.steps={STEPS}", "--train.eval_every=2"]
    rendezvous = [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
        "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test",
        "-m", module,
    ]  # fmt: skip
    configured = {
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"
    }  # fmt: skip
    alone = on_a_host(["-m", module, *arguments(shards, tmp_path / "alone"), *short])
    hosts = [
        on_a_host([*rendezvous, *arguments(shards, tmp_path / "hosts"), *short], **configured)
        for _ in range(2)
    ]
    results = [(host.communicate(timeout=250), host.returncode) for host in (alone, *hosts)]
    for (_, errors), code in results:
        assert code == 0, errors[-3000:]
    printed = [output for (output, _), _ in results]
    assert sum("2 process(es) on cpu" in output for output in printed) == 1

    for kind in ("metrics", "eval"):
        pairs = zip(rows(tmp_path / "hosts", kind), rows(tmp_path / "alone", kind), strict=True)
        for found, expected in pairs:
            # How unequal experts are is measured by each process for its own images.
            kept = [k for k, v in expected.items() if v is not None and not k.endswith("_cv")]
            assert {k: found[k] for k in kept} == pytest.approx(
                {k: expected[k] for k in kept}, rel=1e-3
            )
    final = f"checkpoints/step_{STEPS:08d}/open_clip_model.safetensors"
    ours, theirs = load_file(tmp_path / "hosts" / final), load_file(tmp_path / "alone" / final)
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
