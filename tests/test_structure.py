"""The rules that hold the house together: who imports whom, what is packaged, what is said."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "encoders": set(),
    "data_pipelines": set(),
    "training": set(),
    "classification": {"encoders", "training"},
    "contrastive": {"encoders", "training"},
    "eval": {"encoders", "data_pipelines"},
}
OURS = {*ALLOWED, "scripts", "tests", "benchmarks"}


def imports(path: Path) -> list[tuple[str, int]]:
    """Top-level names of all absolute imports of a file; relative ones are returned as '.'."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            name = "." if node.level else (node.module or "").partition(".")[0]
            found.append((name, node.lineno))
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imports(path)
        if name == "." or (name in OURS and name != package and name not in ALLOWED[package])
    ]
    assert not wrong, wrong


def test_nobody_binds_the_name_eval() -> None:
    """`import eval` would hide the builtin in that module."""
    for folder in sorted(OURS - {"benchmarks"}):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
                    assert "eval" not in names, f"{path}:{node.lineno}"


def test_every_package_is_listed_and_owned_by_us() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    present = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for name in ALLOWED
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert listed == present
    owners = packages_distributions()
    for name in ALLOWED:
        assert set(owners.get(name, ["softmoe-clip"])) == {"softmoe-clip"}


def test_importing_config_modules_needs_no_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("*/config.py")
    ] + ["scripts.pretrain", "scripts.train_contrastive", "scripts.evaluate", "scripts.demo"]
    modules += [
        "scripts.cache_embeddings",
        "scripts.inspect_model",
        "scripts.upcycle",
        "scripts.shards",
        "scripts.export",
        "scripts.app",
    ]
    code = f"import sys; import {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_files_can_be_read_in_a_sitting() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for name in ALLOWED | {"scripts": set()}
        for path in (ROOT / name).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, long
