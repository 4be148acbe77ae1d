"""Which checkpoints outlive their turn: every n-th, and the best by a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoint import list_checkpoints, prune_checkpoints, read_manifest


class Retention(NamedTuple):
    """What is kept: the last checkpoints, multiples of a number of steps, the best by a figure;
    see `protected_checkpoints` for the latter two."""

    last: int
    every: int = 0
    best: str = ""

    def prune(self, folder: Path, newest: Path) -> None:
        """Remove from `folder` what is not kept, now that `newest` has been published."""
        protected = protected_checkpoints(folder, self.every, self.best)
        prune_checkpoints(folder, newest, self.last, protected)


def protected_checkpoints(folder: Path, every: int, best: str) -> set[str]:
    """Names of the checkpoints in `folder` that pruning must leave.

    Args:
        every: multiples of it are kept; 0 keeps none.
        best: the figure whose largest value counts, with a minus before it whose smallest; empty
            for none. Of equal ones the newest counts.
    """
    manifests = {path.name: read_manifest(path) for path in list_checkpoints(folder)}
    kept = {
        name
        for name, manifest in manifests.items()
        if every and manifest.get("step", 0) > 0 and manifest["step"] % every == 0
    }
    values = {
        name: value
        for name, manifest in manifests.items()
        if (value := figure(manifest.get("figures", {}), best)) is not None
    }
    return kept | ({max(values, key=lambda name: (values[name], name))} if values else set())


def figure(figures: Mapping[str, Any], name: str) -> float | None:
    """The value that `best` names, the larger the better; None if there is none, or no number."""
    value = figures.get(name.removeprefix("-"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return -value if name.startswith("-") else value
