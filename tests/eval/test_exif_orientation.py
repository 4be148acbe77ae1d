"""Photographs that lie on their side, in every kind of evaluation set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from data_pipelines.transforms import eval_transform
from eval.classification import ClassificationEvaluator
from eval.config import EvaluationSetConfig
from eval.embedding import cache_key
from eval.evaluation_sets import plan_set
from eval.subject import Identity, Subject


@pytest.fixture
def sideways(tmp_path: Path) -> bytes:
    """Stored as left red, right blue; with orientation 6 it stands, red above."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8, 0] = pixels[:, 8:, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    for split in ("test", "train"):
        folder = tmp_path / "folder" / split / "red"
        folder.mkdir(parents=True)
        (folder / f"{split}.jpg").write_bytes(buffer.getvalue())
        with TarWriter(str(tmp_path / f"{split}.tar"), encoder=False) as writer:
            writer.write({"__key__": split, "jpg": buffer.getvalue(), "cls": b"0"})
    (tmp_path / "names.txt").write_text("red\n")
    return buffer.getvalue()


def is_upright(image: torch.Tensor) -> bool:
    """Whether red is above, and not to the left."""
    reds = image[0].float() > 128
    assert int(reds.sum()) == reds.numel() // 2
    return bool(reds[: len(reds) // 2].all())


@pytest.mark.usefixtures("sideways")
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("source", ["shards", "folder"])
def test_sets_turn_pictures_where_they_are_told_to(
    tmp_path: Path, source: str, wanted: bool
) -> None:
    identity = Identity(torch.nn.Identity(), [])
    subject = Subject("m", "s", identity, "fp32", {}, eval_transform(8), lambda images: images)
    config = EvaluationSetConfig(
        tasks=["few_shot"], classnames=str(tmp_path / "names.txt"), exif_orientation=wanted
    )
    if source == "shards":
        config.shards = str(tmp_path / "test.tar")
        config.train_shards = str(tmp_path / "train.tar")
    else:
        config.data = str(tmp_path / "folder")
    planned = plan_set(config, subject)
    assert planned.train is not None
    for samples in (planned.test, planned.train):
        assert is_upright(samples[0]["image"]) == wanted
    config.exif_orientation = not wanted  # embeddings of one are not those of the other
    other = plan_set(config, subject)
    keys = {cache_key(subject, planned.test, {"image"}), cache_key(subject, other.test, {"image"})}
    assert len(keys) == 2


@pytest.mark.usefixtures("sideways")
def test_the_evaluator_of_pretraining_turns_them_too(tmp_path: Path) -> None:
    config = EvaluationSetConfig(shards=str(tmp_path / "test.tar"), exif_orientation=True)
    evaluator = ClassificationEvaluator(config, 8, ["red"], (0.5,) * 3, (0.5,) * 3)
    assert is_upright(evaluator.dataset[0]["image"])
