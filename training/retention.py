"""Which checkpoints outlive their turn: every n-th, and the best by a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.checkpoint import list_checkpoints, read_manifest


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
