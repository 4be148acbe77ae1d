"""Training with inductor, really compiled where there is a C++ compiler, and a stop meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_loop import metrics

# Asks itself to stop when the graph of the backward pass begins to be compiled; then goes on.
STOPPED = """
import os, signal, sys
from pathlib import Path
from torch._dynamo.callback import on_compile_start
from tests.training.test_loop import make_trainer, quiet
folder = Path(sys.argv[1])
begun = []
def begins(_):
    begun.append(1)
    if len(begun) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
on_compile_start(begins)
def compiled(**more):
    return make_trainer(
        folder / "compiled", quiet, compile="inductor", log_routing=False, steps=3, **more
    )
first = compiled()
first.fit()
print("stopped by", first.stopped, "after step", first.step, "graphs", len(begun))
compiled(resume=first.last_checkpoint).fit()
make_trainer(folder / "eager", quiet, steps=3).fit()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
def test_a_stop_while_inductor_compiles_waits_for_it_and_keeps_the_step(
    tmp_path: Path, run_python: Any
) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_python("-c", STOPPED, tmp_path, timeout=280, **cache)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "stopped by SIGTERM after step 1 graphs 2" in result.stdout
    assert list((tmp_path / "cache").rglob("*.so"))  # something was compiled
    compiled, eager = metrics(tmp_path / "compiled"), metrics(tmp_path / "eager")
    for ours, theirs in zip(compiled, eager, strict=True):
        assert ours.pop("skipped_reasons", None) == theirs.pop("skipped_reasons", None)
        assert ours == pytest.approx(theirs, rel=1e-4)
