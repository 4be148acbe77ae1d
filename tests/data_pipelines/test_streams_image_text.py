"""The captioned and the labelled stream, from real shards through real loader processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import get_tokenizer
from PIL import Image
from torch import Tensor

from data_pipelines.captions import (
    MAX_BYTES,
    captions_of,
    draw_caption,
    group_of,
    label_of,
    members_of,
    parse_field,
    read_captions,
    read_field,
)
from data_pipelines.classification import classification_stream, read_lines
from data_pipelines.config import AugmentationConfig, ClassificationConfig, ImageTextConfig
from data_pipelines.image_text import ImageTextLoader, image_text_stream
from data_pipelines.shards import (
    MAX_MEMBER_BYTES,
    FieldError,
    ShardError,
    ShardReader,
    index_shards,
)
from data_pipelines.stream import SkipSample, Stream

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
Picture = Callable[[int], bytes]
Tokenize = Callable[[list[str]], Tensor]
WILD = AugmentationConfig(crop_scale=(0.2, 1.0), flip=0.5, rotate=20, brightness=0.3)


def take(stream: Stream, steps: int, start: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(stream.batches(start), steps))


def join(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The batch that the parts of several processes are together."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name not in whole:
                whole[name] = value
            elif isinstance(value, Tensor):
                whole[name] = torch.cat([whole[name], value])
            else:
                whole[name] = whole[name] + value
    return whole


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, Tensor) else (lambda a, b: a == b)
            assert same(value, other[name]), name


def texts_of(batch: dict[str, Any]) -> list[str]:
    return ["".join(map(chr, row)).rstrip("\0") for row in batch["text"].tolist()]


@pytest.fixture
def open_stream(captioned: str, tokenize: Tokenize) -> Callable[..., Stream]:
    """Open the 20 captioned samples with strong augmentation."""

    def build(**options: Any) -> Stream:
        config = ImageTextConfig(shards=captioned, shuffle_window=8, augmentation=WILD)
        defaults = {"image_size": 12, "tokenize": tokenize, "seed": 5, "global_batch": 4}
        return image_text_stream(config, **defaults | options)

    return build


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_the_batches_of_one(
    open_stream: Callable[..., Stream], workers: int
) -> None:
    whole = take(open_stream(), 10)
    parts = [take(open_stream(rank=rank, world=2, workers=workers), 10) for rank in range(2)]
    assert_same([join(pair) for pair in zip(*parts, strict=True)], whole)
    assert_same(take(open_stream(workers=workers), 4, start=6), whole[6:])


def test_the_batch(open_stream: Callable[..., Stream]) -> None:
    batches = take(open_stream(), 10)
    for batch in batches:
        assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 12, 12))
        assert (batch["text"].dtype, batch["text"].shape) == (torch.int64, (4, 32))
        assert batch["skipped"] == []
        for key, text in zip(batch["key"], texts_of(batch), strict=True):
            assert type(key) is str
            assert text in {f"{word} {int(key[1:])}" for word in ("one", "two", "three")}
    words = Counter(text.split()[0] for batch in batches for text in texts_of(batch))
    assert set(words) == {"one", "two", "three"}
    first, second = join(batches[:5]), join(batches[5:])
    assert sorted(first["key"]) == sorted(second["key"]) == [f"k{n:02d}" for n in range(20)]
    again = [second["key"].index(key) for key in first["key"]]
    changed = (second["image"][again] != first["image"]).flatten(1).any(1)
    assert changed.all()  # an epoch later the same picture is augmented differently


def test_datasets_travel_to_other_processes(open_stream: Callable[..., Stream]) -> None:
    # What the start methods spawn and forkserver do, here after files have been opened.
    tokenizer = get_tokenizer("ViT-B-32", context_length=8)
    dataset = open_stream(tokenize=tokenizer).dataset
    first = dataset[7]
    assert_same([pickle.loads(pickle.dumps(dataset))[7]], [first])


def test_classification_stream(captioned: str) -> None:
    config = ClassificationConfig(shards=captioned)
    options = {"image_size": 12, "seed": 1, "global_batch": 10}
    batches = take(classification_stream(config, num_classes=20, **options), 2)
    for batch in batches:
        assert (batch["label"].dtype, batch["label"].shape) == (torch.int64, (10,))
        assert [f"k{label:02d}" for label in batch["label"].tolist()] == batch["key"]
    few = classification_stream(config, num_classes=19, workers=2, **options)
    batch = join(take(few, 2))
    assert set(batch["label"].tolist()) == set(range(19))
    assert set(batch["skipped"]) == {"label outside 0..18"}


def test_every_unusable_sample_is_counted_by_reason(
    make_shard: MakeShard, picture: Picture, tokenize: Tokenize, encode: Callable[..., bytes]
) -> None:
    good = [(f"good{n}", {"png": picture(n), "txt": b"fine"}) for n in range(24)]
    bad = [
        ("cut", {"png": picture(0)[:200], "txt": b"fine"}),
        ("empty", {"png": b"", "txt": b"fine"}),
        ("no_text", {"png": picture(1)}),
        ("blank", {"png": picture(2), "txt": b" \n\n"}),
        ("long", {"png": picture(3), "txt": b"x" * (MAX_BYTES + 1)}),
        ("no_image", {"txt": b"fine"}),
        ("large", {"png": encode(Image.new("RGB", (40, 40)), "PNG"), "txt": b"fine"}),
    ]
    shards = str(make_shard("x.tar", [*good[:9], *bad, *good[9:]]))
    config = ImageTextConfig(shards=shards, max_pixels=1000)
    options = {"image_size": 8, "tokenize": tokenize, "seed": 0, "global_batch": 31}
    for epoch, batch in enumerate(take(image_text_stream(config, **options), 3)):
        assert len(batch["key"]) == 31, epoch
        assert {key for key, _ in good} == set(batch["key"])
        counts = Counter(batch["skipped"])
        assert counts.keys() == {
            "broken image",
            "no txt member",
            "no caption",
            "no image member",
            f"txt member over {MAX_BYTES} bytes",
            "image over 1000 pixels",
        }
        assert counts["broken image"] >= 2
        assert counts.total() >= 7


def test_all_bad_data_stops_the_run(make_shard: MakeShard, tokenize: Tokenize) -> None:
    samples = [(f"{n}", {"jpg": b"junk", "txt": b"fine"}) for n in range(100)]
    config = ImageTextConfig(shards=str(make_shard("x.tar", samples)))
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=0, global_batch=4)
    with pytest.raises(ShardError, match=r"^64 samples in a row .*: broken image \(64\);"):
        take(stream, 1)


def test_the_first_image_key_is_used(
    make_shard: MakeShard, picture: Picture, tokenize: Tokenize, encode: Callable[..., bytes]
) -> None:
    red = encode(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG")
    members = {"webp": b"junk", "png": picture(0), "jpg": red, "txt": b"fine"}
    index = index_shards([str(make_shard("x.tar", [("a", members)]))])

    def load(keys: list[str]) -> Tensor:
        config = ImageTextConfig(image_keys=keys)
        return ImageTextLoader(index, config, 8, tokenize)(0)["image"]

    assert (load(["jpeg", "jpg", "png"])[0] > 250).all()
    assert not (load(["png", "jpg"])[0] > 250).all()


def test_missing_kinds_of_members_are_refused_at_once(captioned: str, tokenize: Tokenize) -> None:
    options = {"image_size": 8, "seed": 0, "global_batch": 4}
    for change, message in (
        ({"image_keys": ["jpg"]}, "for the picture: looked for jpg; .* hold: cls, png, txt"),
        ({"caption_key": "json:caption"}, "for the caption: looked for json;"),
        ({"group_key": "json:md5"}, "for the group: looked for json;"),
    ):
        config = ImageTextConfig(shards=captioned, **change)
        with pytest.raises(ShardError, match=message):
            image_text_stream(config, tokenize=tokenize, **options)
    with pytest.raises(ShardError, match=r"for the label: looked for json;"):
        classification_stream(
            ClassificationConfig(shards=captioned, label_key="json:label"), num_classes=2, **options
        )


def test_groups_and_json_captions(
    make_shard: MakeShard, picture: Picture, tokenize: Tokenize
) -> None:
    records: list[Any] = [
        {"caption": "red", "concept": 1},
        {"caption": ["green"], "concept": 1},
        {"caption": "blue", "concept": "x"},
        {"caption": "white"},
        {"caption": None},
        [],
    ]
    members = [{"png": picture(n), "json": json.dumps(r).encode()} for n, r in enumerate(records)]
    members.append({"png": picture(9), "json": b"{"})
    shards = str(make_shard("x.tar", [(f"{n}", m) for n, m in enumerate(members)]))
    config = ImageTextConfig(
        shards=shards, caption_key="json:caption", group_key="json:concept", shuffle=False
    )
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=0, global_batch=7)
    (batch,) = take(stream, 1)
    assert (batch["group"].dtype, batch["group"].shape) == (torch.int64, (7,))
    assert texts_of(batch)[:3] == ["red", "green", "blue"]
    group = batch["group"].tolist()
    assert group[0] == group[1] != group[2]
    assert set(batch["skipped"]) == {
        "no field 'concept' in json",
        "no field 'caption' in json",
        "broken json member",
    }


def test_equal_values_make_equal_groups() -> None:
    assert group_of("a") == group_of("a") == int(hashlib.sha256(b"a").hexdigest()[:16], 16) // 2
    assert group_of(1) == group_of("1") != group_of("2")
    assert all(0 <= group_of(n) < 2**63 for n in range(100))
    assert group_of("\ud800") != group_of("\ud801")


@pytest.mark.parametrize(
    ("key", "data", "value"),
    [
        ("txt", b"a\nb", "a\nb"),
        ("txt", b"\xef\xbb\xbfmark", "mark"),
        ("txt", b"bad \xff byte", "bad \ufffd byte"),
        ("json:x", b'\xef\xbb\xbf{"x": [1]}', [1]),
        ("json:a.b", b'{"a.b": "c"}', "c"),
        ("json:x", b'{"x": "half \\ud800 pair"}', "half \ufffd pair"),
        ("json:x", b'{"x": ["\\udfff", 1, "\\ud83d\\ude00"]}', ["\ufffd", 1, "\U0001f600"]),
    ],
)
def test_fields(key: str, data: bytes, value: object) -> None:
    assert parse_field(key, data) == value


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no json member"),
        (b"", "broken json member"),
        (b"[" * 100_000, "broken json member"),
        (b'{"x": ' + b"9" * 5000 + b"}", "broken json member"),
        (b'["x"]', "no field 'x' in json"),
        (b'{"x": null}', "no field 'x' in json"),
    ],
)
def test_broken_fields(data: bytes | None, reason: str) -> None:
    with pytest.raises(FieldError, match=f"^{reason}$"):
        parse_field("json:x", data)


def test_large_members_are_passed_over_unread(
    make_shard: MakeShard, picture: Picture, tokenize: Tokenize
) -> None:
    members = {"png": picture(0), "txt": b"fine", "json": b'{"x": "y"}'}
    index = index_shards([str(make_shard("x.tar", [("a", members)]))])
    assert read_field(ShardReader(index), 0, "json:x") == "y"
    index.members["json"][0, 1] = MAX_BYTES + 1
    with pytest.raises(FieldError, match=f"^json member over {MAX_BYTES} bytes$"):
        read_field(ShardReader(index), 0, "json:x")
    index.members["png"][0, 1] = MAX_MEMBER_BYTES + 1
    with pytest.raises(SkipSample, match=f"^png member over {MAX_MEMBER_BYTES} bytes$"):
        ImageTextLoader(index, ImageTextConfig(), 8, tokenize)(0)


def test_captions() -> None:
    assert captions_of(" one \r\n\n two\n") == ["one", "two"]
    assert captions_of(["one\ntwo", " ", None, 3, "three"]) == ["one\ntwo", "three"]
    for nothing in ("", " \n", [], [None], {"text": "one"}, 7):
        with pytest.raises(FieldError, match="no caption"):
            captions_of(nothing)


def test_captions_of_several_fields_are_pooled(make_shard: MakeShard, picture: Picture) -> None:
    records = [{"words": ["c", "d"]}, {"words": []}, {}]
    texts = [b"a\nb", b"a", b" "]
    shard = make_shard(
        "several.tar",
        [
            (str(n), {"png": picture(n), "txt": text, "json": json.dumps(record).encode()})
            for n, (text, record) in enumerate(zip(texts, records, strict=True))
        ],
    )
    reader = ShardReader(index_shards([str(shard)]))
    assert read_captions(reader, 0, "txt::txt::json:words") == ["a", "b", "a", "b", "c", "d"]
    assert read_captions(reader, 0, "json:words::txt") == ["c", "d", "a", "b"]
    assert read_captions(reader, 1, "txt::json:words") == ["a"]
    with pytest.raises(FieldError, match="no caption"):
        read_captions(reader, 2, "txt::json:words")
    assert members_of("txt::json:words") == ["txt", "json"]


def test_one_caption_costs_no_randomness() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draw_caption(["one"]) == "one"
    assert torch.equal(torch.get_rng_state(), before)
    counts = Counter(draw_caption(["one", "two", "three"]) for _ in range(300))
    assert len(counts) == 3
    assert min(counts.values()) > 60


def test_labels() -> None:
    assert [label_of(value, 3) for value in ("0", " 2\n", 1, "01")] == [0, 2, 1, 1]
    for value in ("cat", "", "1.0", None, True, [1], "9" * 5000):
        with pytest.raises(FieldError, match="label is no integer"):
            label_of(value, 3)
    for value in ("3", "-1"):
        with pytest.raises(FieldError, match=r"label outside 0\.\.2"):
            label_of(value, 3)


def test_read_lines(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\n  dog \n\n", encoding="utf-8")
    assert read_lines(str(path)) == ["cat", "dog"]
    path.write_text("cat\n\ndog\n", encoding="utf-8")
    with pytest.raises(ShardError, match=r"names\.txt', line 2 is empty: fill or remove it"):
        read_lines(path)
    path.write_text("\n")
    with pytest.raises(ShardError, match=r"names\.txt' is empty"):
        read_lines(path)
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ShardError, match=r"names\.txt' is not UTF-8 text"):
        read_lines(path)
    for missing in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(ShardError, match="is not a file: it should hold one name per line"):
            read_lines(missing)


@pytest.mark.parametrize(
    "augmentation",
    [
        AugmentationConfig(),
        AugmentationConfig(recipe="inception"),
        AugmentationConfig(recipe="inception", brightness=0.4, policy="rand_augment"),
        AugmentationConfig(rotate=20.0),  # made at twice the size
    ],
)
def test_pictures_are_put_where_the_batch_wants_them(
    make_shard: Any, picture: Any, encode: Any, tokenize: Any, augmentation: AugmentationConfig
) -> None:
    """Without a copy, in the layout of a stack, and never where an earlier batch lies."""
    fits = encode(Image.new("RGB", (8, 8), (9, 200, 30)), "JPEG")  # needs no resizing
    broken = picture(5)[:60]
    data = [picture(0), fits, broken, picture(1), picture(2), broken, picture(3), fits]
    extensions = ["jpg" if one is fits else "png" for one in data]
    samples = [
        (f"{n}", {ext: one, "txt": b"t"})
        for n, (ext, one) in enumerate(zip(extensions, data, strict=True))
    ]
    shards = str(make_shard("0.tar", samples))
    config = ImageTextConfig(shards=shards, augmentation=augmentation)
    stream = image_text_stream(config, image_size=8, tokenize=tokenize, seed=1, global_batch=5)
    batches = list(itertools.islice(stream.batches(), 6))
    assert sum(len(batch["skipped"]) for batch in batches) > 3
    for number, batch in enumerate(batches):
        image = batch["image"]
        assert image.untyped_storage().nbytes() == image.numel() == 5 * 3 * 8 * 8
        assert image.permute(0, 2, 3, 1).is_contiguous()
        for row in range(5):  # each one drawn and decoded on its own
            stream.dataset.load.decoded._rows.clear()
            stream.dataset.start_batch = None
            assert torch.equal(stream.dataset[5 * number + row]["image"], image[row])
