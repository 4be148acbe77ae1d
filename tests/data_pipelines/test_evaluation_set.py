"""Evaluation sets: fixed order, every sample once over all processes, reasons for the missing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.decode import decode_rgb
from data_pipelines.evaluation import EvaluationSet, SampleSet
from data_pipelines.shards import ShardError
from data_pipelines.transforms import eval_transform

MakeShard = Callable[[str, Iterable[tuple[str, dict[str, bytes]]]], Path]
Picture = Callable[[int], bytes]


@pytest.fixture
def open_set(captioned: str) -> Callable[..., EvaluationSet]:
    def build(**options: Any) -> EvaluationSet:
        return EvaluationSet(captioned, 8, image_keys=["jpg", "png"], **options)

    return build


def test_samples_come_in_shard_order(
    open_set: Callable[..., EvaluationSet], picture: Picture
) -> None:
    dataset = open_set(caption_key="txt", label_key="cls", classnames=[f"c{n}" for n in range(20)])
    assert len(dataset) == 20
    batches = list(dataset.batches(6))
    assert [len(batch["key"]) for batch in batches] == [6, 6, 6, 2]
    number = 0
    for batch in batches:
        assert batch["skipped"] == Counter()
        assert (batch["image"].dtype, batch["image"].shape[1:]) == (torch.uint8, (3, 8, 8))
        for place, key in enumerate(batch["key"]):
            assert (key, batch["number"][place]) == (f"k{number:02d}", number)
            assert batch["label"][place] == number
            assert batch["captions"][place] == [f"{w} {number}" for w in ("one", "two", "three")]
            expected = eval_transform(8)(decode_rgb(picture(number)))
            assert torch.equal(batch["image"][place], expected)
            number += 1
    assert torch.equal(
        dataset.pictures([3, 19]),
        torch.stack([eval_transform(8)(decode_rgb(picture(n))) for n in (3, 19)]),
    )


def test_a_set_that_lacks_something_cannot_be_made() -> None:
    class Half(SampleSet):
        def __len__(self) -> int:
            return 0

    with pytest.raises(TypeError, match=r"__getitem__.*fingerprint.*version"):
        Half()


def test_pictures_alone(open_set: Callable[..., EvaluationSet]) -> None:
    (batch,) = open_set(resize_mode="shortest").batches(20)
    assert batch["captions"] == [[]] * 20
    assert batch["label"] == [-1] * 20
    assert not torch.equal(batch["image"][0], open_set()[0]["image"])


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2), (3, 2), (23, 0)])
def test_shares_cover_everything_once(
    open_set: Callable[..., EvaluationSet], world: int, workers: int
) -> None:
    dataset = open_set()
    shares = []
    for rank in range(world):
        batches = dataset.batches(3, rank, world, workers)
        shares.append([number for batch in batches for number in batch["number"]])
    assert sorted(itertools.chain(*shares)) == list(range(20))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share == sorted(share) for share in shares)


def test_training_randomness_is_left_alone(open_set: Callable[..., EvaluationSet]) -> None:
    before = torch.get_rng_state()
    assert len(list(open_set().batches(4))) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_unusable_samples_are_left_out_and_counted(make_shard: MakeShard, picture: Picture) -> None:
    samples = [
        ("a", {"png": b"junk", "cls": b"0"}),
        ("b", {"png": picture(0), "cls": b" \n"}),
        ("c", {"png": picture(1), "cls": b"1"}),
        ("d", {"png": picture(2)}),
        ("e", {"cls": b"1"}),
        ("f", {"png": picture(3), "cls": b"0"}),
        ("g", {"png": picture(4), "cls": b"0"}),
    ]
    shards = str(make_shard("x.tar", samples))
    dataset = EvaluationSet(shards, 8, image_keys=["png"], label_key="cls", classnames=["a", "b"])
    first, second, third, fourth = dataset.batches(2)
    assert first == {"skipped": Counter({"broken image": 1, "no label": 1})}
    assert (second["key"], second["skipped"]) == (["c"], Counter({"no cls member": 1}))
    assert (third["key"], third["skipped"]) == (["f"], Counter({"no image member": 1}))
    assert (fourth["number"], fourth["label"], fourth["skipped"]) == ([6], [0], Counter())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("label", [2, -1])
def test_a_label_out_of_range_is_an_error(
    make_shard: MakeShard, picture: Picture, label: int, workers: int
) -> None:
    samples = [("a", b"1"), ("b", b"%d" % label)]
    members = [(key, {"png": picture(0), "cls": content}) for key, content in samples]
    shards = str(make_shard("x.tar", members))
    dataset = EvaluationSet(shards, 8, image_keys=["png"], label_key="cls", classnames=["a", "b"])
    with pytest.raises(ShardError) as caught:
        list(dataset.batches(2, workers=workers))
    assert str(caught.value) == (
        f"sample 'b' of '{shards}' has label {label}, but there are 2 classes: wrong classnames"
        " file or label_key?"
    )


def test_bilinear_is_another_resize(open_set: Callable[..., EvaluationSet]) -> None:
    bilinear = open_set(interpolation="bilinear")[0]["image"]
    assert (bilinear.float() - open_set()[0]["image"].float()).abs().max() > 2


def test_unsuitable_sets_are_refused(captioned: str) -> None:
    with pytest.raises(ShardError, match=r"the caption: looked for json; .* cls, png, txt"):
        EvaluationSet(captioned, 8, image_keys=["png"], caption_key="json:caption")
    with pytest.raises(ShardError, match="the picture: looked for gif;"):
        EvaluationSet(captioned, 8, image_keys=["gif"])
    with pytest.raises(ShardError, match="the label: looked for json;"):
        EvaluationSet(captioned, 8, image_keys=["png"], label_key="json:y", classnames=["a", "b"])
    with pytest.raises(ValueError, match="label_key 'cls' needs classnames"):
        EvaluationSet(captioned, 8, image_keys=["png"], label_key="cls")
    with pytest.raises(ValueError, match="choose squash or shortest"):
        EvaluationSet(captioned, 8, image_keys=["png"], resize_mode="pad")
    with pytest.raises(ValueError, match="'random' is unknown: choose bicubic or bilinear"):
        EvaluationSet(captioned, 8, image_keys=["png"], interpolation="random")
