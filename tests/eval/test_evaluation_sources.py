"""Image folders and datasets of Hugging Face: samples, class names, splits, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.image_folder import read_file
from data_pipelines.shards import ShardError
from eval.config import EvaluationSetConfig
from eval.embedding import embed
from eval.evaluation_sets import plan_set
from eval.measure import measure_tasks
from eval.subject import Identity, Subject
from eval.tasks import ProbeOptions

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def means(images: Tensor) -> Tensor:
    return images.float().mean((2, 3))


def colour_of(texts: list[str]) -> Tensor:
    return torch.tensor([COLOURS[text.split()[-1]] for text in texts]).float()


SUBJECT = Subject(
    "colours", "here", Identity(torch.nn.Identity(), []), "fp32", {}, lambda image: image, means,
    means, colour_of,
)  # fmt: skip


def picture(name: str, shade: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), tuple(max(v - shade, 0) for v in COLOURS[name]))


def write_folder(root: Path, split: str, *names: str, count: int = 2, shade: int = 0) -> None:
    for name in names:
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(name, 7 * number + shade).save(folder / f"{number}.png")


def figures(config: EvaluationSetConfig) -> dict[str, Any]:
    works = measure_tasks([plan_set(config, SUBJECT)], ProbeOptions(shots=(1,), neighbours=2))
    return {work.task: work.measured.metrics for work in works}


def test_an_image_folder_of_which_a_split_lacks_a_class(tmp_path: Path) -> None:
    """Without the folder of blue, green and red of the test split would be labels 0 and 1."""
    write_folder(tmp_path, "train", *COLOURS)
    write_folder(tmp_path, "test", "green", "red", shade=3)
    tasks = ["zero_shot_classification", "few_shot", "linear_probe", "knn"]
    config = EvaluationSetConfig(data=str(tmp_path), tasks=tasks)
    planned = plan_set(config, SUBJECT)
    assert planned.classnames == ["blue", "green", "red"]
    assert embed(SUBJECT, planned.test, {"image"}).labels[:, 0].tolist() == [1, 1, 2, 2]
    found = figures(config)
    assert {
        task: own.get("acc1", own.get("1shot_acc1")) for task, own in found.items()
    } == dict.fromkeys(tasks, 1.0)


def test_probes_do_not_learn_from_what_they_are_tested_on(tmp_path: Path) -> None:
    write_folder(tmp_path, "", *COLOURS)  # no splits
    config = EvaluationSetConfig(data=str(tmp_path), tasks=["knn"])
    with pytest.raises(ValueError, match="one split for learning and testing"):
        plan_set(config, SUBJECT)
    rows = {"image": [picture("red")], "label": [0]}
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red"])}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    saved.save_to_disk(str(tmp_path / "saved"))
    config.data = str(tmp_path / "saved")
    with pytest.raises(ValueError, match="one split for learning and testing"):
        plan_set(config, SUBJECT)


@pytest.mark.parametrize(("count", "reads"), [(3, 0), (2, 2)])
def test_splits_are_told_apart_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, reads: int
) -> None:
    """By names and labels, or by the first pictures where those are the same."""
    write_folder(tmp_path, "train", *COLOURS, count=count)
    write_folder(tmp_path, "test", *COLOURS, shade=3)
    read: list[Path] = []

    def counting(path: Path) -> bytes:
        read.append(path)
        return read_file(path)

    monkeypatch.setattr("data_pipelines.image_folder.read_file", counting)
    plan_set(EvaluationSetConfig(data=str(tmp_path), tasks=["knn"]), SUBJECT)
    assert len(read) == reads


def test_one_other_picture_makes_another_split(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", *COLOURS)
    write_folder(tmp_path, "test", *COLOURS)
    config = EvaluationSetConfig(data=str(tmp_path), tasks=["knn"])
    with pytest.raises(ValueError, match="one split for learning and testing"):
        plan_set(config, SUBJECT)
    picture("red", 50).save(tmp_path / "test" / "red" / "1.png")
    plan_set(config, SUBJECT)
    (tmp_path / "test" / "red" / "1.png").unlink()
    (tmp_path / "test" / "red" / "1.png").symlink_to(tmp_path / "nowhere")
    plan_set(config, SUBJECT)  # one that cannot be read is another, too


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    def save(labels: list[Any], feature: Any, **columns: Any) -> str:
        names = [list(COLOURS)[i % 3] for i in range(len(labels))]
        rows = {"picture": [picture(name, i) for i, name in enumerate(names)], "label": labels}
        features: dict[str, Any] = {"picture": datasets.Image(), "label": feature}
        for key, values in columns.items():
            rows[key] = values
            features[key] = datasets.List(datasets.Value("string"))
        split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        path = tmp_path / "saved"
        datasets.DatasetDict({"test": split}).save_to_disk(str(path))
        return str(path)

    return save


def test_a_saved_dataset_names_its_classes_and_captions(saved: Callable[..., str]) -> None:
    captions = [["all blue", "very blue"], ["some green"], ["in red"]]
    path = saved([0, 1, 2], datasets.ClassLabel(names=list(COLOURS)), captions=captions)
    config = EvaluationSetConfig(
        data=path, tasks=["zero_shot_classification", "retrieval"], caption_key="captions"
    )
    found = figures(config)
    assert found["zero_shot_classification"]["acc1"] == 1.0
    assert found["retrieval"]["image_retrieval_recall@1"] == 1.0
    planned = plan_set(config, SUBJECT)
    embedded = embed(SUBJECT, planned.test, {"image", "text"})
    assert embedded.owners.tolist() == [0, 0, 1, 2]
    assert planned.test.pictures([2]).shape == (1, 3, 8, 8)
    config.split = "validation"
    with pytest.raises(ShardError, match="has no split 'validation': it has test"):
        plan_set(config, SUBJECT)
    config.split, config.caption_key = "test", None
    with pytest.raises(ValueError, match="has no captions: set caption_key"):
        plan_set(config, SUBJECT)


def test_names_that_disagree_with_the_labels(saved: Callable[..., str], tmp_path: Path) -> None:
    """As Food-101's two orders do."""
    path = saved([0, 1, 2], datasets.ClassLabel(names=list(COLOURS)))
    names = tmp_path / "names.txt"
    config = EvaluationSetConfig(
        data=path, tasks=["zero_shot_classification"], classnames=str(names)
    )
    names.write_text("Blue\nRed\nGreen\n")
    with pytest.raises(ValueError, match="calls label 1 'green', but classnames 'Red'"):
        plan_set(config, SUBJECT)
    names.write_text("Blue\nGreen\n")
    with pytest.raises(ValueError, match="has 3 classes, but classnames has 2"):
        plan_set(config, SUBJECT)
    names.write_text("blue\ngreen\na bright red\n")
    assert plan_set(config, SUBJECT).classnames[2] == "a bright red"


def test_several_labels_of_a_sample(saved: Callable[..., str]) -> None:
    feature = datasets.List(datasets.ClassLabel(names=list(COLOURS)))
    path = saved([[0], [1, 2], [0]], feature)
    config = EvaluationSetConfig(data=path, tasks=["zero_shot_classification"], label_kind="any")
    assert figures(config)["zero_shot_classification"]["acc1"] == pytest.approx(2 / 3)
    config.label_kind = "multi"
    assert 0 < figures(config)["zero_shot_classification"]["mean_average_precision"] < 1
    config.label_kind = "single"
    with pytest.raises(ShardError, match=r"holds .*, a list: set label_kind to any or multi"):
        plan_set(config, SUBJECT)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (["a", "b", "c"], "string", "holds 'a', which is neither a number nor one of classnames"),
        ([0, -1, 2], "int64", "1 of 3 samples of evaluation set .* have no label"),
        ([0, 1, 3], "int64", "has label 3, but there are 3 classes"),
    ],
)
def test_labels_that_cannot_be_used(
    saved: Callable[..., str], tmp_path: Path, labels: list[Any], kind: str, message: str
) -> None:
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    config = EvaluationSetConfig(
        data=saved(labels, datasets.Value(kind)), tasks=["zero_shot_classification"],
        classnames=str(tmp_path / "names.txt"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        plan_set(config, SUBJECT)


def test_what_is_no_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    config = EvaluationSetConfig(data=str(tmp_path / "gone"), tasks=["zero_shot_classification"])
    with pytest.raises(ShardError, match="is no folder and no dataset that loads"):
        plan_set(config, SUBJECT)
    config.data = str(tmp_path)
    with pytest.raises(ShardError, match="holds no pictures in class folders"):
        plan_set(config, SUBJECT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="holds no pictures in class folders"):
        plan_set(config, SUBJECT)


def test_imagenet_names_and_templates_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    buffer = io.BytesIO()
    picture("red").save(buffer, "PNG")
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    rows = {"image": [{"bytes": buffer.getvalue()}], "label": [999]}
    split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"test": split}).save_to_disk(str(tmp_path / "saved"))
    config = EvaluationSetConfig(
        data=str(tmp_path / "saved"), tasks=["zero_shot_classification"],
        classnames="open_clip:imagenet",
    )  # fmt: skip
    for name, templates in (
        ("open_clip:80", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("open_clip:7", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        config.templates = [name]
        prompts = plan_set(config, SUBJECT).prompts
        assert len(prompts) == 1000
        assert prompts[0] == [fill(open_clip.IMAGENET_CLASSNAMES[0]) for fill in templates]
        assert prompts[999][-1] == templates[-1](open_clip.IMAGENET_CLASSNAMES[999])
