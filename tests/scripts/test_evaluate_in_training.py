"""What is measured in the last step of a run is what the evaluation command measures after it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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


def write_folder(root: Path, *splits: str) -> Path:
    """Pictures of two colours in each split of an image folder."""
    for shade, split in enumerate(splits):
        for name, colour in (("red", (220, 40, 40)), ("blue", (50, 60, 220))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = tuple(value - 8 * number - shade for value in colour)
                Image.new("RGB", (16, 16), pixels).save(folder / f"{number}.png")
    return root


def test_sets_of_pretraining_that_name_no_tasks(shards: Path, tmp_path: Path) -> None:
    """Shards of its classes, a folder, and shards of other classes in CLIP_benchmark's layout."""
    folder = write_folder(tmp_path / "folder", "train", "test")
    other = tmp_path / "other"
    for split, number in (("train", 0), ("test", 1)):
        (other / split).mkdir(parents=True)
        shutil.copy(shards / f"train-{number}.tar", other / split)
    names = (shards / "classnames.txt").read_text()
    (other / "classnames.txt").write_text(f"{names}black\n")
    plain = {"name": "plain", "shards": f"{shards}/train-1.tar"}
    sets = [plain, {"data": str(folder)}, {"data": str(other)}]
    pretrain.main([
        *settings(shards, tmp_path / "run", *sets), f"--model.name={TEST}",
        f"--data.classnames={shards}/classnames.txt", "--train.ema_decay=0",
    ])  # fmt: skip
    logged = figures_of_the_run(tmp_path / "run")
    probes = {"10shot_acc1", "knn_acc1", "knn_acc5", "knn_mean_per_class_recall"}
    expected = {"plain": {"acc1", "acc5", "mean_per_class_recall"}, "folder": probes}
    for own, figures in (expected | {"other": probes}).items():
        assert {n.removeprefix(f"{own}/") for n in logged if n.startswith(f"{own}/")} == figures
    assert logged["folder/knn_acc1"] == 1.0

    # The evaluation command takes the same of this model.
    config = evaluate.parse_config(
        evaluate.EvaluateRun, [f"--model={tmp_path / 'run'}", f"--data={folder}", "--threads=1"], ""
    )
    records = evaluate.evaluate(config)
    assert [record["task"] for record in records] == ["few_shot", "knn"]


def test_an_image_encoder_has_nothing_to_measure_without_a_training_split(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "folder", "test")
    (tmp_path / "two.txt").write_text("red\nblue\n")
    others = {"shards": f"{shards}/train-1.tar", "classnames": str(tmp_path / "two.txt")}
    messages = (
        r"measures nothing: .* has no text tower, and probes need single labels and a training",
        r"has other classnames \(2\) than the classifier \(4\), or another order: leave classnames",
    )
    for number, own in enumerate(({"data": str(folder)}, others)):
        with pytest.raises(SystemExit):
            pretrain.main([
                *settings(shards, tmp_path / f"run{number}", own), f"--model.name={TEST}",
                f"--data.classnames={shards}/classnames.txt",
            ])  # fmt: skip
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(messages[number], line)


def test_a_run_without_an_average_has_none(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_dual_encoder(tmp_path / "run")
    own = json.dumps([{"shards": f"{shards}/train-1.tar", "caption_key": "txt"}])
    with pytest.raises(SystemExit):
        evaluate.main([f"--model={folder}", "--weights=average", f"--evaluation={own}"])
    assert "has no averaged weights: train with --train.ema_decay" in capsys.readouterr().err
