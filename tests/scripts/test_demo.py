"""The demo from the shards to the page, with presets of two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from scripts.demo import read_records

ROOT = Path(__file__).parents[2]


def tiny(name: str, changes: dict[str, dict[str, object]], folder: Path) -> str:
    """A copy of a preset with some settings replaced."""
    preset = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
    for section, values in changes.items():
        preset[section] |= values
    path = folder / name
    path.write_text(yaml.safe_dump(preset), encoding="utf-8")
    return str(path)


def test_the_demo_ends_with_a_table_and_a_page(tmp_path: Path) -> None:
    train = {"steps": 2, "batch_size": 8, "eval_every": 1, "log_every": 1}
    schedule = {"warmup_steps": 0}
    command = [
        sys.executable, "-m", "scripts.demo",
        "--run_dir", "out",
        "--pretrain", tiny(
            "demo_pretrain.yaml", {"train": train, "schedule": schedule}, tmp_path
        ),
        "--contrastive", tiny(
            "demo_contrastive.yaml",
            {"train": train, "schedule": schedule},
            tmp_path,
        ),
        "--evaluate", str(ROOT / "configs" / "demo_evaluate.yaml"),
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=tmp_path, env=None, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "seen concepts, top-1 of 1471" in result.stdout
    assert "0.278" in result.stdout  # the pixel yardstick on the same pictures
    records = read_records(tmp_path / "out" / "evaluation.json")
    assert set(records["test", "zeroshot_classification"]) == {
        "acc1", "acc5", "mean_per_class_recall"
    }  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("recall@10", "Contrastive training: loss", "What slots look at", "<figure"):
        assert part in page
