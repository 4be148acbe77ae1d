"""Cached embeddings of another tower, tokenizer, shard or setting are refused; damaged ones too."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import cache_embeddings, train_contrastive
from tests.scripts.cached_runs import (
    WORDS,
    cache_words,
    options,
    refusal,
    save_bert,
    save_trunk,
    settings,
    train_words,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


REFUSED = {
    "precision": (["--train.precision=bf16"], "cached_image .* precision was fp32, is bf16"),
    "pictures": (["--data.max_pixels=9"], "max_pixels was 64000000, is 9"),
    "member": (["--data.image_keys=[png]"], "image_keys was jpg, jpeg, png, webp, is png"),
    "caption length": (["--text.context_length=6"], "context_length was 8, is 6"),
    "flip": (["--data.augmentation.flip=0.5"], r"data.augmentation \(flip\) would change"),
    "crop": (["--data.augmentation.crop_scale=[0.5,1]"], r"\(crop_scale\) would change"),
    "trained image": (["--image.frozen=false"], "set image.frozen to true"),
    "partly trained": (
        ["--text.frozen=false", "--text.trainable=1"],
        "set text.frozen to true, or do without data.cached_text",
    ),
    "no folder": (
        ["--data.cached_text={world}/none"],
        r"lacks the embeddings of 3 of 3 shards, the first is '0.tar' \(they were not made\): build"
        r".* python -m scripts.cache_embeddings --config FILE --out .*/none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses_other_settings(
    world: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changes, message = REFUSED[name]
    more = [change.replace("{world}", str(world)) for change in changes]
    words = train_words(world, cached, tmp_path, *more)
    line = refusal(capsys, train_contrastive, words)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def copy_world(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world"))


@pytest.mark.parametrize("kind", ["trunk", "bert", "tokenizer"])
def test_a_changed_tower_is_refused_until_it_is_embedded(
    world: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    copy = copy_world(world, tmp_path)
    side, changed = "text", "weights"
    if kind == "trunk":
        side = "image"
        save_trunk(copy / "trunk.safetensors", 2)
    else:
        shutil.rmtree(copy / "bert")
        save_bert(copy / "bert", 2 if kind == "bert" else 1, WORDS)
    if kind == "tokenizer":
        changed = "tokenizer"
        path = copy / "bert" / "tokenizer.json"
        path.write_text(path.read_text().replace('"first"', '"third"'))
    words = train_words(copy, copy / "cached", tmp_path)
    line = refusal(capsys, train_contrastive, words)
    match = re.search(rf"cached_{side} '.*/cached', its embeddings: (.*): build them with", line)
    assert match is not None, line
    assert re.fullmatch(rf"{changed} was [0-9a-f]{{16}}, is [0-9a-f]{{16}}", match[1])
    cache_embeddings.main(cache_words(copy, copy / "cached"))
    said = capsys.readouterr().out
    assert f"frozen {side} tower: 3 of 3 shards to embed" in said
    assert said.count("0 of 3 shards to embed") == 1  # the other tower has not changed
    train_contrastive.main(words)


def test_moved_and_changed_shards(
    world: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_world(world, tmp_path)
    (copy / "shards").rename(copy / "moved")
    words = [*settings(copy, *options(copy / "cached"), shards="moved"), "--train.steps=1"]
    train_contrastive.main([*words, f"--run_dir={tmp_path}/run"])
    shard = copy / "moved" / "1.tar"  # an edit in place that keeps all sizes
    shard.write_bytes(shard.read_bytes().replace(b"first line 1 5", b"first line 2 5"))
    line = refusal(capsys, train_contrastive, [*words, f"--run_dir={tmp_path}/other"])
    assert (
        "lacks the embeddings of 1 of 3 shards, the first is '1.tar' ('1.tar' has changed" in line
    )
    cache_embeddings.main([*words, f"--out={copy}/cached"])
    assert "image tower: 1 of 3 shards to embed" in capsys.readouterr().out
    train_contrastive.main([*words, f"--run_dir={tmp_path}/other"])


def test_damaged_and_mixed_files(
    world: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_world(world, tmp_path)
    words = train_words(copy, copy / "cached", tmp_path)
    path = next((copy / "cached").glob("2-*.image.safetensors"))
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:100], b"", b"\xff" * 300):
        path.write_bytes(content)
        assert "is damaged" in refusal(capsys, train_contrastive, words)
    save_file({"embeddings": torch.zeros(6, 3)}, path)
    assert "is damaged ('record')" in refusal(capsys, train_contrastive, words)
    cache_embeddings.main(cache_words(copy, copy / "cached"))
    assert path.read_bytes() == whole
    path.unlink()  # half of the files of another type
    cache_embeddings.main(cache_words(copy, copy / "half", "--dtype=float16"))
    shutil.copy(copy / "half" / path.name, path)
    line = refusal(capsys, train_contrastive, words)
    assert f"'{path.name}': dtype was float16, is float32" in line


def test_a_run_is_not_resumed_on_other_embeddings(
    world: Path, cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_world(world, tmp_path)
    words = train_words(copy, copy / "cached", tmp_path, "--train.steps=2")
    train_contrastive.main(words)
    save_trunk(copy / "trunk.safetensors", 2)
    cache_embeddings.main(cache_words(copy, copy / "cached"))
    line = refusal(capsys, train_contrastive, [*words, "--resume=auto", "--train.steps=4"])
    assert "on another stream: cached_image was" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image.frozen=false", "--text.frozen=false"], "no tower is frozen"),
        (["--text.frozen=false", "--towers=[text]"], "the text tower is trained"),
        (["--out="], "set --out"),
        (["--rows=0"], "rows must be at least 1"),
        (["--data.augmentation.rotate=5"], r"data.augmentation \(rotate\) would change"),
        (["--data.shards=none/*.tar"], "no shard matches"),
        (["--train.precision=fp16"], "fp16 needs a GPU"),
    ],
)
def test_caching_refuses(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refusal(capsys, cache_embeddings, cache_words(world, tmp_path / "out", *more))
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_embeddings_that_are_not_finite_are_not_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_world(world, tmp_path)
    trunk = load_file(copy / "trunk.safetensors")
    trunk["norm.weight"] *= 1e6  # beyond float16
    save_file(trunk, copy / "trunk.safetensors")
    words = cache_words(copy, tmp_path / "out", "--towers=[image]")
    line = refusal(capsys, cache_embeddings, [*words, "--dtype=float16"])
    assert "not finite as torch.float16: choose --dtype float32" in line
    assert list((tmp_path / "out").iterdir()) == []
    cache_embeddings.main(words)
    assert len(list((tmp_path / "out").iterdir())) == 3
