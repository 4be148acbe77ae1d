"""Runs on cached embeddings of a tiny image tower and a tiny BERT."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from contrastive.dual_encoder import (
    build_dual_encoder,
    frozen_parts,
    model_config,
)
from contrastive.initial_weights import initialise_towers
from contrastive.objective import ContrastiveObjective
from data_pipelines.image_text import image_text_stream
from encoders.text_towers import build_tokenizer
from scripts.cli import parse_config
from scripts.train_contrastive import ContrastiveRun

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789", "first", "second", "line"]
BOTH = ("image", "text")


def save_bert(folder: Path, seed: int, words: list[str]) -> Path:
    """A tiny random BERT with dropout, and a tokenizer, as Hugging Face saves them."""
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "words.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, hidden_dropout_prob=0.3,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_trunk(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model(TEST, num_classes=0).state_dict(), path)
    return path


def settings(world: Path, *more: str, shards: str = "shards") -> list[str]:
    """Of a run with both towers frozen, for both commands."""
    return [
        f"--image.name={TEST}", f"--image.init_from={world}/trunk.safetensors",
        "--image.frozen=true", "--text.kind=hugging_face", f"--text.folder={world}/bert",
        "--text.frozen=true", "--text.context_length=8", "--contrastive.embed_dim=8",
        f"--data.shards={world}/{shards}/*.tar", "--data.workers=0", "--train.batch_size=6",
        "--train.steps=5", "--train.threads=1", "--train.log_every=1", "--train.save_every=2",
        "--optimizer.lr=0.01", "--data.augmentation.crop_scale=[1,1]", *more,
    ]  # fmt: skip


def cache_words(world: Path, out: Path, *more: str) -> list[str]:
    """In batches that are smaller than a shard; both hold something to skip."""
    return [*settings(world), f"--out={out}", "--rows=4", *more]


def options(cached: Path, sides: tuple[str, ...] = BOTH) -> list[str]:
    return [f"--data.cached_{side}={cached}" for side in sides]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def open_run(words: list[str]) -> tuple[ContrastiveObjective, Callable[..., Any]]:
    """Objective and stream of a configuration, as the training command builds them."""
    config = parse_config(ContrastiveRun, words, "")
    description = model_config(config.image, config.text, config.contrastive)
    torch.manual_seed(0)
    model = build_dual_encoder(description)
    initialise_towers(model, config.image, config.text, description)
    frozen = frozen_parts(model, config.image, config.text)
    objective = ContrastiveObjective(model, description, config.contrastive, HALF, HALF, frozen)
    tokenizer = build_tokenizer(description["text_cfg"])

    def batches(count: int, start: int = 0, **share: int) -> list[dict[str, Any]]:
        stream = image_text_stream(
            config.data, image_size=64, tokenize=tokenizer, seed=3, global_batch=6, **share
        )
        return list(itertools.islice(stream.batches(start), count))

    return objective, batches


def refusal(capsys: pytest.CaptureFixture[str], command: Any, words: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    # transformers shows a bar of its own while it loads weights.
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error: " in one]
    return line


def forbid(*_: Any) -> None:
    raise AssertionError("a frozen tower was run")


def train_words(world: Path, cached: Path, tmp_path: Path, *more: str) -> list[str]:
    return [*settings(world, *options(cached), *more), f"--run_dir={tmp_path}/run"]
