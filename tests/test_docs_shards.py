"""Every command of docs/shards.md runs, in its order, and does what the page says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipelines.emoji import prepare
from data_pipelines.findings import KINDS
from scripts import shards, train_contrastive

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "shards.md").read_text(encoding="utf-8")
TINY = [
    "--image.name", "soft_moe_vit_test_patch16_64", "--text.width", "32", "--text.layers", "1",
    "--train.steps", "1", "--train.batch_size", "8", "--schedule.warmup_steps", "0",
    "--train.eval_every", "0",
]  # fmt: skip
# In this process, because starting one takes longer than most commands do.
MODULES: dict[str, Callable[[list[str]], object]] = {
    "data_pipelines.emoji.prepare": prepare.main,
    "scripts.shards": shards.main,
    "scripts.train_contrastive": lambda words: train_contrastive.main([*words, *TINY]),
}


def run(words: Sequence[str]) -> object:
    """Exit code of a command."""
    if list(words[:2]) != ["python", "-m"]:
        return subprocess.run(words, check=False).returncode
    try:
        return MODULES[words[2]](list(words[3:])) or 0
    except SystemExit as stop:
        return stop.code


def test_commands_run_in_the_order_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    tools = set()
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert run(words) == int("# exit code 1" in line), line
        tools.add(words[3] if words[:3] == ["python", "-m", "scripts.shards"] else "")
    assert set(shards.TOOLS) <= tools

    sizes = json.loads((tmp_path / "data/packed/sizes.json").read_text())
    assert list(sizes.values()) == [60, 60, 30]
    problems = json.loads((tmp_path / "problems.json").read_text())["problems"]
    assert problems == {"near_duplicate": 1}
    metrics = (tmp_path / "runs/packed/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["loss"] > 0


def test_the_page_knows_every_problem() -> None:
    table = PAGE[PAGE.index("| problem |") : PAGE.index("`--ignore")]
    assert set(re.findall(r"`([a-z_]+)`", table)) == set(KINDS)
