"""Commands and code of the pages for newcomers run as they stand; settings that they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from scripts.cli import parse_config
from scripts.pretrain import PretrainRun
from scripts.train_contrastive import ContrastiveRun

DOCS = Path(__file__).parents[1] / "docs"
TASKS = {"scripts.pretrain": PretrainRun, "scripts.train_contrastive": ContrastiveRun}


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_quick_start_runs_from_shards_to_a_look_inside(tmp_path: Path) -> None:
    outputs = []
    for words in (
        line for block in blocks("quick_start.md", "bash") for line in command_lines(block)
    ):
        assert words[:2] == ["python", "-m"]
        result = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    assert "acc1" in outputs[-2]
    assert (tmp_path / "runs/quick/slots.png").stat().st_size > 10_000


def test_python_of_experts_and_slots_builds_the_model() -> None:
    names: dict[str, object] = {}
    for code in blocks("experts_and_slots.md", "python"):
        with torch.device("meta"):  # 242 M parameters
            exec(code, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == 242


def test_settings_of_experts_and_slots_are_accepted(tmp_path: Path) -> None:
    (block,) = blocks("experts_and_slots.md", "yaml")
    path = tmp_path / "part.yaml"
    path.write_text(block, encoding="utf-8")
    config = parse_config(ContrastiveRun, ["--config", str(path)], "")
    assert config.image.arguments == yaml.safe_load(block)["image"]["arguments"]


@pytest.mark.parametrize("page", ["migrating_from_open_clip.md"])
def test_commands_that_need_a_cluster_have_valid_settings(page: str) -> None:
    lines = [line for block in blocks(page, "text") for line in command_lines(block)]
    ours = [line for line in lines if line[0] == "accelerate"]
    assert ours
    for words in ours:
        module = next(word for word in words if word in TASKS)
        parse_config(TASKS[module], words[words.index(module) + 1 :], "")
