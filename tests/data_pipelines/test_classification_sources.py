"""Labels and pictures from tables and folders: the same batches, accounting and resume."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from data_pipelines.captions import class_indices_of, label_of, vector_of
from data_pipelines.classification import class_names, classification_stream, open_source
from data_pipelines.config import AugmentationConfig, ClassificationConfig
from data_pipelines.shards import FieldError, ShardError
from data_pipelines.tables import Table

NAMES = ["ant", "bee", "cow"]
OPTIONS = {"image_size": 8, "seed": 3, "global_batch": 5, "num_classes": 3}
WHOLE = AugmentationConfig(recipe="resize")
WILD = AugmentationConfig(recipe="inception")
Picture = Callable[[int], bytes]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path, picture: Picture) -> Path:
    """Seven good pictures in three classes, one of them a folder deeper."""
    root = tmp_path / "folder"
    for number in range(7):
        place = root / NAMES[number % 3] / ("deep" if number == 4 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.PNG").write_bytes(picture(number))
    (root / "ant" / "notes.txt").write_text("not a picture")
    (root / ".hidden").mkdir()
    return root


@pytest.fixture
def table(picture: Picture) -> Dataset:
    """Seven rows, picture n with label n % 3."""
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=NAMES)})
    rows = [{"image": {"bytes": picture(n), "path": None}, "label": n % 3} for n in range(7)]
    return Dataset.from_list(rows, features=features)


def stored(table: Dataset, tmp_path: Path, kind: str) -> str:
    if kind == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
        return str(tmp_path / "*.parquet")
    table.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved/*.arrow") if kind == "arrow" else str(tmp_path / "saved")


def take(config: ClassificationConfig, steps: int, start: int = 0, **more: Any) -> list[Any]:
    stream = classification_stream(config, **OPTIONS | more)
    return list(itertools.islice(stream.batches(start), steps))


def seen(batches: list[Any]) -> Counter[tuple[bytes, int]]:
    """How often each picture came with each label."""
    return Counter(
        (image.contiguous().numpy().tobytes(), label)
        for batch in batches
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "pictures", "streamed", "folder"])
def test_every_source_gives_each_labelled_picture_once_an_epoch(
    table: Dataset, folder: Path, tmp_path: Path, kind: str
) -> None:
    config = ClassificationConfig(augmentation=WHOLE, shuffle_window=4)
    if kind == "folder":
        config.folder = str(folder)
    elif kind == "pictures":  # `datasets` takes labels from folders of one depth only
        (folder / "bee/deep/4.PNG").rename(folder / "bee/4.PNG")
        config.dataset = str(folder)
    elif kind == "streamed":
        config.dataset = stored(table, tmp_path, "parquet")
        config.streaming, config.samples = True, 7
    else:
        config.dataset = stored(table, tmp_path, kind)
    source = open_source(config)
    assert class_names(config, source) == NAMES
    epoch = take(config, 7)  # five epochs of seven in batches of five
    expected = {(classification_picture(table, number), number % 3) for number in range(7)}
    assert seen(epoch) == Counter(dict.fromkeys(expected, 5))
    config.augmentation = WILD
    whole = take(config, 7)
    for workers in (0, 2):  # stopping anywhere and going on changes nothing
        rest = take(config, 4, start=3, workers=workers)
        for one, other in zip(rest, whole[3:], strict=True):
            assert one["key"] == other["key"]
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["label"], other["label"])
    assert open_source(config).classes == NAMES


def classification_picture(table: Dataset, number: int) -> bytes:
    from data_pipelines.transforms import eval_transform

    pixels = torch.from_numpy(np.array(table[number]["image"])).permute(2, 0, 1)
    return eval_transform(8)(pixels).contiguous().numpy().tobytes()


def test_two_processes_share_a_table(table: Dataset, tmp_path: Path) -> None:
    config = ClassificationConfig(dataset=stored(table, tmp_path, "parquet"), augmentation=WILD)
    whole = take(config, 3, global_batch=4)
    parts = [take(config, 3, global_batch=4, rank=rank, world=2) for rank in range(2)]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one["image"], torch.cat([half["image"] for half in halves]))


def test_unusable_rows_and_files_are_counted(
    folder: Path, tmp_path: Path, picture: Picture
) -> None:
    (folder / "bee" / "junk.jpg").write_bytes(b"no picture")
    (folder / "cow" / "none.png").write_bytes(b"")
    (folder / "cow" / "gone.png").symlink_to(folder / "nowhere.png")
    batches = take(ClassificationConfig(folder=str(folder)), 10, global_batch=10)
    counts = Counter(reason for batch in batches for reason in batch["skipped"])
    assert set(counts) == {"broken image", "unreadable file"}

    rows = [{"image": picture(n), "label": n} for n in range(3)]
    rows += [{"image": b"junk", "label": 0}, {"image": None, "label": 1}]
    rows += [{"image": picture(0), "label": None}, {"image": picture(0), "label": 7}]
    Dataset.from_list(rows).to_parquet(tmp_path / "bad.parquet")
    config = ClassificationConfig(dataset=str(tmp_path / "bad.parquet"), shuffle=False)
    (batch,) = take(config, 1, global_batch=7)
    assert set(batch["skipped"]) == {
        "broken image",
        "no image in the row",
        "no label",
        "label outside 0..2",
    }
    assert set(batch["label"].tolist()) == {0, 1, 2}


def test_multi_hot_labels(make_shard: Any, picture: Picture, tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.array([0, 1, 1]))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}, 1], dtype=object), allow_pickle=True)
    members: list[dict[str, bytes]] = [
        {"npy": array.getvalue(), "json": json.dumps({"v": [0.5, 0, 1], "i": [2, 0]}).encode()},
        {"npy": pickled.getvalue(), "json": json.dumps({"v": [1, 0], "i": []}).encode()},
        {"npy": b"\x93NUMPY", "json": json.dumps({"v": [0, float("nan"), 1], "i": [3]}).encode()},
    ]
    samples = [(str(n), {"png": picture(n)} | m) for n, m in enumerate(members)]
    shards = str(make_shard("x.tar", samples))

    def labels(key: str, kind: Any) -> tuple[list[list[float]], set[str]]:
        config = ClassificationConfig(shards=shards, label_key=key, labels=kind, shuffle=False)
        (batch,) = take(config, 1, global_batch=3)
        assert batch["label"].dtype == torch.float32
        unique = sorted({tuple(row) for row in batch["label"].tolist()})
        return [list(row) for row in unique], set(batch["skipped"])

    assert labels("npy", "vector") == ([[0, 1, 1]], {"broken npy member"})
    reasons = {"label of other than 3 numbers", "label with a number outside 0..1"}
    assert labels("json:v", "vector") == ([[0.5, 0, 1]], reasons)
    expected = [[0, 0, 0], [1, 0, 1]]
    assert labels("json:i", "indices") == (expected, {"label outside 0..2"})

    features = Features({"image": Value("binary"), "tags": List(ClassLabel(names=NAMES))})
    rows = [{"image": picture(0), "tags": [0, 2]}, {"image": picture(1), "tags": []}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "tags.parquet")
    config = ClassificationConfig(
        dataset=str(tmp_path / "tags.parquet"), label_column="tags", labels="indices", shuffle=False
    )
    assert open_source(config).classes == NAMES
    (batch,) = take(config, 1, global_batch=2)
    assert batch["label"].tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("value", ["0 1 0", "0,1,0", [0, 1, 0], np.array([[0, 1, 0]])])
def test_vectors(value: object) -> None:
    assert vector_of(value, 3).tolist() == [0, 1, 0]


def test_broken_vectors() -> None:
    for value in ("a b c", {"a": 1}, [[1], [2, 3], 1]):
        with pytest.raises(FieldError, match="label is no vector of numbers"):
            vector_of(value, 3)
    for value in (3, None, {"a": 1}, "0 1"):  # ClassNumbers makes lists of texts
        with pytest.raises(FieldError, match="label is no list"):
            class_indices_of(value, 3)
    assert label_of(np.int64(2), 3) == 2


def test_names_from_a_file_and_what_does_not_fit(
    table: Dataset, folder: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cow\nbee\nant\n")
    config = ClassificationConfig(folder=str(folder), classnames=str(names), augmentation=WHOLE)
    source = open_source(config)
    assert class_names(config, source) == ["cow", "bee", "ant"]
    stream = classification_stream(config, **OPTIONS | {"global_batch": 7})
    batch = next(stream.batches())
    assert {(k[:3], n) for k, n in zip(batch["key"], batch["label"].tolist(), strict=True)} == {
        ("ant", 2), ("bee", 1), ("cow", 0),
    }  # fmt: skip
    names.write_text("cow\nbee\n")
    with pytest.raises(ShardError, match=r"has the folder 'ant', which is none of the classes"):
        open_source(config)
    parquet = ClassificationConfig(
        dataset=stored(table, tmp_path, "parquet"), classnames=str(names)
    )
    with pytest.raises(ShardError, match="names 2 classes, but the data have 3"):
        class_names(parquet, open_source(parquet))


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_names(picture: Picture, tmp_path: Path, streaming: bool) -> None:
    """Without ClassLabel, by the lines of `classnames`; what has none stops, and is not skipped."""
    names = tmp_path / "names.txt"
    names.write_text("sea cow\nbee\nant\n")
    words = ["ant", "bee", " sea cow", "2", None]
    rows = [{"image": picture(n), "label": word} for n, word in enumerate(words)]
    Dataset.from_list(rows).to_parquet(tmp_path / "words.parquet")
    config = ClassificationConfig(
        dataset=str(tmp_path / "words.parquet"), classnames=str(names), augmentation=WHOLE,
        shuffle=False, streaming=streaming, samples=5,
    )  # fmt: skip
    assert class_names(config, open_source(config)) == ["sea cow", "bee", "ant"]
    (batch,) = take(config, 1)
    assert batch["label"].tolist()[:4] == [2, 1, 0, 2]
    assert batch["skipped"] == ["no label"]
    names.write_text("sea cow\nbee\nfly\n")
    with pytest.raises(ShardError, match=r"'label' holds 'ant', which data\.classnames does not"):
        take(config, 1)
    names.write_text("ant\nbee\nbee\n")
    with pytest.raises(ShardError, match=r"holds '.*(bee|sea cow)'.*, which data\.classnames"):
        take(config, 1, global_batch=3)
    config.classnames = ""
    with pytest.raises(ShardError, match=r"holds '.*, no numbers: set data\.classnames to"):
        take(config, 1)


def test_names_in_lists_and_in_shards(make_shard: Any, picture: Picture, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncow\n")
    rows = [{"image": picture(n), "tags": tags} for n, tags in enumerate([["cow", "ant"], []])]
    Dataset.from_list(rows).to_parquet(tmp_path / "tags.parquet")
    tagged = ClassificationConfig(
        dataset=str(tmp_path / "tags.parquet"), label_column="tags", labels="indices",
        shuffle=False, classnames=str(names),
    )  # fmt: skip
    (batch,) = take(tagged, 1, global_batch=2)
    assert batch["label"].tolist() == [[1, 0, 1], [0, 0, 0]]
    words = [b"bee\n", b"ant", b"1", b"wasp"]
    samples = [(f"{n}", {"png": picture(n), "cls": word}) for n, word in enumerate(words)]
    shards = str(make_shard("words.tar", samples))
    config = ClassificationConfig(shards=shards, classnames=str(names), shuffle=False)
    (batch,) = take(config, 1, global_batch=3)
    assert batch["label"].tolist() == [1, 0, 1]
    (batch,) = take(config, 1, global_batch=4)
    assert batch["skipped"] == ["label is no integer"]
    samples = [
        ("0", {"png": picture(0), "cls": b"cow, ant"}),
        ("1", {"png": picture(1), "cls": b"1"}),
    ]
    config.shards, config.labels = str(make_shard("lists.tar", samples)), "indices"
    (batch,) = take(config, 1, global_batch=2)
    assert batch["label"].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_what_cannot_be_opened_is_told_in_a_line(table: Dataset, tmp_path: Path) -> None:
    parquet = stored(table, tmp_path, "parquet")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shards": "a.tar", "folder": "b"}, "data.shards and data.folder are both set"),
        ({}, "no shards given"),
        ({"folder": str(tmp_path / "no")}, "is not a folder"),
        ({"folder": str(tmp_path / "empty")}, "holds no pictures in class folders"),
        ({"dataset": str(tmp_path / "no.parquet")}, "cannot be opened: .*no.parquet"),
        ({"dataset": "./nowhere"}, "cannot be opened: there is no such file or folder"),
        ({"dataset": "nobody/nothing"}, "'nobody/nothing' cannot be opened: "),
        (
            {"dataset": parquet, "streaming": True, "shuffle": False},
            "does not tell its number of rows, .*: set data.samples",
        ),
        ({"dataset": parquet, "split": "val"}, 'cannot be opened: Unknown split "val"'),
        ({"dataset": parquet, "image_column": "img"}, "no column 'img': .* one of image, label"),
        ({"dataset": parquet, "streaming": True}, "set data.shuffle_window to that or less"),
    ]
    for settings, message in cases:
        with pytest.raises(ShardError, match=message) as caught:
            open_source(ClassificationConfig(**settings))
        assert "\n" not in str(caught.value)
    config = ClassificationConfig(dataset=parquet, streaming=True, shuffle=False, samples=9)
    with pytest.raises(ShardError, match=r"ends before row 7: set data\.samples"):
        take(config, 2)


def test_fingerprints_follow_the_data(table: Dataset, folder: Path, tmp_path: Path) -> None:
    def of(rows: Dataset, name: str) -> str:
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "x.parquet")
        return Table(ClassificationConfig(dataset=str(tmp_path / name / "x.parquet"))).fingerprint()

    assert of(table, "one") == of(table, "elsewhere")
    others = [table.select([1, 0, *range(2, 7)]), table.select(range(6))]
    assert len({of(table, "a"), *(of(o, f"o{n}") for n, o in enumerate(others))}) == 3

    def present() -> str:
        source: Any = open_source(ClassificationConfig(folder=str(folder)))
        return source.fingerprint()

    before = present()
    assert before == present()
    with (folder / "bee" / "1.PNG").open("ab") as file:
        file.write(b"\0")
    assert before != present()


def test_streamed_rows_are_found_again(tmp_path: Path) -> None:
    rows = [{"image": b"%d" % n, "label": n} for n in range(3000)]
    Dataset.from_list(rows).to_parquet(tmp_path / "long.parquet")
    config = ClassificationConfig(
        dataset=str(tmp_path / "long.parquet"), streaming=True, shuffle_window=100, samples=3000
    )
    source = Table(config)
    for number in (0, 2999, 1, 511, 512, 2048, 3):
        assert (source.label(number), source.picture(number)) == (number, b"%d" % number)
    again = pickle.loads(pickle.dumps(source))
    assert again.label(1500) == 1500
    assert again.fingerprint() == source.fingerprint()
