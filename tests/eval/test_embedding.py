"""Embeddings: exact shares, and a cache that serves nothing stale."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from data_pipelines.evaluation import EvaluationSet
from data_pipelines.evaluation_files import image_folder
from data_pipelines.shards import ShardError
from eval import embedding
from eval.embedding import KINDS, EmbeddedSet, cache_key, embed
from eval.open_model import OpenedModel
from eval.subject import Caller, Identity, Subject, from_opened

LABELS = {"label_key": "cls", "classnames": ["a", "b", "c", "d"]}


@dataclass
class Counting:
    """Pictures become their means, texts their lengths; calls are counted."""

    calls: int = 0
    subject: Subject = field(init=False)

    def __post_init__(self) -> None:
        def means(images: Tensor) -> Tensor:
            self.calls += 1
            return images.float().mean((2, 3))

        def lengths(texts: list[str]) -> Tensor:
            return torch.tensor([[float(len(text)), 1.0, 0.0] for text in texts])

        identity = Identity(torch.nn.Identity(), [])
        self.subject = Subject(
            "counting", "here", identity, "fp32", {}, lambda image: image, means, means, lengths
        )


def open_set(shards: Path, **options: object) -> EvaluationSet:
    given = {"image_keys": ["png"], "caption_key": "txt", **LABELS} | options
    return EvaluationSet(f"{shards}/train-*.tar", 16, **given)


def assert_equal(one: EmbeddedSet, two: EmbeddedSet) -> None:
    assert one.rows.keys() == two.rows.keys()
    assert all(torch.equal(one.rows[kind], two.rows[kind]) for kind in one.rows)
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.owners, two.owners)
    names = ("captions", "keys", "numbers", "hashes", "skipped")
    assert all(getattr(one, name) == getattr(two, name) for name in names)


def copy_shards(shards: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for path in sorted(shards.glob("*.tar")):
        (folder / path.name).write_bytes(change(path.read_bytes()))
    return folder


def test_three_processes_merge_to_what_one_sees(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy_shards(shards, tmp_path, lambda data: data.replace(b"\x89PNG", b"\x00PNG", 2))
    samples, subject = open_set(broken), Counting().subject
    whole = embed(subject, samples, set(KINDS), batch_size=5)
    assert len(whole.keys) == 20
    assert whole.skipped.total() == 4
    shares = []
    for rank in range(3):
        monkeypatch.setattr(embedding, "process", lambda rank=rank: (rank, 3))
        shares.append(embedding._own_share(subject, samples, set(KINDS), 5, 0))
    assert_equal(embedding._merge(shares), whole)


def test_a_share_is_sent_once(shards: Path) -> None:
    """A row that is pickled alone takes its whole batch along."""
    wide = Counting().subject
    wide = replace(wide, encode_image=lambda images: torch.zeros(len(images), 4096))
    share = embedding._own_share(wide, open_set(shards), {"image"}, 12, 0)
    assert len(pickle.dumps(share)) < 1.2 * 24 * 4096 * 4


def test_a_change_of_any_byte_is_embedded_again(shards: Path, tmp_path: Path) -> None:
    folder = copy_shards(shards, tmp_path / "shards", bytes)
    model = Counting()

    def labels() -> list[int]:
        found = embed(model.subject, open_set(folder), {"image"}, cache=str(tmp_path / "cache"))
        return found.labels[:, 0].tolist()

    before = labels()
    calls = model.calls
    assert labels() == before
    assert model.calls == calls  # from the cache
    # A label of the same length: names, sizes and keys stay as they are.
    data = (folder / "train-0.tar").read_bytes()
    place = data.index(b"0000.cls") + 512
    (folder / "train-0.tar").write_bytes(data[:place] + b"3" + data[place + 1 :])
    assert open_set(folder).fingerprint() == open_set(shards).fingerprint()
    assert labels() == [3, *before[1:]]
    assert model.calls > calls


def test_how_samples_are_read_is_part_of_the_key(shards: Path, tmp_path: Path) -> None:
    """A member with two labels is an error for one kind of set and two labels for another, which is
    not served from what the other one has embedded."""
    subject = Counting().subject
    kinds = (False, True)
    keys = {cache_key(subject, open_set(shards, several=several), {"image"}) for several in kinds}
    assert len(keys) == 2
    folder = copy_shards(shards, tmp_path, bytes)
    data = (folder / "train-0.tar").read_bytes()
    header = data.index(b"0000.cls")
    size = header + 124
    changed = bytearray(data)
    changed[size : size + 12] = b"00000000003\0"
    changed[header + 512 : header + 515] = b"1 2"
    checksum = header + 148
    changed[checksum : checksum + 8] = b" " * 8
    changed[checksum : checksum + 7] = b"%06o\0" % sum(changed[header : header + 512])
    (folder / "train-0.tar").write_bytes(changed)
    with pytest.raises(ShardError, match="has label '1 2', which is neither"):
        embed(subject, open_set(folder), {"image"}, cache=str(tmp_path))
    found = embed(subject, open_set(folder, several=True), {"image"}, cache=str(tmp_path))
    assert len(found.keys) == 24
    assert found.labels[0].tolist() == [1, 2]


def test_an_image_folder_is_embedded_again_when_a_picture_changes(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "pictures" / "red" / "a.png"
    picture.parent.mkdir(parents=True)
    rows = []
    for colour in ("#ff0000", "#fe0000"):
        Image.new("RGB", (16, 16), colour).save(picture)
        samples = image_folder(str(tmp_path / "pictures"), lambda image: image)
        found = embed(Counting().subject, samples, {"image"}, cache=str(tmp_path / "cache"))
        rows.append(found.rows["image"][0, 0].item())
    assert rows == [255, 254]


def test_one_state_of_weights_in_two_architectures_or_with_two_tokenizers() -> None:
    """Weights alone do not say what embeddings a model gives."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
    }

    def opened(quick: bool, start: int = 1) -> Identity:
        torch.manual_seed(0)
        model = open_clip.CLIP(**config, quick_gelu=quick).eval()

        def tokenizer(texts: list[str]) -> Tensor:
            return torch.full((len(texts), 8), start)

        given = OpenedModel(model, tokenizer, 16, (0.5,) * 3, (0.5,) * 3, "squash", "bicubic", "x")
        return from_opened("x", given, Caller(torch.device("cpu"), None), "fp32").identity

    plain, quick, other = opened(False), opened(True), opened(False, 2)
    assert len({one.weights_sha256 for one in (plain, quick, other)}) == 1
    assert len({plain.fingerprint, quick.fingerprint, other.fingerprint}) == 3
    assert opened(False).fingerprint == plain.fingerprint
