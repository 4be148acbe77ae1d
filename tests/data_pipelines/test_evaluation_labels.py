"""Labels that are names, in every kind of evaluation set."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from data_pipelines.evaluation import EvaluationSet
from data_pipelines.evaluation_files import hugging_face_set, image_folder, karpathy_split
from data_pipelines.shards import ShardError
from data_pipelines.transforms import eval_transform
from eval.classification import ClassificationEvaluator
from eval.config import EvaluationSetConfig

NAMES = ["sea cow", "bee", "crane, bird", "ant"]


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


@pytest.fixture
def open_shards(make_shard: Callable[..., Path], picture: Callable[[int], bytes]) -> Any:
    """A set of shards with these members as labels."""

    def build(*labels: bytes, ext: str = "cls", **options: Any) -> EvaluationSet:
        samples = [(f"k{n}", {"png": picture(n), ext: label}) for n, label in enumerate(labels)]
        shards = str(make_shard("labels.tar", samples))
        options = {"label_key": ext, "classnames": NAMES} | options
        return EvaluationSet(shards, 8, image_keys=["png"], **options)

    return build


def test_names_in_shards(open_shards: Any) -> None:
    found = open_shards(b"bee\n", b"3", b"crane, bird", b" sea cow")
    (batch,) = found.batches(4)
    assert (batch["label"], batch["skipped"].total()) == ([1, 3, 2, 0], 0)
    record = open_shards(b'{"y": "ant"}', b'{"y": 2}', ext="json", label_key="json:y")
    assert [record[number]["label"] for number in range(2)] == [3, 2]
    assert open_shards(b'{"y": 2.0}', ext="json", label_key="json:y")[0]["label"] == 2


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (b"fly", {}, "label 'fly', which is neither a number nor one of classnames: name the"),
        (b"bee", {"classnames": ["bee", "ant", "bee"]}, "label 'bee', which is neither"),
        (b"bee", {"classnames": ["0", "1", "2", "3"]}, "label 'bee', which is neither"),
        (b"ant, red fly, 1", {"several": True}, "label 'red fly', which is neither"),
        (b"x" * 999, {}, "label 'x{59}…, which is neither"),
        (b'{"y": 1.5}', {"ext": "json", "label_key": "json:y"}, "label 1.5, which is neither"),
        (b'{"y": true}', {"ext": "json", "label_key": "json:y"}, "label True, which is neither"),
        (b"-1", {}, "label -1, but there are 4 classes"),
        (b"-2 1", {"several": True}, "label -2, but there are 4 classes"),
        (b'{"y": [1]}', {"ext": "json", "label_key": "json:y"}, "a list: set label_kind to any"),
    ],
)
def test_what_is_no_class_is_an_error_and_not_left_out(
    open_shards: Any, label: bytes, options: dict[str, Any], message: str
) -> None:
    found = open_shards(label, label, **options)
    with pytest.raises(ShardError, match=f"^sample 'k0' of '.*labels.tar' has .*{message}"):
        found.check_labels()
    with pytest.raises(ShardError, match=message):
        list(found.batches(1))


def test_several_names_of_a_sample(open_shards: Any) -> None:
    texts = [
        b"bee, ant", b"1 3", b"[1 3]", b"[1, 3]", b'["bee", "ant"]', b"bee ant", b"bee\nant\n",
        b"crane, bird", b"sea cow,bee", b"", b"[]", b'["sea cow", " "]', b"-1", b"[-1, 2.0]",
    ]  # fmt: skip
    found = open_shards(*texts, several=True)
    assert [found[number]["labels"] for number in range(len(texts))] == (
        [[1, 3]] * 7 + [[2], [0, 1], [], [], [0], [], [2]]
    )
    arrays = []
    for values in ([1, 3], [2]):
        buffer = io.BytesIO()
        np.save(buffer, np.array(values))
        arrays.append(buffer.getvalue())
    found = open_shards(*arrays, ext="npy", several=True)
    assert [found[number]["labels"] for number in range(2)] == [[1, 3], [2]]
    assert open_shards(arrays[1], ext="npy")[0]["label"] == 2


def test_names_count_for_the_version_where_they_are_looked_up(open_shards: Any) -> None:
    def versions(*labels: bytes) -> set[str]:
        path = open_shards(*labels).index.paths[0]
        return {
            EvaluationSet(path, 8, image_keys=["png"], label_key="cls", classnames=names).version()
            for names in (NAMES, NAMES[::-1])
        }

    assert len(versions(b"1", b"2")) == 1  # so that pictures are not embedded anew
    assert len(versions(b"1", b"bee")) == 2


def test_the_evaluator_of_pretraining_looks_names_up(open_shards: Any) -> None:
    path = open_shards(b"bee", b"ant", b"1").index.paths[0]
    evaluator = ClassificationEvaluator(
        EvaluationSetConfig(shards=path, image_keys=["png"]), 8, NAMES, (0.5,) * 3, (0.5,) * 3
    )

    class AlwaysBee(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 0.0]))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.scores.expand(len(images), 4)

    figures = evaluator(AlwaysBee())
    assert figures["acc1"] == pytest.approx(2 / 3)
    assert "skipped" not in figures


@pytest.mark.parametrize(
    ("folders", "names", "labels", "classes"),
    [
        (["ant", "bee", "sea_cow"], NAMES, [3, 1, 0], NAMES),
        (["0", "10", "2"], [f"c{n}" for n in range(11)], [0, 10, 2], [f"c{n}" for n in range(11)]),
        (["ant", "sea_cow"], (), [0, 1], ["ant", "sea cow"]),
        (["n01", "n02"], ["tench", "shark"], [0, 1], ["n01", "n02"]),
        (["1", "0"], ["one", "two"], [0, 1], ["one", "two"]),
    ],
)
def test_folders_with_the_names_of_classes(
    tmp_path: Path,
    picture: Callable[[int], bytes],
    folders: list[str],
    names: list[str],
    labels: list[int],
    classes: list[str],
) -> None:
    for number, name in enumerate(folders):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(number))
    found = image_folder(str(tmp_path), eval_transform(8), None, names)
    assert [label for entry in found.entries for label in entry.labels] == labels
    assert found.classnames == classes


def test_a_folder_is_read_as_for_training(
    tmp_path: Path, picture: Callable[[int], bytes], encode: Callable[..., bytes]
) -> None:
    from PIL import Image

    (tmp_path / "ant" / ".thumbnails").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    avif = encode(Image.new("RGB", (8, 8), "red"), "AVIF")
    for name in ("ant/a.avif", "ant/.b.png", "ant/.thumbnails/c.png", ".git/d.png", "ant/e.txt"):
        (tmp_path / name).write_bytes(avif if name.endswith("avif") else picture(0))
    (tmp_path / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = image_folder(str(tmp_path), eval_transform(8))
    assert [entry.key for entry in found.entries] == ["ant/a.avif", "ant/gone.png"]
    (batch,) = found.batches(2)
    assert batch["key"] == ["ant/a.avif"]
    assert batch["skipped"] == {"unreadable file": 1}
    assert found.fingerprint() == image_folder(str(tmp_path), eval_transform(8)).fingerprint()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["azure", "green"],
            "the folder 'azure', which is none of classnames: call each folder as",
        ),
        (["1", "2"], "the folder '2', which is none of classnames"),
        (["1", "green"], "the folder '1', which is the class of another one, too"),
    ],
)
def test_folders_of_which_some_are_no_classes_are_told(
    tmp_path: Path, picture: Callable[[int], bytes], folders: list[str], message: str
) -> None:
    for name in folders:  # in the order of their names, labels would belong to other classes
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(0))
    with pytest.raises(ShardError, match=message):
        image_folder(str(tmp_path), eval_transform(8), None, ["red", "green"])


def test_rows_without_a_picture_are_skipped(
    tmp_path: Path, picture: Callable[[int], bytes]
) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"image": cell, "label": 0} for cell in ({"bytes": picture(0), "path": None}, None)]
    path = str(tmp_path / "saved")
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features)).save_to_disk(path)
    found = hugging_face_set(path, "test", eval_transform(8), "label", classnames=["ant"])
    (batch,) = found.batches(2)
    assert (batch["key"], batch["skipped"]) == (["0"], {"no image in the row": 1})


def test_a_picture_of_a_karpathy_split_that_is_lost_later_is_skipped(
    tmp_path: Path, picture: Callable[[int], bytes]
) -> None:
    images = [
        {"filename": f"{n}.png", "split": "test", "sentences": [{"raw": f"picture {n}"}]}
        for n in range(2)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    for n in range(2):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    found = karpathy_split(
        str(tmp_path / "dataset_coco.json"), str(tmp_path), "test", eval_transform(8)
    )
    (tmp_path / "1.png").unlink()
    (batch,) = found.batches(2)
    assert (batch["key"], batch["skipped"]) == (["0.png"], {"unreadable file": 1})
