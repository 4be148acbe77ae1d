"""Pushing to a stand-in for the hub, and opening what arrived there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.initial_weights import initialise_towers
from scripts import export
from tests.conftest import ROOT
from training.checkpoint import CheckpointError


class Running(NamedTuple):
    """The stand-in: its address, and where it keeps `<owner>/<name>`."""

    address: str
    folder: Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    folder = tmp_path / "hub"
    program = [sys.executable, Path(__file__).with_name("hub.py"), folder]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield Running(address, folder / "repositories")
        server.terminate()


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_a_pushed_folder_opens_by_its_name(
    hub: Running, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(exports / "bert" / "source"), f"--out={out}", "--push=lab/tiny"]
    export.main([*words, "--license=cc-by-4.0"])
    assert "/lab/tiny/commit/" in capsys.readouterr().out
    there = hub.folder / "lab" / "tiny"
    assert json.loads((there / ".asked").read_text())["visibility"] == "private"
    sent = files(there)
    assert sent.pop(".asked")
    assert sent == files(out)
    assert "license: cc-by-4.0\n" in (there / "README.md").read_text()
    # The config of the text tower is found by the name, too.
    expected = load_file(exports / "bert" / "source" / "expected")
    model = open_clip.create_model("hf-hub:lab/tiny").eval()
    texts = json.loads((exports / "texts.json").read_text())
    tokens = open_clip.get_tokenizer("hf-hub:lab/tiny")(texts)
    with torch.no_grad():
        assert torch.allclose(model.encode_text(tokens), expected["text"], atol=1e-6)
        assert torch.allclose(model.encode_image(expected["pixels"]), expected["image"], atol=1e-6)


def test_blocks_are_pushed_by_the_command_and_nothing_of_the_training(
    hub: Running, exports: Path, tmp_path: Path
) -> None:
    """By hf_xet, which huggingface_hub brings along, in a process of its own."""
    run, out = exports / "clip" / "run", tmp_path / "out"
    words = ["-m", "scripts.export", run, f"--out={out}", "--license=mit", "--push=lab/blocks"]
    known = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_stand_in", "HF_HOME": str(tmp_path / "hf")}
    known |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | known,
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    sent, written = files(hub.folder / "lab" / "blocks"), files(out)
    assert sent.pop(".asked")
    weights = "open_clip_model.safetensors"
    assert sent.pop(weights).decode() == hashlib.sha256(written.pop(weights)).hexdigest()
    assert (hub.folder.parent / "objects" / "blocks").stat().st_size > 0
    assert sent == written
    checkpoint = files(run / "checkpoints" / "step_00000002")
    assert checkpoint.keys() & {weights, *written} == {weights, "open_clip_config.json"}


def test_what_is_private_is_not_pushed_where_all_see_it(
    hub: Running, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(exports / "clip" / "run"), "--to=timm", "--push=lab/tiny", "--license=mit"]
    export.main([*words, f"--out={tmp_path}/first", "--private=false"])
    there = hub.folder / "lab" / "tiny"
    assert json.loads((there / ".asked").read_text())["visibility"] == "public"
    (there / "README.md").unlink()
    with pytest.raises(SystemExit) as stop:
        export.main([*words, f"--out={tmp_path}/second"])
    assert stop.value.code == 2
    assert "everybody sees it: push with --private false" in capsys.readouterr().err
    assert not (there / "README.md").exists()
    export.main([*words, f"--out={tmp_path}/third", "--private=false"])
    assert (there / "README.md").exists()


def test_a_refused_push_leaves_the_folder_and_says_why(
    hub: Running,
    exports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [str(exports / "clip" / "run"), "--to=timm", "--push=lab/tiny", "--license=mit"]

    def refusal(out: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            export.main([*words, f"--out={out}"])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.delenv("HF_TOKEN")
    assert "push needs a token" in refusal(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    line = refusal(tmp_path / "unknown")
    assert "'lab/tiny' could not be pushed" in line
    assert line.endswith(f"hf upload lab/tiny {tmp_path / 'unknown'} --private")
    assert "401" in line
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert "could not be pushed: [Errno 111]" in refusal(tmp_path / "offline")
    for name in ("unknown", "offline"):
        assert (tmp_path / name / "model.safetensors").is_file()
    assert not (hub.folder / "lab").exists()


def test_a_dry_run_lists_what_would_be_pushed(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(exports / "clip" / "run"), "--to=timm", f"--out={tmp_path}/out"]
    export.main([*words, "--push=lab/tiny", "--dry_run=true"])
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("lab/tiny would get:") + 1
    listed = {line.split()[-1]: line.split()[0].replace(",", "") for line in lines[start:]}
    assert listed == {path.name: str(path.stat().st_size) for path in (tmp_path / "out").iterdir()}
    assert set(listed) == {"README.md", "config.json", "model.safetensors"}


def test_towers_start_from_a_name_of_the_hub_with_all_that_describes_them(hub: Running) -> None:
    """transformers' CLIP in several files, with pixels that the timm model does not have."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 128, "image_size": 32, "patch_size": 16}
    theirs = CLIPModel(CLIPConfig(vision_config=vision, projection_dim=8, text_config=sizes))
    folder = hub.folder / "lab" / "clip"
    theirs.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / ".asked").write_text('{"visibility": "public"}')
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    image = ImageTowerConfig(
        "vit_base_patch32_clip_quickgelu_224", arguments, init_from="hf-hub:lab/clip",
        pooling="token",
    )  # fmt: skip
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    config = model_config(image, text, ContrastiveConfig(embed_dim=8))
    model: Any = build_dual_encoder(config)
    line, _ = initialise_towers(model, image, text, config)
    assert "random" not in line
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval().get_image_features(pixel_values=pixels).pooler_output
        assert torch.allclose(model.eval().encode_image(pixels), expected, atol=1e-4)

    there = hub.folder / "lab" / "other"
    shutil.copytree(folder, there)
    CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(there)
    image.init_from = "hf-hub:lab/other"
    with pytest.raises(CheckpointError, match="was trained with pixel mean"):
        initialise_towers(model, image, text, config)
    shutil.rmtree(there)
    shutil.copytree(folder, hub.folder / "lab" / "part")
    next((hub.folder / "lab" / "part").glob("model-*.safetensors")).unlink()
    image.init_from = "hf-hub:lab/part"
    with pytest.raises(CheckpointError, match="which is not beside it"):
        initialise_towers(model, image, text, config)
