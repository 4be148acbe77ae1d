"""Checkpoints that are complete or do not exist, and that hold nothing that must be unpickled.

A checkpoint is written to a temporary folder, flushed, sealed with a manifest of sizes and
hashes, renamed, and only then are older ones removed. Weights, optimizer and random states are
safetensors; the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 1
REPLACED = ".replaced"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why."""


def checkpoint_name(step: int) -> str:
    """Folder name of a checkpoint; names sort by step."""
    return f"step_{step:08d}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as '<parameter name>::<state name>' tensors."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {
        f"{names[parameter]}::{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` returned.

    Raises:
        CheckpointError: state of a parameter that is not trained now.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: p for name, p in module.named_parameters() if p in trained}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("::")
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint has trained '{name}', which is frozen now: resume with the"
                " settings of the run, or start a new one from its weights"
            )
        parameter = parameters[name]
        # Only a fused optimizer counts its steps on the device; moments live with the parameter.
        counts_there = parameter.is_cuda and bool(optimizer.defaults.get("fused"))
        device = parameter.device if key != "step" or counts_there else "cpu"
        is_flag = value.dtype == torch.bool and value.ndim == 0
        optimizer.state[parameter][key] = bool(value) if is_flag else value.to(device)


def random_state() -> dict[str, Tensor]:
    """States of the Python, numpy, torch and CUDA generators of this process, as tensors."""
    _, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([legacy["state"]["pos"], legacy["has_gauss"]]),
        "numpy_gauss": torch.tensor(legacy["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    gauss = float(state["python_gauss"])
    words = tuple(state["python"].tolist())
    random.setstate((3, words, None if math.isnan(gauss) else gauss))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors makes its owner's own."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


class CheckpointWriter:
    """Writes one checkpoint: `begin` on the main process, `add_*` anywhere, `publish` on main."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.final = folder / checkpoint_name(step)
        self.partial = folder / f".{checkpoint_name(step)}.partial"

    def begin(self) -> None:
        """Make the temporary folder, without what an earlier attempt has left there."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a safetensors file, with its folder."""
        path = self._place(name)
        save_tensors({key: v.detach().cpu().contiguous() for key, v in tensors.items()}, path)

    def add_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, with its folder."""
        path = self._place(name)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _place(self, name: str) -> Path:
        """Where a file goes. The partial folder itself is not made again: where it has been
        removed, a save has failed, and what is written later is no checkpoint."""
        path = self.partial / name
        if path.parent != self.partial:
            path.parent.mkdir(exist_ok=True)
        return path

    def publish(self, step: int, facts: Mapping[str, Any] | None = None) -> Path:
        """Flush every file, write the manifest and give the folder its final name.

        Args:
            facts: what the manifest says besides the step and the files.
        """
        entries = {}
        for path in sorted(self.partial.rglob("*")):
            _flush(path)  # folders too: their entries are data
            if path.is_file():
                relative = path.relative_to(self.partial).as_posix()
                entries[relative] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        self.add_json(MANIFEST, {"format": FORMAT, "step": step, **(facts or {}), "files": entries})
        _flush(self.partial / MANIFEST)
        _flush(self.partial)
        replaced = self.folder / f".{self.final.name}{REPLACED}"
        if self.final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.final, replaced)  # listed in its place until the next line is done
        os.replace(self.partial, self.final)
        _flush(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there and unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{folder}' is no complete checkpoint, it has no readable {MANIFEST}; a complete one"
            f" is a folder such as <run_dir>/checkpoints/{checkpoint_name(1000)}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(f"'{folder}' has format {version}, this version reads {FORMAT}")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"'{folder}' is damaged: {name} is missing or has another size")
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"'{folder}' is damaged: {name} has changed")


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of a run, oldest first (not verified).

    One that a killed process had moved aside to publish its step again counts while the step has
    no other.
    """
    found = {path.name: path for path in folder.glob("step_*") if path.is_dir()}
    for path in folder.glob(f".step_*{REPLACED}"):
        found.setdefault(_published_name(path), path)
    return [found[name] for name in sorted(found)]


def _published_name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(REPLACED)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Newest checkpoint that verifies, and a message for every broken one that was passed over."""
    messages = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            return path, messages
    return None, messages


def prune_checkpoints(
    folder: Path, newest: Path, keep: int, protected: Collection[str] = ()
) -> None:
    """Keep `newest`, which has just been published, the `keep - 1` before it, and those before it
    whose names are `protected`.

    Checkpoints of later steps are left over from before the run went back: they are broken, or
    belong to a continuation that was given up. They would stand in the place of good ones, so they
    are removed too, as is what killed processes have not finished writing.
    """
    checkpoints = list_checkpoints(folder)
    earlier = [path for path in checkpoints if _published_name(path) <= newest.name]
    kept = earlier[-max(1, keep) :]
    kept += [path for path in earlier if _published_name(path) in protected]
    for path in {*checkpoints, *folder.glob(".step_*")} - set(kept):
        shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty if it is not readable."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"'{path}' is not a readable safetensors file: {error}") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load all parameters of `module`, or raise CheckpointError naming what differs."""
    expected = module.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"'{source}' holds another architecture: {shown}{more}")
    module.load_state_dict(tensors)
