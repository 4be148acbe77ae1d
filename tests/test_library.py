"""The project as a library: what the wheel holds, what importing costs, whose the names are."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = SETTINGS["tool"]["setuptools"]["packages"]
IMPORT = """
import json, socket, sys
def refuse(*_, **__):
    raise RuntimeError("an import has asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import torch
before = set(sys.modules)
import {modules}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_importing_packages_is_cheap_and_offline() -> None:
    """They bring nothing but themselves, whatever is installed: not even more of torch."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT.format(modules=", ".join(PACKAGES))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    brought = {name.partition(".")[0] for name in json.loads(result.stdout)}
    ours = {name.partition(".")[0] for name in PACKAGES}
    assert brought - set(sys.stdlib_module_names) == ours


def test_public_names_are_there(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    code = (
        "import encoders, importlib.util\n"
        "assert importlib.util.find_spec('timm')\n"  # to look for it is not to import it
        "import timm\n"
        "assert timm.list_models('soft_moe_*')\n"
        "from encoders import *\n"
        "missing = [name for name in encoders.__all__ if name not in globals()]\n"
        "assert not missing, missing\n"
        "model = timm.create_model('soft_moe_vit_test_patch16_64', num_experts=3)\n"
        "assert model.blocks[1].mlp.num_experts == 3\n"
        "assert isinstance(model.blocks[1].mlp, SoftMoE)\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    (file,) = wheel.glob("*.whl")
    names = zipfile.ZipFile(file).namelist()
    own = [name for name in names if ".dist-info/" not in name]
    assert {name.rpartition("/")[0].replace("/", ".") for name in own if name.endswith(".py")} == (
        set(PACKAGES)
    )
    folders = {package.replace(".", "/") for package in PACKAGES}
    for name in own:
        inside = name.rpartition("/")[0] in folders
        assert inside or name.startswith("data_pipelines/emoji/LICENSES/"), name
    present = {
        path.relative_to(ROOT).as_posix()
        for package in folders
        for path in (ROOT / package).glob("*.py")
    }
    assert {name for name in own if name.endswith(".py")} == present
    assert {f"{folder}/py.typed" for folder in folders} <= set(own)


def test_nobody_else_owns_our_names() -> None:
    owners = packages_distributions()
    for name in {package.partition(".")[0] for package in PACKAGES}:
        assert set(owners.get(name, ["softmoe-clip"])) == {"softmoe-clip"}
