"""Packing tables and `datasets` datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines.pack import PackSummary, pack
from data_pipelines.shards import ShardError, ShardReader, index_shards
from data_pipelines.tool_config import PackConfig

Picture = Callable[[int], bytes]


def packed(source: Path | str, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Members of all samples; text and json as such."""
    run(source, out, **settings)
    reader = ShardReader(index_shards(sorted(map(str, out.glob("*.tar")))))
    samples = []
    for sample in range(len(reader.index)):
        found: dict[str, Any] = {ext: reader.read(sample, ext) for ext in reader.index.members}
        found = {ext: data for ext, data in found.items() if data is not None}
        samples.append(found | {"json": json.loads(found["json"])})
    return samples


def run(source: Path | str, out: Path, **settings: Any) -> PackSummary:
    return pack(PackConfig(str(source), str(out), **settings), workers=0)


@pytest.fixture
def pictures(tmp_path: Path, picture: Picture) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def test_csv_keeps_captions_as_they_are_written(
    pictures: Path, tmp_path: Path, picture: Picture
) -> None:
    """`NA`, `1e3` and `true` are captions, a quoted one may have commas and lines."""
    rows = [
        b"pictures/0.png,NA,7", b'pictures/1.png,"one, two\nthree",x',
        b"pictures/2.png,caf\xff,true", b"pictures/9.png,gone,1", b"pictures/3.png,,1",
    ]  # fmt: skip
    table = tmp_path / "t.csv"
    table.write_bytes(b"path,caption,extra\n" + b"\n".join(rows) + b"\n")
    samples = packed(table, tmp_path / "out")
    assert [s["txt"].decode() for s in samples] == ["NA", "one, two\nthree", "caf\ufffd"]
    assert [s["png"] for s in samples] == [picture(n) for n in range(3)]
    assert samples[0]["json"] == {
        "source": "pictures/0.png", "width": 20, "height": 16, "extra": "7",
    }  # fmt: skip
    record = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert record["skipped"] == {"row 3": "file missing", "row 4": "no caption"}


def test_tsv_as_open_clip_reads_it(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("filepath\ttitle\n0.png\ta cat, a dog\n1.png\tb\n", encoding="utf-8")
    samples = packed(table, tmp_path / "out", root=str(pictures))
    assert [s["txt"] for s in samples] == [b"a cat, a dog", b"b"]


def test_labels_by_name_and_by_number(pictures: Path, tmp_path: Path) -> None:
    named = tmp_path / "named.csv"
    named.write_text("path,kind\n0.png,dog\n1.png,cat\n2.png,dog\n", encoding="utf-8")
    out = tmp_path / "a"
    samples = packed(named, out, root=str(pictures), label_column="kind")
    assert [s["cls"] for s in samples] == [b"1", b"0", b"1"]
    assert (out / "classnames.txt").read_text() == "cat\ndog\n"
    numbered = tmp_path / "numbered.csv"
    numbered.write_text("path,label\n0.png,5\n1.png, 2 \n2.png,\n", encoding="utf-8")
    samples = packed(numbered, tmp_path / "b", root=str(pictures))
    assert [s["cls"] for s in samples] == [b"5", b"2"]
    assert not (tmp_path / "b" / "classnames.txt").exists()


def test_parquet_with_paths_and_with_pictures(
    pictures: Path, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = pyarrow.table(
        {"path": ["0.png", "1.png"], "caption": [["a", "b"], ["c"]], "score": [float("nan"), 2.0]}
    )
    parquet.write_table(table, pictures / "paths.parquet")
    samples = packed(pictures / "paths.parquet", tmp_path / "a")
    assert [s["txt"] for s in samples] == [b"a\nb", b"c"]
    assert [s["json"]["score"] for s in samples] == [None, 2.0]
    inside = pyarrow.table(
        {
            "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in range(3)],
            "text": ["x", None, "z"],
        }
    )
    parquet.write_table(inside, tmp_path / "inside.parquet")
    samples = packed(tmp_path / "inside.parquet", tmp_path / "b")
    assert [s["png"] for s in samples] == [picture(0), picture(2)]
    assert samples[1]["json"]["source"] == "2.png"


def test_datasets_with_class_labels(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red fox", "owl"])}
    )
    rows = {
        "image": [{"bytes": picture(n), "path": None} for n in range(5)],
        "label": [1, 0, 0, 1, 1],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(
        tmp_path / "saved"
    )
    out = tmp_path / "out"
    samples = packed(tmp_path / "saved", out, max_samples=2)
    assert [s["cls"] for s in samples] == [b"1", b"0", b"0", b"1", b"1"]
    assert [s["png"] for s in samples] == [picture(n) for n in range(5)]
    assert (out / "classnames.txt").read_text() == "red fox\nowl\n"
    assert len(packed(tmp_path / "saved", tmp_path / "test", split="test")) == 1
    assert run(tmp_path / "saved", out, max_samples=2).kept == 3  # the same again
    with pytest.raises(ShardError, match="no split 'val': it has train, test"):
        run(tmp_path / "saved", tmp_path / "val", split="val")


def test_a_folder_that_datasets_can_read(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("ant", "bee"):
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(picture(len(name) + (name == "bee")))
    samples = packed(tmp_path / "images", tmp_path / "out", kind="dataset")
    assert [s["cls"] for s in samples] == [b"0", b"1"]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "ant\nbee\n"


def test_parquet_with_text_that_is_no_utf8(pictures: Path, tmp_path: Path) -> None:
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")],
    )
    table = pyarrow.table({"path": ["0.png", "1.png"], "caption": bad})
    parquet.write_table(table, pictures / "t.parquet")
    assert [s["txt"] for s in packed(pictures / "t.parquet", tmp_path / "out")] == [b"a"]
    record = json.loads((tmp_path / "out" / "00000_stats.json").read_text())
    assert record["skipped"] == {"row 1": "row unreadable"}
    labelled = pyarrow.table({"path": ["0.png", "1.png"], "label": bad})
    parquet.write_table(labelled, pictures / "l.parquet")
    with pytest.raises(ShardError, match="cannot be read"):
        run(pictures / "l.parquet", tmp_path / "labelled")


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("a,b\n1,2\n", {}, "no column for pictures: set --image_column to 'a', 'b'"),
        ("path,b\n1,2\n", {}, "no column for captions or labels"),
        ("path,text\n1,2\n", {"caption_column": "x"}, "no column 'x': it has path, text"),
        ("path,text\n1,2,3\n", {}, "cannot be read"),
        ("", {}, "cannot be read"),
        ("path,text\n", {}, "is empty"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, content: str, settings: dict[str, str], message: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(content, encoding="utf-8")
    with pytest.raises(ShardError, match=message):
        run(table, tmp_path / "out", **settings)
