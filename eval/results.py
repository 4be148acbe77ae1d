"""Results as files: JSON lines, CLIP_benchmark's JSON, Markdown, one HTML page, every sample."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.records import check_writable, write_records, write_text
from eval.report import write_report
from eval.results_page import results_report
from eval.tables import short

if TYPE_CHECKING:
    from eval.measure import Outcome

BENCHMARK_KEYS = ("dataset", "model", "pretrained", "task", "metrics", "language")
HEADER = ["set", "task", "metric", "value", "95 % interval", "samples"]


def figure_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Set, task, metric, value, interval and number of samples, of all figures."""
    rows = []
    for record in records:
        for name, value in record["metrics"].items():
            bounds = record["ci95"].get(name)
            interval = "-" if bounds is None else f"{short(bounds[0])} to {short(bounds[1])}"
            rows.append([record["dataset"], record["task"], name, short(value), interval,
                         str(record["n_samples"])])  # fmt: skip
    return rows


def check_folder(folder: str, weights_sha256: str, names: list[str]) -> None:
    """Make sure that results may be written to a folder.

    Raises:
        ValueError: it cannot be written to, it holds those of other weights, or two sets have one
            name.
    """
    check_writable(Path(folder))
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(
            f"two evaluation sets are called '{twice[0]}': give each a name of its own"
        )
    path = Path(folder) / "results.json"
    if not path.is_file():
        return
    found = {record.get("weights_sha256") for record in json.loads(path.read_text("utf-8"))}
    if found - {weights_sha256}:
        raise ValueError(f"'{folder}' holds results of other weights: choose another --results")


def write_results(outcomes: list[Outcome], folder: str) -> None:
    """Append to eval.jsonl; write results.json, results.md, report.html, the outcome of each sample
    (samples/*.npz) and a file for each record (clip_benchmark/*.json), which CLIP_benchmark's
    `build` makes a table of."""
    target = Path(folder)
    records = [outcome.record for outcome in outcomes]
    for name in ("samples", "clip_benchmark"):
        (target / name).mkdir(parents=True, exist_ok=True)
    for outcome in outcomes:
        stem = sample_name(outcome.record)
        columns: dict[str, Any] = outcome.measured.samples
        np.savez_compressed(target / "samples" / f"{stem}.npz", **columns)
        short_record = {key: outcome.record[key] for key in BENCHMARK_KEYS}
        write_text(target / "clip_benchmark" / f"{stem}.json", json.dumps(short_record) + "\n")
    with open(target / "eval.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    write_records(records, str(target / "results.json"))
    write_text(target / "results.md", markdown_table(HEADER, figure_rows(records)))
    write_report(results_report(outcomes), target / "report.html")


def sample_name(record: dict[str, Any]) -> str:
    """File name of a record's per-sample values."""
    return re.sub(r"[^\w.-]+", "_", f"{record['dataset']}-{record['task']}")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that ends in a newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
