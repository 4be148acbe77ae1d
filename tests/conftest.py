"""What several test folders share: GPU tests, child processes, tiny shards."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("red", "green", "blue", "white")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (240, 240, 240))
NOT_COPIED = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "data", "dist", "golden", "runs"
)
RunPython = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """Let Ctrl-C reach the commands under test, also where the suite was started in the background,
    whose shell has it ignored by all descendants."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run `python <arguments>` in the repository, on the CPU with one thread."""

    def run(
        *arguments: str | Path, timeout: float = 200, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A plain tar of `{key: {extension: content}}`."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two shards of 12 captioned, labelled pictures each, and their classnames."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("shards")
    noise = np.random.default_rng(0)
    for shard in range(2):
        samples = {}
        for number in range(12):
            label = number % len(NAMES)
            pixels = np.array(COLOURS[label]) + noise.integers(-15, 15, (16, 16, 3))
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            samples[f"{shard}{number:03d}"] = {
                "png": buffer.getvalue(),
                "txt": f"a {NAMES[label]} square, number {shard * 12 + number}".encode(),
                "cls": str(label).encode(),
            }
        write_shard(folder / f"train-{shard}.tar", samples)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Forget the device and precision that an earlier test has chosen for this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder that the first worker to ask for it fills, while others wait."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder = base / f"shared_{name}"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "complete").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / "complete").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def wheel(make_once: Callable[..., Path]) -> Path:
    """Folder with our wheel, built from a copy of the repository, and `site`, where it is
    installed."""

    def fill(folder: Path) -> None:
        copy = folder / "source"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
        subprocess.run([*pip, *build], check=True, capture_output=True)
        shutil.rmtree(copy)
        (file,) = folder.glob("*.whl")
        target = ["install", "--no-deps", "--target", str(folder / "site"), str(file)]
        subprocess.run([*pip, *target], check=True, capture_output=True)

    return make_once("wheel", fill)
