"""Results as files: JSON lines, CLIP_benchmark's JSON, Markdown, one HTML page, every sample."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from eval.records import write_records, write_text
from eval.tables import short

if TYPE_CHECKING:
    from eval.measure import Outcome

THUMBNAIL = 96
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child,td:nth-child(2){text-align:left}
figure{display:inline-block;width:150px;margin:.4em;vertical-align:top;font-size:12px}
.matrix td,.matrix th{padding:.15em .3em;font-size:11px;border:0;text-align:center}
img{image-rendering:auto;border-radius:4px}"""


def figure_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Set, metric, value, interval and number of samples, of all figures."""
    rows = []
    for record in records:
        for name, value in record["metrics"].items():
            bounds = record["ci95"].get(name)
            interval = "-" if bounds is None else f"{short(bounds[0])} to {short(bounds[1])}"
            rows.append([record["dataset"], name, short(value), interval,
                         str(record["n_samples"])])  # fmt: skip
    return rows


def write_results(outcomes: list[Outcome], folder: str) -> None:
    """Append to eval.jsonl; write results.json, results.md, report.html and samples/*.npz."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    records = [outcome.record for outcome in outcomes]
    for outcome in outcomes:
        path = target / "samples" / f"{sample_name(outcome.record)}.npz"
        path.parent.mkdir(exist_ok=True)
        columns: dict[str, Any] = outcome.measured.samples
        np.savez_compressed(path, **columns)
    with open(target / "eval.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    write_records(records, str(target / "results.json"))
    header = ["set", "metric", "value", "95 % interval", "samples"]
    write_text(target / "results.md", markdown_table(header, figure_rows(records)))
    write_text(target / "report.html", render(outcomes))


def sample_name(record: dict[str, Any]) -> str:
    """File name of a record's per-sample values."""
    return re.sub(r"[^\w.-]+", "_", f"{record['dataset']}-{record['task']}")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that ends in a newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def render(outcomes: list[Outcome]) -> str:
    """One HTML page without outside files."""
    records = [outcome.record for outcome in outcomes]
    model = html.escape(records[0]["model"]) if records else ""
    parts = [f"<h1>Evaluation of {model}</h1>", _html_table(figure_rows(records))]
    for outcome in outcomes:
        details = outcome.measured.details
        parts.append(f"<h2>{html.escape(outcome.planned.name)}: {outcome.record['task']}</h2>")
        parts.append(f"<p>{outcome.record['n_samples']} samples, {outcome.record['precision']},"
                     f" set {outcome.record['shards_fingerprint']}, weights"
                     f" {outcome.record['weights_sha256'][:12]}</p>")  # fmt: skip
        if "confusion_matrix" in details:
            parts.append(_matrix(details["confusion_matrix"], outcome.planned.classnames))
        if "worst_classes" in details:
            rows = [[str(v) for v in entry.values()] for entry in details["worst_classes"]]
            parts.append("<h3>Worst classes</h3>" + _html_table(rows, None))
        if "examples" in details:
            parts.append(_examples(outcome))
    body = "\n".join(parts)
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>{model}</title>"
            f"<style>{STYLE}</style><body>{body}</body></html>\n")  # fmt: skip


def _html_table(rows: list[list[str]], header: tuple[str, ...] | None = (
    "set", "metric", "value", "95 % interval", "samples")) -> str:  # fmt: skip
    head = "<tr>" + "".join(f"<th>{h}</th>" for h in header) + "</tr>" if header else ""
    lines = ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f"<table>{head}{''.join(lines)}</table>"


def _matrix(counts: list[list[int]], names: list[str]) -> str:
    """Rows are true classes, columns predictions; the darker, the larger the share of the row."""
    if len(names) > 30:
        return ""
    lines = []
    for name, row in zip(names, counts, strict=True):
        total = max(sum(row), 1)
        cells = "".join(f'<td style="background:rgba(40,90,200,{n / total:.2f})">{n or ""}</td>'
                        for n in row)  # fmt: skip
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f"<h3>Confusion matrix</h3><table class=matrix>{''.join(lines)}</table>"


def _examples(outcome: Outcome) -> str:
    found = outcome.found
    owners, parts = found.owners.tolist(), []
    captions: dict[int, str] = {}
    for owner, caption in zip(owners, found.captions, strict=True):
        captions.setdefault(owner, caption)
    titles = {"text": "image to text", "image": "text to image"}
    for side, chosen in outcome.measured.details["examples"].items():
        ranks = outcome.measured.samples[f"{side}_retrieval_mean_rank"]
        for kind, queries in chosen.items():
            parts.append(f"<h3>{titles[side]}, {kind}</h3>")
            for query in queries:
                row = query if side == "text" else owners[query]
                words = captions.get(row, "") if side == "text" else found.captions[query]
                parts.append(
                    f"<figure>{_picture(outcome, row)}<figcaption>rank {int(ranks[query])}:"
                    f" {html.escape(words)}</figcaption></figure>"
                )
    return "".join(parts)


def _picture(outcome: Outcome, row: int) -> str:
    samples, number = outcome.planned.test, outcome.found.numbers[row]
    before = samples.transform
    samples.transform = _untouched
    try:
        pixels = samples[number]["image"]
    finally:
        samples.transform = before
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'


def _untouched(image: Any) -> Any:
    return image
