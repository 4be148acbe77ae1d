"""Exports of runs that average their weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import export, train_contrastive

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


def test_averages_of_a_run_are_those_that_its_weights_give(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = tmp_path / "run"
    train_contrastive.main([
        f"--run_dir={run}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
        "--train.steps=3", "--train.batch_size=8", "--train.threads=1", "--train.save_every=1",
        "--train.keep_last=9", "--train.ema_decay=0.2", "--train.ema_export=true",
        "--image.name=soft_moe_vit_test_patch16_64", "--contrastive.embed_dim=8", "--text.width=16",
        "--text.heads=2", "--text.layers=1", "--text.context_length=12", "--optimizer.lr=0.1",
    ])  # fmt: skip
    found = {}
    for step, which in (
        (1, "average"), (2, "average"), (2, "training"), (3, "training"), (3, "checkpoint"),
    ):  # fmt: skip
        out = tmp_path / f"{which}{step}"
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        export.main([str(checkpoint), f"--out={out}", f"--weights={which}"])
        found[which, step] = load_file(out / WEIGHTS)
    found["average", 3] = found["checkpoint", 3]  # as train.ema_export has it
    # The average keeps min(0.2, (1 + n) / (10 + n)) of itself after n updates.
    for step, kept in ((2, 2 / 11), (3, 0.2)):
        before, present = found["average", step - 1], found["training", step]
        for name, value in found["average", step].items():
            torch.testing.assert_close(value, torch.lerp(present[name], before[name], kept))
        moved = "visual.trunk.blocks.1.mlp.phi"
        assert not torch.allclose(found["average", step][moved], present[moved], atol=1e-3)
