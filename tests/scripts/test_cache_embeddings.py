"""Cached embeddings of frozen towers: training equals that with the towers run live."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipelines.shards import ShardReader
from scripts import cache_embeddings, train_contrastive
from tests.scripts.cached_runs import (
    BOTH,
    cache_words,
    forbid,
    open_run,
    options,
    settings,
    snapshot,
)
from tests.scripts.test_evaluate import free_port

pytestmark = pytest.mark.usefixtures("on_the_cpu")


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


def test_a_loader_that_dies_is_told_with_its_sample(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("data_pipelines.training_pictures.TrainingPictures.__call__", crash)
    with pytest.raises(SystemExit) as stop:
        cache_embeddings.main([*cache_words(world, tmp_path / "out"), "--data.workers=1"])
    assert stop.value.code == 1
    assert re.search(
        rf"error: a loader process has died \(pid \d+\): it was killed at sample '00' of"
        rf" '{world}/shards/0.tar', .* more memory; the same command goes on with the shards that",
        capsys.readouterr().err,
    )


def test_a_text_tower_s_embeddings_cost_no_pictures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = set[tuple[str, ...]]()
    prefetch = ShardReader.prefetch

    def note(reader: ShardReader, samples: Any) -> None:
        fetched.add(reader.members)
        prefetch(reader, samples)

    monkeypatch.setattr(ShardReader, "prefetch", note)
    cache_embeddings.main([*cache_words(world, tmp_path / "out"), "--towers=[text]"])
    assert fetched == {("txt",)}


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
