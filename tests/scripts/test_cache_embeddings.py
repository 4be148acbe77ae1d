"""Cached embeddings of frozen towers: training equals that with the towers run live; refusals."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from contrastive.dual_encoder import (
    build_dual_encoder,
    frozen_parts,
    model_config,
)
from contrastive.initial_weights import initialise_towers
from contrastive.objective import ContrastiveObjective
from data_pipelines.image_text import image_text_stream
from encoders.text_towers import build_tokenizer
from scripts import cache_embeddings, train_contrastive
from scripts.cli import parse_config
from scripts.train_contrastive import ContrastiveRun
from tests.conftest import write_shard
from tests.scripts.test_evaluate import free_port

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789", "first", "second", "line"]
BOTH = ("image", "text")


@pytest.fixture(autouse=True)
def on_the_cpu(fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def save_bert(folder: Path, seed: int, words: list[str]) -> Path:
    """A tiny random BERT with dropout, and a tokenizer, as Hugging Face saves them."""
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "words.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, hidden_dropout_prob=0.3,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_trunk(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(timm.create_model(TEST, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def world(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with 1 to 3 captions a picture and two samples that cannot be used; both towers."""
    root = tmp_path_factory.mktemp("world")
    noise = np.random.default_rng(0)
    from PIL import Image

    (root / "shards").mkdir()
    for shard in range(3):
        samples = {}
        for number in range(6):
            path = root / "picture.png"
            Image.fromarray(noise.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
            lines = [f"{word} line {shard} {number}" for word in ("first", "second", "")]
            samples[f"{shard}{number}"] = {
                "png": path.read_bytes(),
                "txt": "\n".join(lines[: 1 + number % 3]).encode(),
            }
        if shard == 1:
            samples["12"]["png"] = b"broken"
            samples["14"]["txt"] = b" "
        write_shard(root / "shards" / f"{shard}.tar", samples)
    save_trunk(root / "trunk.safetensors", 1)
    save_bert(root / "bert", 1, WORDS)
    return root


def settings(world: Path, *more: str, shards: str = "shards") -> list[str]:
    """Of a run with both towers frozen, for both commands."""
    return [
        f"--image.name={TEST}", f"--image.init_from={world}/trunk.safetensors",
        "--image.frozen=true", "--text.kind=hugging_face", f"--text.folder={world}/bert",
        "--text.frozen=true", "--text.context_length=8", "--contrastive.embed_dim=8",
        f"--data.shards={world}/{shards}/*.tar", "--data.workers=0", "--train.batch_size=6",
        "--train.steps=5", "--train.threads=1", "--train.log_every=1", "--train.save_every=2",
        "--optimizer.lr=0.01", "--data.augmentation.crop_scale=[1,1]", *more,
    ]  # fmt: skip


def cache_words(world: Path, out: Path, *more: str) -> list[str]:
    """In batches that are smaller than a shard; both hold something to skip."""
    return [*settings(world), f"--out={out}", "--rows=4", *more]


@pytest.fixture(scope="module")
def cached(world: Path) -> Path:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    cache_embeddings.main(cache_words(world, world / "cached"))
    return world / "cached"


def options(cached: Path, sides: tuple[str, ...] = BOTH) -> list[str]:
    return [f"--data.cached_{side}={cached}" for side in sides]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.iterdir())}


def open_run(words: list[str]) -> tuple[ContrastiveObjective, Callable[..., Any]]:
    """Objective and stream of a configuration, as the training command builds them."""
    config = parse_config(ContrastiveRun, words, "")
    description = model_config(config.image, config.text, config.contrastive)
    torch.manual_seed(0)
    model = build_dual_encoder(description)
    initialise_towers(model, config.image, config.text, description)
    frozen = frozen_parts(model, config.image, config.text)
    objective = ContrastiveObjective(model, description, config.contrastive, HALF, HALF, frozen)
    tokenizer = build_tokenizer(description["text_cfg"])

    def batches(count: int, start: int = 0, **share: int) -> list[dict[str, Any]]:
        stream = image_text_stream(
            config.data, image_size=64, tokenize=tokenizer, seed=3, global_batch=6, **share
        )
        return list(itertools.islice(stream.batches(start), count))

    return objective, batches


def refusal(capsys: pytest.CaptureFixture[str], command: Any, words: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2
    # transformers shows a bar of its own while it loads weights.
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "error: " in one]
    return line


def forbid(*_: Any) -> None:
    raise AssertionError("a frozen tower was run")


@pytest.mark.parametrize("sides", [("image",), ("text",), BOTH])
def test_gradients_are_those_of_the_towers_run_live(
    world: Path, cached: Path, sides: tuple[str, ...]
) -> None:
    live, live_batches = open_run(settings(world))
    ours, our_batches = open_run(settings(world, *options(cached, sides)))
    towers = {"image": ours.model.visual.trunk, "text": ours.model.text.transformer}
    for side in sides:
        towers[side].register_forward_pre_hook(forbid)
    skipped = set[str]()
    for expected, batch in zip(live_batches(5), our_batches(5), strict=True):
        assert batch["key"] == expected["key"]
        assert batch["skipped"] == expected["skipped"]
        skipped |= set(batch["skipped"])
        assert not batch.keys() & set(sides)
        for objective, inputs in ((live, expected), (ours, batch)):
            objective.zero_grad()
            loss, metrics = objective(inputs)
            loss.backward()
            inputs["found"] = loss.detach(), metrics["positive_logit"]
        torch.testing.assert_close(batch["found"], expected["found"])
        for (name, one), (_, two) in zip(
            live.named_parameters(), ours.named_parameters(), strict=True
        ):
            if one.requires_grad:
                torch.testing.assert_close(two.grad, one.grad, msg=name)
    assert skipped == {"broken image", "no caption"}  # so they were skipped alike


def test_every_split_of_the_stream_gives_the_same_batches(world: Path, cached: Path) -> None:
    _, batches = open_run(settings(world, *options(cached)))
    whole = batches(7)
    halves = [batches(7, rank=rank, world=2, workers=1) for rank in range(2)]
    for n, batch in enumerate(whole):
        for side in BOTH:
            parts = [half[n][f"{side}_embedding"] for half in halves]
            assert torch.equal(torch.cat(parts), batch[f"{side}_embedding"])
    for late, batch in zip(batches(3, start=4), whole[4:], strict=True):
        assert torch.equal(late["text_embedding"], batch["text_embedding"])


def final(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "checkpoints" / "step_00000005" / "open_clip_model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_command_trains_as_with_live_towers_and_resumes_exactly(
    world: Path, cached: Path, tmp_path: Path, accumulation: int
) -> None:
    split = f"--train.accumulation={accumulation}"
    train_contrastive.main([*settings(world, split), f"--run_dir={tmp_path}/live"])
    words = [*settings(world, split, *options(cached)), f"--run_dir={tmp_path}/cached"]
    train_contrastive.main(words)
    live, found = final(tmp_path / "live"), final(tmp_path / "cached")
    for name, value in live.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    moved = load_file(tmp_path / "live/checkpoints/step_00000004/open_clip_model.safetensors")
    assert not torch.equal(moved["visual.head.proj.weight"], live["visual.head.proj.weight"])
    shutil.rmtree(tmp_path / "cached" / "checkpoints" / "step_00000005")
    train_contrastive.main([*words, "--resume=auto"])
    again = final(tmp_path / "cached")
    assert all(torch.equal(again[name], value) for name, value in found.items())


def test_what_is_written_and_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = cache_words(world, tmp_path / "new" / "folder", "--dtype=float16")
    cache_embeddings.main(words)
    assert capsys.readouterr().out.splitlines() == [
        "frozen image tower: 3 of 3 shards to embed",
        "frozen text tower: 3 of 3 shards to embed",
        f"frozen image tower: 17 samples of 3 shards are embedded: train with --data.cached_image"
        f" {tmp_path}/new/folder; 1 sample skipped: 1 broken image",
        f"frozen text tower: 17 samples of 3 shards are embedded: train with --data.cached_text"
        f" {tmp_path}/new/folder; 1 sample skipped: 1 no caption",
    ]
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert len(files) == 6
    assert [path.name.split("-")[0] for path in files] == ["0", "0", "1", "1", "2", "2"]
    rows = [load_file(path)["embeddings"] for path in files]
    assert {row.dtype for row in rows} == {torch.float16}
    assert [len(row) for row in rows] == [6, 12, 5, 10, 6, 12]
    before = snapshot(tmp_path / "new" / "folder")
    cache_embeddings.main(words)
    assert "image tower: 0 of 3 shards to embed" in capsys.readouterr().out
    assert snapshot(tmp_path / "new" / "folder") == before
    cache_embeddings.main([*words, "--dtype=float32", "--towers=[text]"])  # replaces three files
    assert "text tower: 3 of 3 shards to embed" in capsys.readouterr().out
    after = snapshot(tmp_path / "new" / "folder")
    assert {name for name in before if before[name] != after[name]} == {
        path.name for path in files if ".text." in path.name
    }
    half = open_run(settings(world, *options(tmp_path / "new" / "folder")))[1](1)[0]
    assert half["image_embedding"].dtype == torch.float16


@pytest.mark.slow
def test_an_interrupted_command_is_continued_by_two_processes(
    world: Path,
    cached: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_python: Any,
) -> None:
    replace, words = os.replace, cache_words(world, tmp_path / "out")

    def stop_at_the_third(source: Path, target: Path) -> None:
        if target.name.startswith("2-"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_third)
        with pytest.raises(SystemExit):
            cache_embeddings.main(words)
    done = {n: v for n, v in snapshot(tmp_path / "out").items() if not n.startswith(".")}
    assert len(done) == 2
    result = run_python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
        "-m", "scripts.cache_embeddings", *words, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "frozen image tower: 1 of 3 shards to embed" in result.stdout
    assert result.stdout.count("frozen text tower: 17 samples of 3 shards are embedded") == 1
    found = snapshot(tmp_path / "out")
    assert done.items() <= found.items()  # written once
    expected = {name: data for name, (_, data) in snapshot(cached).items()}
    assert {name: data for name, (_, data) in found.items()} == expected


def train_words(world: Path, cached: Path, tmp_path: Path, *more: str) -> list[str]:
    return [*settings(world, *options(cached), *more), f"--run_dir={tmp_path}/run"]


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
