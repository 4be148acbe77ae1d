"""The export command: what its cards say, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.models import save_for_hf
from transformers import AutoModel, AutoModelForImageClassification

from contrastive.config import ImageTowerConfig
from contrastive.initial_weights import load_image_tower
from encoders.clip_model import build_clip, vision_config
from encoders.export.model import DualEncoder, image_tower
from encoders.export.model_card import Card, RunFacts, card_text, without_secrets
from encoders.export.timm_folder import write_timm
from encoders.text_towers import open_clip_text_config
from scripts import evaluate, export, pretrain

TEST = "soft_moe_vit_test_patch16_64"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as stop:
        export.main([str(word) for word in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_card_tells_what_the_run_knows(exports: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports / "clip" / "run", run)
    rows = [
        {"step": 1, "samples": 8, "own/acc1": 0.25},
        {"step": 4, "samples": 32, "own/acc1": 0.9},  # of a later checkpoint
    ]
    lines = [json.dumps(row) for row in rows]
    (run / "eval.jsonl").write_text("\n".join([*lines, '{"step": 2, "ow']))
    out = tmp_path / "out"
    export.main([str(run / "checkpoints" / "step_00000002"), f"--out={out}", "--license=mit"])
    text = (out / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit",
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["soft-moe", "softmoe-clip"],
    }
    for words in (
        "| samples seen | 16 |",
        "train-*.tar (24 samples) |",
        "(of step 1)",
        "| own/acc1 | 0.2500 |",
        "| visual.trunk.blocks.1.mlp | SoftMoE(dim=32, num_experts=4, slots_per_expert=1) |",
        "python -m ",
        "  batch_size: 8\n",
        f'create_model_and_transforms("local-dir:{out}")',
        "mit, as stated by who exported",
    ):
        assert words in body
    assert "0.9" not in body.partition("## Measured")[2]
    assert "step 4" not in body


def test_cards_keep_what_lets_one_into_a_store_to_themselves() -> None:
    address = "https://me:pass@data.example/{00..09}.tar?X-Signature=abc&x=1"
    card = Card(
        title="t", target="timm", licence=None, code="", model={}, routers={},
        run=RunFacts(
            data=f"{address} (24 samples)", settings={"data": {"shards": [address]}},
            command=["python", "-m", "scripts.train_contrastive", f"--data.shards={address}"],
        ),
    )  # fmt: skip
    text = card_text(card)
    assert text.count("https://data.example/{00..09}.tar?...") == 3
    assert not any(secret in text for secret in ("me:p", "pass@", "abc", "X-Sig"))
    assert without_secrets("s3://me:pass@store/a-00??.tar") == "s3://store/a-00??.tar"
    assert "'--data.shards=https://data.example/{00..09}.tar?...'" in text  # as a shell wants it


def test_the_card_takes_intervals_from_the_evaluation_of_the_same_weights(
    exports: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports / "clip" / "run", run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    own = {"name": "own", "shards": settings["data"]["shards"], "caption_key": "txt"}
    checkpoint, record = run / "checkpoints" / "step_00000002", run / "evaluation.json"
    evaluate.main(
        [f"--model={checkpoint}", f"--evaluation={json.dumps([own])}", f"--output={record}"]
    )
    (measured,) = json.loads(record.read_text())
    low, high = measured["ci95"]["text_retrieval_recall@1"]
    value = measured["metrics"]["text_retrieval_recall@1"]
    export.main([str(checkpoint), f"--out={tmp_path}/out"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| own/text_retrieval_recall@1 | {value:.4f} | {low:.4f} to {high:.4f} |" in text
    record.write_text(json.dumps([measured | {"weights_sha256": "0" * 64}]))
    export.main([str(checkpoint), f"--out={tmp_path}/other"])
    assert "own/text_retrieval" not in (tmp_path / "other" / "README.md").read_text()


def test_an_export_in_the_run_directory_is_no_checkpoint(exports: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports / "clip" / "run", run)
    first = run / "exports" / "open_clip"
    export.main([str(run), f"--out={first}"])
    export.main([str(first), "--to=timm", f"--out={tmp_path}/out"])
    assert "Nothing is known of the run." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("test_vit", "avg"), ("test_vit", "token"), ("test_convnext", "avg")],
)
def test_towers_of_timm_are_pooled_as_they_were_trained(
    tmp_path: Path, name: str, pooling: Any
) -> None:
    text = open_clip_text_config(16, 2, 1, 8)
    config = {"embed_dim": 8, "vision_cfg": vision_config(name, {}, pooling=pooling)}
    model: Any = build_clip(config | {"text_cfg": text}).eval()
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    preprocess = pixels | {"interpolation": "bicubic", "resize_mode": "squash"}
    encoder = DualEncoder(model, config | {"text_cfg": text}, preprocess, 160, None)
    write_timm(image_tower(encoder), tmp_path)
    images = torch.randn(2, 3, 160, 160)
    opened: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    wrapped = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.visual.trunk(images)
        assert torch.equal(opened(images), expected)
        assert torch.equal(wrapped(pixel_values=images).pooler_output, expected)
    image = ImageTowerConfig(name, init_from=str(tmp_path), pooling=pooling)
    report = load_image_tower(model, image, config)  # and back again
    assert report is not None
    assert report.fresh == ("head.proj.weight",)


def test_models_of_timm_keep_their_own_way_to_cut_pictures(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit", num_classes=2)
    save_for_hf(model, tmp_path / "source", safe_serialization=True)
    export.main([str(tmp_path / "source"), "--to=timm", f"--out={tmp_path}/out"])
    found, expected = (
        timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / name}"))
        for name in ("out", "source")
    )
    assert found == expected
    assert found["crop_pct"] == 0.95


def test_nobody_guesses_a_licence(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exports / "clip" / "source"
    out = f"--out={tmp_path}/out"
    assert "push needs --license" in refusal(capsys, source, out, "--push=lab/tiny")
    assert not (tmp_path / "out").exists()
    card = (exports / "clip" / "timm" / "README.md").read_text()
    assert "license:" not in card
    assert "Not stated" in card


def test_a_classifier_keeps_its_head_and_the_names_of_its_classes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = {"pos_embed": "sincos2d", "img_size": 48}
    pretrain.main([
        f"--run_dir={run}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
        "--train.steps=2", "--train.batch_size=8", "--train.threads=1", f"--model.name={TEST}",
        f"--data.classnames={shards}/classnames.txt", f"--model.arguments={json.dumps(arguments)}",
    ])  # fmt: skip
    export.main([str(run), "--to=timm", f"--out={out}"])
    images = torch.randn(2, 3, 48, 48)
    checkpoint = run / "checkpoints" / "step_00000002"
    trained: Any = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    opened: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(out).eval()
    with torch.no_grad():
        expected = trained(images)
        assert expected.shape == (2, 4)
        assert torch.equal(opened(images), expected)
        assert torch.equal(wrapped(pixel_values=images).logits, expected)
    assert wrapped.config.id2label == dict(enumerate(("red", "green", "blue", "white")))
    config = json.loads((out / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    assert "pipeline_tag: image-classification" in (out / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_in_one_line(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, sigmoid = exports / "clip" / "source", exports / "sigmoid" / "source"
    classifier = tmp_path / "classifier"
    save_for_hf(timm.create_model(TEST), classifier, safe_serialization=True)
    broken = tmp_path / "broken"
    shutil.copytree(exports / "clip" / "run", broken)
    (broken / "checkpoints" / "step_00000002" / "state.json").unlink()
    out = f"--out={tmp_path}/out"
    for arguments, problem in (
        ([], "model is not given"),
        ([clip], "out is not given"),
        ([clip, f"--out={clip}"], "exists already"),
        ([tmp_path / "none", out], "is no folder"),
        ([exports, out], "holds neither open_clip_config.json nor config.json"),
        ([broken, out], "is damaged: state.json is missing"),
        ([broken / "checkpoints" / "step_00000002", out], "is damaged: state.json is missing"),
        ([sigmoid, out], "choose --to transformers"),
        ([classifier, out], "choose --to timm"),
        ([clip, out, "--to=tensorflow"], "tensorflow"),
        ([clip, out, "--push=tiny"], "write owner/name"),
        ([clip, out, "--dry_run=true"], "set --push"),
    ):
        assert problem in refusal(
            capsys, *arguments, *(["--to=open_clip"] if not arguments else [])
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("open_clip_pytorch_model.bin", "open_clip_config.json"),
        ("pytorch_model.bin", "config.json"),
    ],
)
def test_nothing_is_unpickled(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, config: str
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "folder"
    folder.mkdir()
    origin = exports / "clip" / ("source" if config.startswith("open") else "timm")
    shutil.copy(origin / config, folder)
    (folder / name).write_bytes(pickle.dumps(Trap()))
    line = refusal(capsys, folder, f"--out={tmp_path}/out")
    assert "only safetensors are read" in line
    assert not (tmp_path / "sprung").exists()
