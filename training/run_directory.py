"""The folder of one run: its settings, logs and checkpoints."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SETTINGS = "config.yaml"
PARTIAL_SETTINGS = SETTINGS + ".partial"
# All that a run has written which failed before its first row, with nothing to lose.
OF_A_START = {SETTINGS, PARTIAL_SETTINGS, "env.json", "train.log"}
# What a run may change when it is continued: nothing of it touches what is learnt, but for the
# number of steps, which is worth a line.
FREE_SETTINGS = {
    "resume", "run_dir", "evaluation", "data.workers",
    "data.index_folder", "data.on_bad_sample", "data.max_skipped", "data.report_wait",
    "data.reading.attempts", "data.reading.backoff", "data.reading.timeout",
    "train.steps", "train.log_every", "train.eval_every", "train.save_every", "train.keep_last",
    "train.threads", "train.tensorboard", "train.log_routing", "train.max_time",
    "train.stall_limit", "train.ema_evaluate", "train.compile", "train.gradient_checkpointing",
    "train.expert_parallel", "train.fsdp",
    "train.trackers", "train.sample_sheets", "train.peak_tflops", "train.keep_every",
    "train.keep_best", "train.save_in_background",
}  # fmt: skip


class RunDirectoryError(ValueError):
    """A run directory that must not be used; the message says what to do."""


def check_run_directory(
    folder: Path, resume: str | None, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Refuse to mix a new run into an old one, or to continue one with other settings.

    Args:
        folder: the run directory, which need not exist.
        resume: None, `auto` or a checkpoint.
        settings: the resolved configuration as nested plain values.
        defaults: what settings are unless told otherwise, likewise; an older version's run had this
            value of a setting that its record lacks.

    Returns:
        For every setting that may change and has, a text such as `train.steps was 2, is 3`.

    Raises:
        RunDirectoryError: the folder holds something, and `resume` is neither `auto` nor a
            checkpoint in it; or it holds no run, or one whose settings differ.
    """
    own = resume == "auto" or (
        resume is not None and folder.resolve() in Path(resume).resolve().parents
    )
    blocked = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if blocked is not None:
        raise RunDirectoryError(
            f"run directory '{folder}': '{blocked}' is a file: choose another --run_dir"
        )
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not present - {PARTIAL_SETTINGS} or (resume is None and present <= OF_A_START):
        return {}
    if not own:
        raise RunDirectoryError(
            f"run directory '{folder}' is not empty: continue that run with --resume auto,"
            " or choose another --run_dir"
        )
    changed = _differences(_read_settings(folder), settings, defaults)
    refused = [text for name, text in changed.items() if name not in FREE_SETTINGS]
    if refused:
        more = f", and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise RunDirectoryError(
            f"run directory '{folder}' holds a run with other settings:"
            f" {'; '.join(refused[:4])}{more}: continue it with its own, or choose another"
            " --run_dir"
        )
    return changed


def _read_settings(folder: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise RunDirectoryError(
            f"'{folder}' is not empty and holds no run, it has no readable {SETTINGS}: choose"
            " another --run_dir"
        )
    return content


def _differences(
    saved: Mapping[str, Any], present: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, str]:
    # As JSON, so that text is told from numbers and a list from a tuple is not.
    old, new, default = _flat(saved), _flat(present), _flat(defaults)
    pairs = {
        name: (old.get(name, default.get(name, "not set")), new.get(name, "not set"))
        for name in {**new, **old}
    }
    return {name: f"{name} was {a}, is {b}" for name, (a, b) in pairs.items() if a != b}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name, as JSON."""
    return _flat(settings)


def _flat(settings: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Values as JSON by dotted name."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(_given(value), default=str, sort_keys=True)
    return found


def _given(value: Any) -> Any:
    """A list of groups of settings without those that are empty: an older version's record of such
    a list lacks settings that are new, and empty unless told otherwise."""
    if not isinstance(value, list):
        return value
    return [
        {name: one for name, one in item.items() if one not in ("", None)}
        if isinstance(item, Mapping)
        else item
        for item in value
    ]


def check_tensorboard() -> None:
    """Raise ValueError unless the tensorboard package is installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "train.tensorboard needs the tensorboard package:"
            " pip install 'softmoe-clip[tensorboard]'"
        )


def write_environment(path: Path) -> None:
    """Record versions, machine and command line."""
    packages = ("torch", "torchvision", "timm", "open_clip_torch", "accelerate", "transformers")
    content = {
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def has_row(path: Path, step: int) -> bool:
    """Whether a file of JSON lines holds one of `step`; other lines may be torn."""
    if not path.exists():
        return False
    return any(f'{{"step": {step}, ' in line for line in path.read_text("utf-8").splitlines())


class MetricsWriter:
    """Appends JSON lines to `metrics.jsonl` and `eval.jsonl`, and to TensorBoard when asked.

    After a resume, lines of steps that are going to be repeated are dropped first, so that every
    step appears once.
    """

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        self.folder = folder
        for name in ("metrics.jsonl", "eval.jsonl"):
            _drop_after(folder / name, resumed_step)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to `<name>.jsonl`: the step, the time, and `values`.

        JSON has no infinity and no NaN; they become null.
        """
        values = {name: _finite(value) for name, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3), **values}
        with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{name}/{key}", value, step)

    def write_picture(self, name: str, step: int, picture: Image.Image) -> None:
        """Send a picture to TensorBoard, if it was asked for."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line torn by a kill
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
