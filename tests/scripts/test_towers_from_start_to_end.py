"""Runs whose towers are not the usual ones: trained, evaluated, inspected and opened elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from transformers import BertConfig, BertModel, BertTokenizerFast

from eval.image_tower import open_image_tower
from eval.open_model import open_model
from scripts import evaluate, inspect_model, pretrain, train_contrastive
from training.checkpoint import verify_checkpoint

TEST = "soft_moe_vit_test_patch16_64"
ROOT = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "square"]
ARGUMENTS = {"router": "experts_choice", "num_experts": 2, "img_size": 48}
TEXT = ["--text.width=16", "--text.heads=2", "--text.layers=2", "--text.context_length=8"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


def save_bert(folder: Path) -> Path:
    """A tiny random BERT and its tokenizer."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def small(shards: Path, run_dir: Path) -> list[str]:
    return [
        f"--run_dir={run_dir}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
        "--train.steps=2", "--train.batch_size=8", "--train.threads=1",
    ]  # fmt: skip


def contrastive(shards: Path, run_dir: Path, *more: str, preset: str | None = None) -> Path:
    """Train for two steps; the checkpoint."""
    config = [] if preset is None else [f"--config={ROOT}/configs/{preset}.yaml"]
    train_contrastive.main([
        *config, *small(shards, run_dir), f"--image.name={TEST}", "--contrastive.embed_dim=8",
        *more,
    ])  # fmt: skip
    return run_dir / "checkpoints" / "step_00000002"


def pretrained(shards: Path, run_dir: Path, **arguments: Any) -> Path:
    pretrain.main([
        *small(shards, run_dir), f"--model.name={TEST}",
        f"--data.classnames={shards}/classnames.txt", f"--model.arguments={json.dumps(arguments)}",
    ])  # fmt: skip
    return run_dir


def figures(shards: Path, model: Path, output: Path) -> list[dict[str, Any]]:
    own = {
        "name": "own", "shards": f"{shards}/train-*.tar", "caption_key": "txt", "batch_size": 5,
        "classnames": f"{shards}/classnames.txt",
    }  # fmt: skip
    sets = f"--evaluation={json.dumps([own])}"
    evaluate.main([f"--model={model}", sets, "--threads=1", f"--output={output}"])
    return [record["metrics"] for record in json.loads(output.read_text())]


def features(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().encode_text(tokens)


PRESETS = {
    "lit": ["--image.init_from={run}", *TEXT],
    "frozen_text": ["--text.folder={bert}", "--text.context_length=8"],
    "both_trained": TEXT,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_the_towers_that_they_name(
    shards: Path, tmp_path: Path, bert: Path, preset: str
) -> None:
    run = pretrained(shards, tmp_path / "classifier") if preset == "lit" else tmp_path
    options = [option.format(run=run, bert=bert) for option in PRESETS[preset]]
    arguments = [
        "--train.accumulation=2",
        "--train.precision=fp32", "--schedule.warmup_steps=0", *options,
    ]  # fmt: skip
    start = tmp_path / "start"
    nothing = ("--train.steps=1", "--optimizer.lr=0")
    contrastive(shards, start, *arguments, *nothing, preset=preset)
    checkpoint = contrastive(shards, tmp_path / "run", *arguments, preset=preset)
    before = open_model(str(start)).model.state_dict()
    after = open_model(str(checkpoint)).model.state_dict()
    moved = {n for n, value in after.items() if not torch.equal(value, before[n])}
    frozen = {"lit": "visual.trunk.", "frozen_text": "text.transformer."}.get(preset, "none")
    assert not any(name.startswith(frozen) for name in moved)
    towers = {"visual.trunk.", "visual.head.", "text.transformer.", "text."} - {frozen}
    assert all(any(name.startswith(tower) for name in moved) for tower in towers)


def test_a_run_does_without_the_folder_its_text_tower_came_from(
    shards: Path, tmp_path: Path, bert: Path
) -> None:
    options = [
        "--text.kind=hugging_face", f"--text.folder={bert}", "--text.context_length=8",
        "--text.pooling=cls", "--text.frozen=true",
    ]  # fmt: skip
    run_dir = tmp_path / "run"
    checkpoint = contrastive(shards, run_dir, *options)
    log = (run_dir / "train.log").read_text()
    assert f"text tower: 37 tensors from {bert} match; random: proj.weight" in log
    assert "image tower: random weights" in log
    verify_checkpoint(checkpoint)
    texts = ["a red square", "green", "a blue"]
    # Stock open_clip, as long as the folder is there.
    stock: Any = open_clip.create_model(f"local-dir:{checkpoint}")
    tokens = open_clip.get_tokenizer(f"local-dir:{checkpoint}")(texts)
    expected = features(stock, tokens)
    before = figures(shards, run_dir, tmp_path / "before.json")
    shutil.rmtree(bert)
    assert figures(shards, run_dir, tmp_path / "after.json") == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, moved)
    opened = open_model(str(moved))
    assert torch.equal(opened.tokenizer(texts), tokens)
    assert torch.equal(features(opened.model, tokens), expected)
    # Then stock open_clip has to be told where the config is (docs/towers.md).
    with pytest.raises(OSError, match="bert"):
        open_clip.create_model(f"local-dir:{moved}")
    described = json.loads((moved / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    told = described | {"hf_model_name": str(moved / "text")}
    stock = open_clip.create_model(f"local-dir:{moved}", text_cfg=told)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{moved}")(texts), tokens)
    assert torch.equal(features(stock, tokens), expected)


def test_a_text_tower_of_the_hub_pooled_by_its_last_token(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / "models--someone--tiny-bert"
    save_bert(cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    options = [
        "--text.kind=hugging_face", "--text.folder=someone/tiny-bert", "--text.pooling=last",
        "--text.context_length=8", "--text.trainable=1",
    ]  # fmt: skip
    run_dir = tmp_path / "run"
    checkpoint = contrastive(shards, run_dir, *options, "--train.save_every=1")
    described = json.loads((checkpoint / "open_clip_config.json").read_text())["model_cfg"]
    assert described["text_cfg"]["hf_model_name"] == "someone/tiny-bert"
    with pytest.raises(KeyError, match="last_token_pooler"):
        open_clip.create_model(f"local-dir:{checkpoint}")
    shutil.rmtree(cached)
    assert len(figures(shards, run_dir, tmp_path / "figures.json")) == 2


def test_a_dual_encoder_with_arguments(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = pretrained(shards, tmp_path / "classifier", **ARGUMENTS)
    run_dir = tmp_path / "run"
    checkpoint = contrastive(
        shards, run_dir, *TEXT, f"--image.arguments={json.dumps(ARGUMENTS)}",
        f"--image.init_from={classifier}", "--image.drop_path=0.1", "--image.frozen=true",
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any(name.startswith("routing/blocks.1/") for name in rows[-1])
    assert len(figures(shards, run_dir, tmp_path / "figures.json")) == 2
    opened, tower = open_model(str(run_dir)), open_image_tower(str(run_dir))
    assert opened.image_size == tower.image_size == 48
    assert (tower.name, tower.arguments) == (TEST, ARGUMENTS)
    source = timm.create_model(f"local-dir:{classifier}/checkpoints/step_00000002", pretrained=True)
    images = torch.rand(4, 3, 48, 48)
    with torch.no_grad():
        pooled = source.eval().forward_head(source.forward_features(images), pre_logits=True)
        assert torch.equal(opened.model.visual.trunk(images), pooled)
    with pytest.raises(TypeError, match="timm_model_kwargs"):
        open_clip.create_model(f"local-dir:{checkpoint}")
    capsys.readouterr()
    inspect_model.main([str(run_dir), f"--images={shards}", f"--output={tmp_path}/figure.png"])
    out = capsys.readouterr().out
    assert "48 px, per image" in out
    assert "no slot maps" in out
    assert "blocks.1" in out


def test_a_resumed_run_takes_its_weights_from_the_checkpoint(
    shards: Path, tmp_path: Path, bert: Path
) -> None:
    options = [
        "--text.kind=hugging_face", f"--text.folder={bert}", "--text.context_length=8",
        f"--image.arguments={json.dumps(ARGUMENTS)}",
    ]  # fmt: skip
    options += ["--train.steps=3", "--train.save_every=2", "--train.keep_last=2"]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    contrastive(shards, whole, *options)
    contrastive(shards, rest, *options, f"--resume={whole}/checkpoints/step_00000002")
    found, expected = (open_model(str(run_dir)).model.state_dict() for run_dir in (rest, whole))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    told = ["text tower:" in (run_dir / "train.log").read_text() for run_dir in (rest, whole)]
    assert told == [False, True]
