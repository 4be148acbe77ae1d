"""Exports open in the real libraries: in a fresh process, in another folder, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EQUAL = 1e-6


@pytest.fixture(scope="module")
def installed(run_elsewhere: Callable[..., Any], exports: Path, wheel: Path) -> dict[str, Any]:
    return run_elsewhere("with_package.py", exports, site=wheel / "site")


@pytest.fixture(scope="module")
def alone(run_elsewhere: Callable[..., Any], exports: Path) -> dict[str, Any]:
    return run_elsewhere("without_package.py", exports, site=None)


def check_open_clip(found: dict[str, Any]) -> None:
    assert max(found["image"], found["text"]) <= EQUAL
    assert found["tokens"] == 0
    assert found["pixels"] <= EQUAL


def check_transformers(found: dict[str, Any]) -> None:
    assert found["differences"] == {}
    assert found["pixels"] <= EQUAL  # those of our own evaluation
    assert max(found["image"], found["text_True"], found["text_False"]) <= EQUAL
    assert found["short"] <= EQUAL  # alone, so that no longer text pads it
    assert found["logits"] <= 1e-5
    assert found["scores"] <= 1e-5


def check_vectors(report: dict[str, Any]) -> None:
    for name in ("sigmoid", "bert"):
        found = report[f"{name} sentence-transformers"]
        assert max(found["image"], found["text"]) <= EQUAL
        assert found["width"] == 8
    assert max(report["bert onnx"].values()) <= 1e-4


def test_the_installed_wheel_opens_all_of_them(installed: dict[str, Any], wheel: Path) -> None:
    assert installed["encoders"] == str(wheel / "site" / "encoders" / "__init__.py")
    for name in ("clip", "bert"):
        check_open_clip(installed[f"{name} open_clip"])
    settings = installed["clip open_clip"]["settings"]
    assert (settings["mean"], settings["std"]) == ([0.5] * 3, [0.5] * 3)
    settings = installed["bert open_clip"]["settings"]
    assert (settings["mean"], settings["std"]) == ([0.4, 0.5, 0.6], [0.5, 0.4, 0.3])
    assert (settings["interpolation"], settings["resize_mode"]) == ("bicubic", "squash")
    for name in ("clip", "sigmoid"):
        found = installed[f"{name} timm"]
        assert max(found["pooled"], found["wrapped"]) <= EQUAL
        assert max(found["pixels"], found["wrapped_pixels"]) <= EQUAL
    for name in ("clip", "sigmoid", "bert"):
        check_transformers(installed[f"{name} transformers"])
    check_vectors(installed)
    assert installed["classifier timm"] <= EQUAL
    assert not installed["remote code"]
    assert {"model", "preprocess", "tokenizer"} <= set(installed["cards"]["open_clip"])
    assert {"model", "transform"} <= set(installed["cards"]["timm"])
    assert "not supported" not in installed["stderr"]


def test_folders_for_transformers_bring_their_own_code(alone: dict[str, Any]) -> None:
    assert alone["found"] == alone["ours"] == []
    for name in ("clip", "sigmoid", "bert"):
        check_transformers(alone[f"{name} transformers"])
    check_vectors(alone)
    results = {"transformers": "classify", "sentence-transformers": "similarity", "onnx": "text"}
    for target, result in results.items():
        assert result in alone["cards"][target]
