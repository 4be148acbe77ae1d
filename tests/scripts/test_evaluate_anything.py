"""One command for any model and set: tasks, files, cache, and refusals before any embedding."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from eval.results import check_folder
from scripts import compare_evaluations, evaluate

TEST = "soft_moe_vit_test_patch16_64"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP as transformers saves it, with its processor and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    words = {
        w: i
        for i, w in enumerate(
            ["<pad>", "<end>", "[UNK]", "a", "red", "green", "blue", "white", "square"]
        )
    }
    config = CLIPConfig(
        text_config=tower | {"vocab_size": len(words), "eos_token_id": 1, "pad_token_id": 0,
                             "bos_token_id": 2, "max_position_embeddings": 12},
        vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture
def benchmark_set(tmp_path: Path, shards: Path) -> Path:
    """The shards as CLIP_benchmark lays them out, with a training split."""
    root = tmp_path / "colours"
    for split, number in (("train", 0), ("test", 1)):
        (root / split).mkdir(parents=True)
        data = (shards / f"train-{number}.tar").read_bytes()
        (root / split / "0.tar").write_bytes(data)
    (root / "classnames.txt").write_bytes((shards / "classnames.txt").read_bytes())
    (root / "zeroshot_classification_templates.txt").write_text("a {c} square\n{c}\n")
    return root


def test_all_tasks_of_a_transformers_model_and_a_comparison(
    on_the_cpu: None, clip: Path, benchmark_set: Path, tmp_path: Path
) -> None:
    tasks = "zero_shot_classification,few_shot,linear_probe,knn"
    cache = tmp_path / "cache"
    words = [f"--model={clip}", f"--data={benchmark_set}", f"--tasks={tasks}", "--threads=1",
             "--shots=[2]", f"--cache={cache}"]  # fmt: skip
    for number in (0, 1):
        evaluate.main([*words, f"--results={tmp_path}/{number}"])
    first, second = (json.loads((tmp_path / str(n) / "results.json").read_text()) for n in (0, 1))
    assert first == second  # the second time from the cache
    assert [r["task"] for r in first] == ["zeroshot_classification", *tasks.split(",")[1:]]
    source = f"{benchmark_set}/zeroshot_classification_templates.txt"
    assert (first[0]["templates"], first[0]["templates_from"]) == (["a {} square", "{}"], [source])
    for record in first:
        assert record["n_samples"] == 12
        assert len(record["weights_sha256"]) == 64
        for name, (low, high) in record["ci95"].items():
            assert low <= record["metrics"][name] <= high
    folders = [path for path in cache.iterdir() if (path / "img_emb/img_emb_0.npy").is_file()]
    assert np.load(folders[0] / "img_emb/img_emb_0.npy").shape == (12, 8)
    page = (tmp_path / "0" / "report.html").read_text()
    assert "What is taken for what" in page
    table = compare_evaluations.compare([f"{tmp_path}/0", f"{tmp_path}/1"])
    assert table.count("+0.000 (+0.000 to +0.000) |") == 7  # all but the three acc5
    assert f"{tmp_path}/1 - {tmp_path}/0 (95 % interval)" in table  # one model: told by folder
    with pytest.raises(ValueError, match=r"results\.json' is a file: give the folder"):
        compare_evaluations.compare([f"{tmp_path}/0", f"{tmp_path}/1/results.json"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/results' cannot be written to"):
        check_folder(f"{tmp_path}/file/results", "", [])


def test_clip_benchmark_makes_a_table_of_our_results(
    on_the_cpu: None, clip: Path, benchmark_set: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("clip_benchmark", reason="make peers installs it")
    # What it imports for the scores of captions, which need Java.
    monkeypatch.setitem(sys.modules, "clip_benchmark.metrics.captioning", MagicMock())
    cli = importlib.import_module("clip_benchmark.cli")
    results = tmp_path / "results"
    words = [f"--model={clip}", f"--data={benchmark_set}", "--threads=1", f"--results={results}"]
    evaluate.main([*words, "--tasks=zero_shot_classification,knn"])
    files = sorted(map(str, (results / "clip_benchmark").glob("*.json")))
    assert len(files) == 2
    table = tmp_path / "table.csv"
    cli.main_build(Namespace(files=files, output=str(table)))
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    records = {r["task"]: r for r in json.loads((results / "results.json").read_text())}
    assert {row["task"] for row in rows} == set(records)
    for row in rows:
        record = records[row["task"]]
        assert float(row["acc1"]) == record["metrics"]["acc1"]
        assert row["dataset"] == "colours"


def test_results_of_other_weights_and_of_one_name_are_not_overwritten(
    on_the_cpu: None, capsys: pytest.CaptureFixture[str], clip: Path, benchmark_set: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    model, results = f"--model={clip}", f"--results={tmp_path}/results"
    one = {"data": str(benchmark_set), "tasks": ["knn"]}
    twice = f"--evaluation={json.dumps([one, one])}"
    assert "two evaluation sets are called 'colours'" in refusal(capsys, model, twice, results)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text('[{"weights_sha256": "another"}]')
    alone = f"--evaluation={json.dumps([one])}"
    assert "holds results of other weights" in refusal(capsys, model, alone, results)


def test_karpathy_files_and_the_models_own_processor(
    on_the_cpu: None, clip: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    rng, listed, pictures = np.random.default_rng(0), [], []
    for number in range(4):
        pictures.append(Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)))
        buffer = io.BytesIO()
        pictures[-1].save(buffer, "PNG")
        (tmp_path / f"{number}.png").write_bytes(buffer.getvalue())
        sentences = [{"raw": "a red square"}, {"raw": f"a {['green', 'blue'][number % 2]}"}]
        listed.append({"filename": f"{number}.png", "split": "test", "sentences": sentences})
    path = tmp_path / "dataset_tiny.json"
    path.write_text(json.dumps({"images": listed}))
    sets = [{"data": str(path), "images": str(tmp_path), "tasks": ["retrieval"],
             "recall_ks": [1, 100]}]  # fmt: skip
    words = [f"--model={clip}", f"--evaluation={json.dumps(sets)}", f"--cache={tmp_path}/cache"]
    (record,) = evaluate.evaluate(evaluate.parse_config(evaluate.EvaluateRun, words, ""))
    assert record["metrics"]["text_retrieval_recall@100"] == 1.0
    assert record["details"]["text_k_beyond_pool_of_8"] == [100]
    (stored,) = (tmp_path / "cache").glob("*/img_emb/img_emb_0.npy")
    inputs = AutoImageProcessor.from_pretrained(clip)(images=pictures, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(clip).eval().get_image_features(**inputs)
    expected = getattr(expected, "pooler_output", expected)
    np.testing.assert_allclose(np.load(stored), expected.numpy(), rtol=1e-4, atol=1e-5)
    (tmp_path / "3.png").unlink()
    with pytest.raises(SystemExit):
        evaluate.main(words)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_one_line_before_any_embedding(
    on_the_cpu: None, capsys: pytest.CaptureFixture[str], clip: Path, benchmark_set: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*args: object) -> None:
        raise AssertionError("a picture was embedded")

    monkeypatch.setattr("eval.measure.embed", never)
    model, data = f"--model={clip}", f"--data={benchmark_set}"
    zero_shot = "--tasks=zero_shot_classification"
    (benchmark_set / "zeroshot_classification_templates.txt").write_text("a {c} and a {c}\n")
    assert "2 placeholders; write {} exactly once" in refusal(capsys, model, data, zero_shot)
    (benchmark_set / "classnames.txt").write_text("red\ngreen\n")
    assert "but there are 2 classes" in refusal(capsys, model, data, zero_shot)
    assert "task 'magic' is unknown" in refusal(capsys, model, data, "--tasks=magic")
    tower = tmp_path / "tower"
    tower.mkdir()
    import timm
    from safetensors.torch import save_file

    timm_model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    save_file(timm_model.state_dict(), tower / "model.safetensors")
    described = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 2,
        "model_args": {"depth": 1},
        "pretrained_cfg": timm_model.pretrained_cfg,
    }
    (tower / "config.json").write_text(json.dumps(described, default=str))
    assert "has no text tower" in refusal(capsys, f"--model={tower}", data, zero_shot)
    captions = tmp_path / "dataset.json"
    one = {"filename": "gone.png", "split": "test", "sentences": [{"raw": "a"}]}
    captions.write_text(json.dumps({"images": [one]}))
    missing = json.dumps([{"data": str(captions), "images": str(tmp_path), "tasks": ["retrieval"]}])
    assert "names 1 images that" in refusal(capsys, model, f"--evaluation={missing}")
    captions.write_text(json.dumps({"images": []}))
    assert "is an empty split" in refusal(capsys, model, f"--evaluation={missing}")
