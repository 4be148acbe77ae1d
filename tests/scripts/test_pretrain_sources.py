"""Pretraining on a folder and on a table: from start to end, and through an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
from datasets import ClassLabel, Dataset, Features
from safetensors.torch import load_file

from scripts import pretrain

NAMES = ["ant", "bee"]


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def pictures(shards: Path) -> list[bytes]:
    """Ten encoded pictures."""
    from data_pipelines.shards import ShardReader, expand_shards, index_shards

    reader = ShardReader(index_shards(expand_shards(f"{shards}/train-0.tar")))
    return [reader.read(sample, "png") or b"" for sample in range(10)]


def arguments(run_dir: Path, *more: str) -> list[str]:
    return [
        f"--run_dir={run_dir}", "--model.name=soft_moe_vit_test_patch16_64", "--train.steps=4",
        "--train.save_every=2", "--train.batch_size=4", "--train.threads=1",
        "--data.augmentation.recipe=inception", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "workers"), [("folder", 0), ("table", 1)])
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(
    kind: str, workers: int, pictures: list[bytes], tmp_path: Path
) -> None:
    if kind == "folder":
        for number, data in enumerate(pictures):
            path = tmp_path / "data" / NAMES[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        source = f"--data.folder={tmp_path}/data"
    else:
        features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
        rows: list[dict[str, Any]] = [
            {"image": {"bytes": data, "path": None}, "label": number % 2}
            for number, data in enumerate(pictures)
        ]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
        source = f"--data.dataset={tmp_path}/rows.parquet"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = (source, f"--data.workers={workers}")
    pretrain.main(arguments(whole, *options))
    first, last = sorted((whole / "checkpoints").iterdir())
    # Step 2 of batches of 4 from 10 pictures lies in mid-epoch. A run that was killed after it
    # leaves this checkpoint, and no later one.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / last.name)
    pretrain.main(arguments(cut, *options, "--resume=auto"))
    for file in sorted(last.glob("*.safetensors")):
        one, other = load_file(file), load_file(cut / "checkpoints" / last.name / file.name)
        assert all(one[name].equal(other[name]) for name in one)
        assert one.keys() == other.keys()
    model = timm.create_model(f"local-dir:{last}", pretrained=True)
    assert model.num_classes == 2
    assert json.loads((last / "config.json").read_text())["label_names"] == NAMES
    assert model.pretrained_cfg["label_names"] == NAMES
    assert first.name != last.name
