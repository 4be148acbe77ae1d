"""Every command and code block of docs/export.md runs, in the order of the page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from scripts import export

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "export.md"


def test_commands_and_code_run_in_the_order_of_the_page(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exports / "clip" / "run", tmp_path / "runs" / "mine" / "contrastive")
    shutil.copy(exports / "picture0.png", tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert {language for language, _ in blocks} == {"bash", "python"}
    found: dict[str, object] = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), found)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[:3] == ["python", "-m", "scripts.export"]
            export.main(words[3:])
    written = {path.name for path in (tmp_path / "exports").iterdir()}
    assert written == {"open_clip", "timm", "transformers", "sentences", "onnx", "pushed"}


@pytest.mark.parametrize("page", ["export.md", "towers.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target
