"""Opening a model from a folder: what is refused, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.open_model import CONFIG_FILE, WEIGHTS_FILE, open_model

ROUTED: dict[str, Any] = {"model_cfg": {"text_cfg": {"causal_soft_moe": {}}, "vision_cfg": {}}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", rf"{CONFIG_FILE} is not valid JSON"),
        ("{}", r"describes no open_clip model: it lacks model_cfg\.text_cfg"),
        (json.dumps(ROUTED), rf"{WEIGHTS_FILE} does not exist"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        open_model(str(tmp_path))
