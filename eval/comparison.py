"""Which differences between evaluated models are more than chance: a paired bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.label_metrics import LABELS
from eval.results import markdown_table, sample_name
from eval.statistics import paired_class_difference, paired_difference
from eval.tables import short


def comparison_table(folders: list[str]) -> str:
    """A Markdown table with a line for every figure that all folders have.

    Args:
        folders: two or more that `write_results` has written; others are compared with the first.
            A star marks differences whose 95 % interval leaves out 0; with many figures, one in
            twenty does so by chance.

    Raises:
        ValueError: fewer than two folders, one without results, nothing in common, or sets that
            are not the same.
    """
    if len(folders) < 2:
        raise ValueError("give at least two folders of results to compare")
    runs = [_read(Path(folder)) for folder in folders]
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    if not shared:
        raise ValueError("the results have no set and task in common")
    rows = []
    for key in shared:
        records = [run[key] for run in runs]
        marks = ("shards_fingerprint", "content_sha256")
        if any(len({record.get(mark) for record in records}) > 1 for mark in marks):
            raise ValueError(f"{key[0]}: the results are of different samples; evaluate them again")
        rows += _rows(records, [Path(folder) for folder in folders])
    names = [record["model"] for record in (run[shared[0]] for run in runs)]
    if len({*names}) < len(names):  # checkpoints of one run
        names = folders
    others = [f"{name} - {names[0]} (95 % interval)" for name in names[1:]]
    return markdown_table(["set", "task", "metric", *names, *others], rows)


def _read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    path = folder / "results.json"
    if not path.is_file():
        if folder.is_file():
            raise ValueError(f"'{folder}' is a file: give the folder that holds it")
        raise ValueError(
            f"'{folder}' holds no results.json: run scripts.evaluate --results {folder}"
        )
    records = json.loads(path.read_text(encoding="utf-8"))
    return {(record["dataset"], record["task"]): record for record in records}


def _rows(records: list[dict[str, Any]], folders: list[Path]) -> list[list[str]]:
    paths = [
        folder / "samples" / f"{sample_name(record)}.npz"
        for folder, record in zip(folders, records, strict=True)
    ]
    samples = [dict(np.load(path, allow_pickle=False)) for path in paths]
    rows = []
    for name in records[0]["metrics"]:
        if not all(name in record["metrics"] for record in records):
            continue
        cells = [_with_interval(record, name) for record in records]
        for own in samples[1:]:
            cells.append(_difference(name, samples[0], own))
        rows.append([records[0]["dataset"], records[0]["task"], name, *cells])
    return rows


def _difference(name: str, first: dict[str, Any], other: dict[str, Any]) -> str:
    """How far a figure of `other` is from that of `first`; "-" where samples do not tell."""
    if name in first and name in other:
        value, low, high = paired_difference(first[name], other[name])
    elif name == "mean_per_class_recall" and LABELS in first:
        hits = first["acc1"], other["acc1"]
        value, low, high = paired_class_difference(*hits, first[LABELS])
    else:
        return "-"
    star = " *" if low > 0 or high < 0 else ""
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f}){star}"


def _with_interval(record: dict[str, Any], name: str) -> str:
    bounds = record["ci95"].get(name)
    value = short(record["metrics"][name])
    return value if bounds is None else f"{value} ({short(bounds[0])} to {short(bounds[1])})"
