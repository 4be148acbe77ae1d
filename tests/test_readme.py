"""Every command of the README runs, at a tiny size; every file it names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = {
    "scripts.pretrain": [
        "--model.name", "soft_moe_vit_test_patch16_64", "--train.steps", "2",
        "--train.batch_size", "8", "--schedule.warmup_steps", "0", "--train.eval_every", "0",
    ],
    "scripts.train_contrastive": [
        "--image.name", "soft_moe_vit_test_patch16_64", "--text.width", "32", "--text.layers", "1",
        "--train.steps", "2", "--train.batch_size", "8", "--schedule.warmup_steps", "0",
        "--train.eval_every", "0",
    ],
    "scripts.evaluate": [],
}  # fmt: skip


def commands() -> list[str]:
    """Shell lines of the README's code blocks, continuation lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    # The page is served until interrupted; tests/scripts/test_app.py runs it in a browser.
    return [line for line in commands if "scripts.app" not in line]


@pytest.mark.timeout(900)  # every job of the project, one after the other
def test_commands_run_in_the_order_of_the_readme(tmp_path: Path) -> None:
    """One after the other, because later commands use what earlier ones leave."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = []
    for line in commands():
        words = shlex.split(line)
        module = next((word for word in words if word in TINY), None)
        if words[:2] == ["python", "-m"]:
            argv = [sys.executable, *words[1:]]
        elif words[:2] == ["accelerate", "launch"]:
            argv = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
        else:
            continue
        result = subprocess.run(
            argv + TINY.get(module or "", []),
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        if words[0] == "accelerate":
            assert "2 process(es)" in result.stdout
        ran.append(module)
    assert {"scripts.pretrain", "scripts.train_contrastive", "scripts.evaluate"} <= set(ran)

    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    example = example.replace("step_00000400", "step_00000002")  # the end of the tiny run
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "docs/results.md"])
def test_links_and_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (folder / target).exists(), target
    for path in re.findall(r"`((?:configs|docs|scripts|encoders|eval)/[\w./]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
