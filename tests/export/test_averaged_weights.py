"""Exports of runs that average their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import export

WEIGHTS = "open_clip_model.safetensors"


def test_averaged_weights_or_those_in_training(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(exports / "clip" / "source", source)
    present = load_file(source / WEIGHTS)
    with pytest.raises(SystemExit):
        export.main([str(source), f"--out={tmp_path}/none", "--weights=average"])
    assert "has no averaged weights" in capsys.readouterr().err

    name = "visual.trunk.norm.weight"  # the only one that was trained
    average = {name: torch.full_like(present[name], 3), "updates": torch.tensor(7)}
    trained = present | {name: torch.full_like(present[name], 5)}
    save_file(average, source / "average.safetensors")
    save_file(trained, source / "training_weights.safetensors")
    for which, value in (("average", 3.0), ("training", 5.0), ("checkpoint", None)):
        out = tmp_path / which
        export.main([str(source), f"--out={out}", f"--weights={which}"])
        found = load_file(out / WEIGHTS)
        expected = present[name] if value is None else torch.full_like(present[name], value)
        assert torch.equal(found.pop(name), expected)
        assert all(torch.equal(found[key], present[key]) for key in found)
        assert ("moving average" in (out / "README.md").read_text()) == (value is not None)
