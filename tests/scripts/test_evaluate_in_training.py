"""What is measured in the last step of a run is what the evaluation command measures after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import evaluate, pretrain, train_contrastive
from tests.tiny_models import write_dual_encoder

TEST = "soft_moe_vit_test_patch16_64"


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def settings(shards: Path, run_dir: Path, *sets: dict[str, Any]) -> list[str]:
    return [
        f"--run_dir={run_dir}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
        "--train.steps=4", "--train.batch_size=8", "--train.threads=1", "--optimizer.lr=0.1",
        "--train.ema_decay=0.9", f"--evaluation={json.dumps(sets)}",
    ]  # fmt: skip


def figures_of_the_run(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "eval.jsonl").read_text().splitlines()[-1])


def figures_of_the_command(run_dir: Path, weights: str, own: dict[str, Any]) -> dict[str, float]:
    words = [f"--model={run_dir}", f"--weights={weights}", f"--evaluation={json.dumps([own])}"]
    config = evaluate.parse_config(evaluate.EvaluateRun, [*words, "--threads=1"], "")
    found = {}
    for record in evaluate.evaluate(config):
        prefix = f"{record['task']}_" if record["task"] in ("knn", "linear_probe") else ""
        found |= {f"{prefix}{name}": value for name, value in record["metrics"].items()}
    return found


def assert_same(run_dir: Path, own: dict[str, Any], expected: set[str]) -> None:
    logged = figures_of_the_run(run_dir)
    for weights, prefix in (("checkpoint", "val/"), ("average", "ema/val/")):
        found = figures_of_the_command(run_dir, weights, own)
        assert expected <= found.keys()
        assert {name: logged[prefix + name] for name in found} == found


def test_all_tasks_of_a_dual_encoder(shards: Path, tmp_path: Path) -> None:
    own = {
        "name": "val", "shards": f"{shards}/train-1.tar", "train_shards": f"{shards}/train-0.tar",
        "classnames": f"{shards}/classnames.txt", "caption_key": "txt", "batch_size": 5,
        "tasks": ["zero_shot_classification", "retrieval", "few_shot", "linear_probe", "knn"],
    }  # fmt: skip
    train_contrastive.main([
        *settings(shards, tmp_path / "run", own), f"--image.name={TEST}", "--text.width=16",
        "--text.heads=2", "--text.layers=1", "--text.context_length=8",
        "--contrastive.embed_dim=8",
    ])  # fmt: skip
    expected = {"acc1", "text_retrieval_recall@1", "10shot_acc1", "linear_probe_acc1", "knn_acc1"}
    assert_same(tmp_path / "run", own, expected)
    logged = figures_of_the_run(tmp_path / "run")
    ranks = ("val/text_retrieval_mean_rank", "ema/val/text_retrieval_mean_rank")
    assert logged[ranks[0]] != logged[ranks[1]]  # the average is another model


def test_probes_of_a_classifier_beside_its_own_accuracy(shards: Path, tmp_path: Path) -> None:
    labelled = {"shards": f"{shards}/train-1.tar", "classnames": f"{shards}/classnames.txt"}
    own = labelled | {
        "name": "val", "train_shards": f"{shards}/train-0.tar",
        "tasks": ["few_shot", "linear_probe", "knn"],
    }  # fmt: skip
    words = settings(shards, tmp_path / "run", {"name": "plain", **labelled}, own)
    words += [f"--data.classnames={shards}/classnames.txt", f"--model.name={TEST}"]
    pretrain.main(words)
    assert_same(tmp_path / "run", own, {"10shot_acc1", "linear_probe_acc1", "knn_acc5"})
    assert "plain/acc1" in figures_of_the_run(tmp_path / "run")


def test_a_run_without_an_average_has_none(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_dual_encoder(tmp_path / "run")
    own = json.dumps([{"shards": f"{shards}/train-1.tar", "caption_key": "txt"}])
    with pytest.raises(SystemExit):
        evaluate.main([f"--model={folder}", "--weights=average", f"--evaluation={own}"])
    assert "has no averaged weights: train with --train.ema_decay" in capsys.readouterr().err
