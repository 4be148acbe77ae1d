"""Labels that are names in a `datasets` dataset that is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from data_pipelines.evaluation_files import hugging_face_set
from data_pipelines.shards import ShardError
from data_pipelines.transforms import eval_transform


def test_names_become_places_in_classnames(tmp_path: Path, picture: Callable[[int], bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    words = ["bee", "1", "ant"]
    rows = [{"image": {"bytes": picture(n), "path": None}, "label": w} for n, w in enumerate(words)]
    path = str(tmp_path / "saved")
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features)).save_to_disk(path)

    def labels(*names: str) -> list[int]:
        transform = eval_transform(8)
        opened = hugging_face_set(path, "test", transform, "label", classnames=names)
        return [label for entry in opened.entries for label in entry.labels]

    assert labels("ant", "bee") == [1, 1, 0]
    with pytest.raises(ShardError, match="holds 'ant', which is neither a number nor"):
        labels("fly", "bee")
    with pytest.raises(ShardError, match="holds 'bee'"):
        labels()
