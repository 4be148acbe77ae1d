"""The figures of a card are of the weights in its folder: averaged ones, or those in training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from eval.subject import weights_hash
from scripts import evaluate, export, pretrain, train_contrastive

TEST = "soft_moe_vit_test_patch16_64"
TASKS = ["zero_shot_classification", "retrieval", "knn"]
ROW = re.compile(r"^\| (val/\S+) \| (\S+) \| (.+) \|$", re.MULTILINE)


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def evaluation_set(shards: Path, *tasks: str) -> dict[str, Any]:
    return {
        "name": "val", "shards": f"{shards}/train-1.tar", "train_shards": f"{shards}/train-0.tar",
        "classnames": f"{shards}/classnames.txt", "caption_key": "txt", "tasks": tasks,
    }  # fmt: skip


def settings(run: Path, shards: Path, *tasks: str) -> list[str]:
    return [
        f"--run_dir={run}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
        "--train.steps=3", "--train.batch_size=8", "--train.threads=1", "--optimizer.lr=0.1",
        "--train.save_every=1", "--train.eval_every=2", "--train.keep_last=9",
        f"--evaluation={json.dumps([evaluation_set(shards, *tasks)])}",
    ]  # fmt: skip


def train(run: Path, shards: Path, *more: str) -> Path:
    """The run directory of three steps, which are evaluated after the second and the third."""
    train_contrastive.main([
        *settings(run, shards, *TASKS), f"--image.name={TEST}", "--text.width=16",
        "--text.heads=2", "--text.layers=1", "--text.context_length=8",
        "--contrastive.embed_dim=8", *more,
    ])  # fmt: skip
    return run


def card(model: Path, out: Path, weights: str, target: str = "open_clip") -> str:
    export.main([str(model), f"--out={out}", f"--weights={weights}", f"--to={target}"])
    return (out / "README.md").read_text()


def shown(text: str) -> dict[str, tuple[str, str]]:
    """Value and interval of each figure, by name."""
    return {name: (value, interval) for name, value, interval in ROW.findall(text)}


def logged(run: Path, step: int, prefix: str) -> dict[str, tuple[str, str]]:
    """What a card has to show of the evaluation in training, of names that begin with `prefix`."""
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == step]
    return {
        name.removeprefix("ema/"): (f"{value:.4f}", "-")
        for name, value in row.items()
        if name.startswith(prefix) and value is not None
    }


def recorded(path: Path) -> dict[str, tuple[str, str]]:
    """What a card has to show of the records of the evaluation command."""
    found = {}
    for record in json.loads(path.read_text()):
        prefix = "knn_" if record["task"] == "knn" else ""
        for name, value in record["metrics"].items():
            if value is not None:
                interval = "{:.4f} to {:.4f}".format(*record["ci95"][name])
                found[f"val/{prefix}{name}"] = f"{value:.4f}", interval
    return found


def test_records_are_shown_of_the_weights_that_they_measured(shards: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", shards, "--train.ema_decay=0.9")
    own = json.dumps([evaluation_set(shards, *TASKS)])
    record = run / "evaluation.json"
    evaluate.main([
        f"--model={run}", "--weights=average", f"--evaluation={own}", f"--output={record}",
        "--threads=1",
    ])  # fmt: skip
    expected = recorded(record)
    assert {"val/acc1", "val/knn_acc1", "val/text_retrieval_mean_rank"} <= expected.keys()

    average = card(run, tmp_path / "average", "average")
    assert shown(average) == expected
    assert "Measured on the moving average (of step 3):" in average
    assert shown(card(run, tmp_path / "tower", "average", "timm")) == expected  # its image tower

    for weights in ("checkpoint", "training"):  # of which the run itself has measured the same
        text = card(run, tmp_path / weights, weights)
        assert shown(text) == logged(run, 3, "val/")
        assert shown(text) != {name: (value, "-") for name, (value, _) in expected.items()}
        assert "Measured on the weights in training (of step 3):" in text

    # The average of an earlier checkpoint is none that the records measured.
    earlier = card(run / "checkpoints" / "step_00000002", tmp_path / "earlier", "average")
    assert shown(earlier) == logged(run, 2, "ema/val/")


def test_evaluations_in_training_are_shown_of_the_weights_that_they_measured(
    shards: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", shards, "--train.ema_decay=0.9", "--train.ema_export=true")
    for weights, prefix, words in (
        ("checkpoint", "ema/val/", "Measured on the moving average (of step 3):"),
        ("average", "ema/val/", "Measured on the moving average (of step 3):"),
        ("training", "val/", "Measured on the weights in training (of step 3):"),
    ):
        text = card(run, tmp_path / weights, weights)
        assert shown(text) == logged(run, 3, prefix)
        assert words in text
    assert logged(run, 3, "ema/val/") != logged(run, 3, "val/")

    rows = (run / "eval.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["step"] == 2
    (run / "eval.jsonl").write_text(f"{rows[0]}\n")  # as of a run that saves more than it evaluates
    text = card(run, tmp_path / "late", "checkpoint")
    assert shown(text) == logged(run, 2, "ema/val/")
    assert (
        "Measured on the moving average (of step 2), not on the weights of this folder, which are"
        " of step 3:" in text
    )


def test_an_average_that_was_never_measured_has_no_figures(shards: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", shards, "--train.ema_decay=0.9", "--train.ema_evaluate=false")
    assert shown(card(run, tmp_path / "training", "training")) == logged(run, 3, "val/")
    text = card(run, tmp_path / "average", "average")
    assert not shown(text)
    assert "No evaluation was recorded" in text


def test_a_classifier_has_the_figures_of_its_own_weights(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain.main([
        *settings(run, shards, "knn"), "--train.ema_decay=0.9", f"--model.name={TEST}",
        f"--data.classnames={shards}/classnames.txt",
    ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    own = json.dumps([evaluation_set(shards, "knn")])
    record = run / "evaluation.json"
    evaluate.main([
        f"--model={run}", f"--evaluation={own}", f"--output={record}", "--threads=1",
    ])  # fmt: skip
    assert shown(card(run, tmp_path / "checkpoint", "checkpoint", "timm")) == recorded(record)
    assert shown(card(run, tmp_path / "average", "average", "timm")) == logged(run, 3, "ema/val/")


def test_weights_are_hashed_only_to_find_their_records(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path / "run", shards)
    hashed: list[Any] = []

    def counting(model: Any) -> str:
        hashed.append(model)
        return weights_hash(model)

    monkeypatch.setattr("scripts.export_source.weights_hash", counting)
    card(run, tmp_path / "one", "checkpoint")
    assert not hashed
    (run / "evaluation.json").write_text(json.dumps([{"weights_sha256": "of others"}]))
    card(run, tmp_path / "two", "checkpoint")
    assert len(hashed) == 1
