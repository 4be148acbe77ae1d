"""Every preset of training builds at its own size, and takes two steps at a small one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

from classification.objective import build_classifier
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from encoders.experts import ExpertMLP
from scripts import pretrain, train_contrastive
from scripts.cli import parse_config
from tests.conftest import ROOT

PRESETS = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if "run_dir" in yaml.safe_load(path.read_text())
)
TOY = "soft_moe_vit_test_patch16_64"
COMMANDS: dict[str, Any] = {
    "scripts.pretrain": pretrain,
    "scripts.train_contrastive": train_contrastive,
}
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The run directory of a pretrained image encoder."""
    run_dir = tmp_path_factory.mktemp("encoder") / "run"
    pretrain.main([f"--run_dir={run_dir}", f"--model.name={TOY}", *small(shards), *labels(shards)])
    return run_dir


def command(preset: Path) -> Any:
    """The module that the preset's header tells to run with it."""
    comments = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    header = " ".join(line.lstrip("# ") for line in comments)
    found = re.search(r"-m (scripts\.\w+) --config (configs/[\w.]+)", header)
    if found is None:  # of `make demo-long`, which calls both
        return pretrain if "pretrain" in preset.name else train_contrastive
    assert found[2] == f"configs/{preset.name}"
    return COMMANDS[found[1]]


def small(shards: Path) -> list[str]:
    return [
        f"--data.shards={shards}/train-*.tar", "--data.workers=0", "--train.steps=2",
        "--train.batch_size=8", "--train.threads=1", "--train.log_every=1",
        "--train.expert_parallel=1", "--schedule.warmup_steps=1", "--schedule.cooldown_steps=1",
    ]  # fmt: skip


def labels(shards: Path) -> list[str]:
    return [f"--data.classnames={shards}/classnames.txt"]


def shrink(preset: Path, shards: Path, encoder: Path, bert: Path) -> list[str]:
    """Overrides that make a preset small, but for what makes it this preset."""
    settings = yaml.safe_load(preset.read_text())
    tower = "image" if command(preset) is train_contrastive else "model"
    chosen = settings[tower]
    options = small(shards)
    name = TOY.replace("soft_moe", "dense") if chosen["name"].startswith("dense") else TOY
    arguments = chosen.get("arguments", {})
    if arguments.get("img_size", 0) > 64:
        arguments["img_size"] //= 4  # another size than the encoder's
    options += [f"--{tower}.name={name}", f"--{tower}.arguments={json.dumps(arguments)}"]
    if "init_from" in chosen:
        options.append(f"--{tower}.init_from={encoder}")
    parts = min(2, settings["train"].get("accumulation", 1))
    options.append(f"--train.accumulation={parts}")
    if tower == "model":
        options += labels(shards)
    else:
        options += ["--contrastive.embed_dim=8", "--text.width=16", "--text.context_length=8"]
        kind = settings.get("text", {}).get("kind", "open_clip")
        if kind == "open_clip":
            options += ["--text.heads=2", "--text.layers=1"]
        if kind == "hugging_face":
            options.append(f"--text.folder={bert}")
    for item in settings.get("evaluation", []):
        item |= {"shards": f"{shards}/train-*.tar", "classnames": f"{shards}/classnames.txt"}
        item.pop("class_prompts", None)
        options.append(f"--evaluation={json.dumps([item])}")
    return options


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_builds_at_its_own_size(preset: Path, bert: Path) -> None:
    main = command(preset)
    run_class = pretrain.PretrainRun if main is pretrain else train_contrastive.ContrastiveRun
    config: Any = parse_config(run_class, [f"--config={preset}"], "")
    with torch.device("meta"):
        if main is pretrain:
            model = build_classifier(config.model, 1000)
        else:
            if config.text.kind == "hugging_face":
                config.text.folder = str(bert)
            description = model_config(
                config.image, config.text, config.contrastive, config.train.batch_size
            )
            model = build_dual_encoder(description)
            frozen_parts(model, config.image, config.text)
    assert all(parameter.is_meta for parameter in model.parameters())
    for bank in (module for module in model.modules() if isinstance(module, ExpertMLP)):
        assert bank.num_experts % config.train.expert_parallel == 0
    # The sizes that headers speak of, in thousands of millions.
    stated = re.search(r"([\d.]+) ([GM]) parameters", preset.read_text())
    if stated is not None:
        unit = {"G": 1e9, "M": 1e6}[stated[2]]
        total = sum(parameter.numel() for parameter in model.parameters())
        assert total / unit == pytest.approx(float(stated[1]), rel=0.05)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_takes_two_steps(
    preset: Path, shards: Path, encoder: Path, bert: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = shrink(preset, shards, encoder, bert)
    command(preset).main([f"--config={preset}", f"--run_dir={run_dir}", *options])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert (run_dir / "checkpoints" / "step_00000002" / "manifest.json").is_file()
