"""Checkpoints are complete or do not exist, and damage is noticed and named."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_name,
    list_checkpoints,
    load_optimizer_tensors,
    load_tensors,
    load_weights,
    newest_checkpoint,
    optimizer_tensors,
    prune_checkpoints,
    random_state,
    restore_random_state,
    verify_checkpoint,
)


def publish(folder: Path, step: int) -> Path:
    writer = CheckpointWriter(folder, step)
    writer.begin()
    writer.add_tensors("model.safetensors", {"weight": torch.full((64,), float(step))})
    writer.add_tensors("rng/rank_0.safetensors", random_state())
    writer.add_json("state.json", {"step": step})
    return writer.publish(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_has_its_name_before_everything_is_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 3)
    writer.begin()
    writer.add_json("state.json", {"step": 3})
    assert newest_checkpoint(tmp_path) == (None, [])
    final = writer.publish(3)
    assert names(tmp_path) == [checkpoint_name(3)]
    assert newest_checkpoint(tmp_path) == (final, [])


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    files = [path for path in publish(tmp_path, 1).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:  # eight bytes of header length, then a JSON header: nothing that unpickles
            length = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + length])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "rng/rank_0.safetensors", "manifest.json"])
def test_damage_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, harm: object, name: str
) -> None:
    if (harm, name) == (flip, "manifest.json"):
        harm = truncate  # its last byte is a line end, which changes nothing
    good, bad = publish(tmp_path, 1), publish(tmp_path, 2)
    assert callable(harm)
    for _ in range(3 if name == "manifest.json" and harm is truncate else 1):
        harm(bad / name)
    with pytest.raises(CheckpointError, match=re.escape(str(bad))) as error:
        verify_checkpoint(bad)
    assert name in str(error.value)
    assert newest_checkpoint(tmp_path) == (good, [str(error.value)])


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": 99, "files": {}}'])
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (publish(tmp_path, 1) / "manifest.json").write_text(content)
    newest, messages = newest_checkpoint(tmp_path)
    assert newest is None
    assert len(messages) == 1


def test_what_is_no_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="such as <run_dir>/checkpoints/step_"):
        verify_checkpoint(tmp_path)


def test_publishing_again_replaces(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / checkpoint_name(1) / "model.safetensors").write_bytes(b"broken")
    verify_checkpoint(publish(tmp_path, 1))


def test_a_kill_while_a_step_is_published_again_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 2)
    monkeypatch.undo()
    newest, messages = newest_checkpoint(tmp_path)
    assert messages == []
    assert newest is not None
    assert float(load_tensors(newest / "model.safetensors")["weight"][0]) == 2.0
    assert len(list_checkpoints(tmp_path)) == 2
    last = publish(tmp_path, 3)
    prune_checkpoints(tmp_path, last, 2)  # the one that was moved aside counts as step 2
    assert list_checkpoints(tmp_path) == [newest, last]
    prune_checkpoints(tmp_path, publish(tmp_path, 2), 1)
    assert names(tmp_path) == [checkpoint_name(2)]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    newest = [publish(tmp_path, step) for step in (8, 9, 10, 11)][-1]
    prune_checkpoints(tmp_path, newest, 2)
    assert names(tmp_path) == [checkpoint_name(10), checkpoint_name(11)]
    prune_checkpoints(tmp_path, newest, 1)
    assert names(tmp_path) == [checkpoint_name(11)]


def test_a_broken_later_checkpoint_takes_no_good_ones_place(tmp_path: Path) -> None:
    publish(tmp_path, 10)
    truncate(publish(tmp_path, 20) / "model.safetensors")
    (tmp_path / ".step_00000017.partial").mkdir()
    newest = publish(tmp_path, 15)  # a run that went back to step 10
    prune_checkpoints(tmp_path, newest, 1)
    assert names(tmp_path) == [checkpoint_name(15)]


def test_unreadable_tensors_are_an_error_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tensors(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"text\.safetensors' is not a readable"):
        load_tensors(tmp_path / "text.safetensors")


def test_another_architecture_is_explained() -> None:
    tensors: dict[str, Tensor] = {
        "weight": torch.zeros(2, 3),
        "scale": torch.zeros(()),
    }
    with pytest.raises(CheckpointError) as error:
        load_weights(nn.Linear(4, 2), tensors, "there")
    message = str(error.value)
    assert "'there' holds another architecture" in message
    assert "missing bias" in message
    assert "unexpected scale" in message
    assert "weight is (2, 3), expected (2, 4)" in message
    many = {f"layer{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"and 7 more$"):
        load_weights(nn.Linear(4, 2), many, "there")


def test_random_state_round_trip(tmp_path: Path) -> None:
    def draw() -> tuple[object, ...]:
        return (
            torch.rand(3).tolist(), random.random(), random.gauss(), np.random.rand(3).tolist(),
            np.random.standard_normal(),
        )  # fmt: skip

    random.gauss()  # leaves a second value waiting, as does numpy's
    np.random.standard_normal()
    loaded = load_tensors(publish(tmp_path, 1) / "rng" / "rank_0.safetensors")
    expected = draw()
    assert draw() != expected
    restore_random_state(loaded)
    assert draw() == expected


def trained(steps: int, lr: float = 0.1) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, fused=True)
    continue_training(module, optimizer, steps)
    return module, optimizer


def continue_training(module: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> None:
    for _ in range(steps):
        module(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    module, optimizer = trained(3)
    writer = CheckpointWriter(tmp_path, 3)
    writer.begin()
    writer.add_tensors("optimizer.safetensors", optimizer_tensors(optimizer, module))
    path = writer.publish(3) / "optimizer.safetensors"
    other, fresh = trained(0)
    other.load_state_dict(module.state_dict())
    load_optimizer_tensors(fresh, other, load_tensors(path))
    continue_training(module, optimizer, 2)
    continue_training(other, fresh, 2)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_state_of_a_frozen_parameter_is_refused() -> None:
    module, optimizer = trained(1)
    head = torch.optim.AdamW(module[1].parameters())
    with pytest.raises(CheckpointError, match=r"trained '0\.weight', which is frozen now"):
        load_optimizer_tensors(head, module, optimizer_tensors(optimizer, module))


def test_a_folder_that_is_copied_stays_valid(tmp_path: Path) -> None:
    verify_checkpoint(Path(shutil.copytree(publish(tmp_path, 1), tmp_path / "elsewhere")))
