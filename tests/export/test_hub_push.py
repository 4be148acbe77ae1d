"""Pushing to a stand-in for the hub, and opening what arrived there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from scripts import export


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder in which the stand-in keeps `repositories/<owner>/<name>`."""
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
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield folder / "repositories"
        server.terminate()


def test_a_pushed_folder_opens_by_its_name(
    hub: Path, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [str(exports / "bert" / "source"), f"--out={out}", "--push=lab/tiny"]
    export.main([*words, "--license=cc-by-4.0"])
    assert "/lab/tiny/commit/" in capsys.readouterr().out
    there = hub / "lab" / "tiny"
    asked = json.loads((there / ".asked").read_text())
    assert asked.get("visibility") == "private" or asked.get("private") is True
    (there / ".asked").unlink()
    sent = {path.relative_to(there): path.read_bytes() for path in there.rglob("*.*")}
    written = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}
    assert sent == written
    assert "license: cc-by-4.0\n" in (there / "README.md").read_text()
    # The config of the text tower is found by the name, too.
    expected = load_file(exports / "bert" / "source" / "expected")
    model = open_clip.create_model("hf-hub:lab/tiny").eval()
    texts = json.loads((exports / "texts.json").read_text())
    tokens = open_clip.get_tokenizer("hf-hub:lab/tiny")(texts)
    with torch.no_grad():
        assert torch.allclose(model.encode_text(tokens), expected["text"], atol=1e-6)
        assert torch.allclose(model.encode_image(expected["pixels"]), expected["image"], atol=1e-6)


def test_a_refused_push_leaves_the_folder_and_says_why(
    hub: Path,
    exports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    words = [str(exports / "clip" / "run"), f"--out={tmp_path}/out", "--push=lab/tiny"]
    with pytest.raises(SystemExit) as stop:
        export.main([*words, "--license=mit"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'lab/tiny' could not be pushed" in line
    assert "401" in line
    assert (tmp_path / "out" / "open_clip_model.safetensors").is_file()
    assert not (hub / "lab").exists()


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
