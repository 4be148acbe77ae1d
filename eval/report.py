"""One self-contained HTML page that shows what a run did: figures, examples, curves, pictures.

The page asks the network for nothing and runs no script; a content security policy in it holds
the browser to that. It can be mailed, archived, or opened from a file system years later.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.report_charts import chart, smooth
from eval.report_data import Curve, ImageQuery, Matrix, Picture, Report, Table, TextQuery
from eval.report_style import CSS

__all__ = [
    "Curve",
    "ImageQuery",
    "Matrix",
    "Picture",
    "Report",
    "Table",
    "TextQuery",
    "read_jsonl",
    "smooth",
    "write_report",
]

_THUMBNAIL = 192  # pixels: twice the largest size shown, for dense screens
# A short cell that starts with a number, or stands for a missing one.
_NUMBER = re.compile(r"[-+±~≈<>≤≥\u2212]?\s?[.\d].{0,17}|[-\u2013\u2014]|n/a|")


def write_report(report: Report, path: Path) -> None:
    """Write the page in one step: at `path` there is the old page or the whole new one.

    Args:
        report: What to show. Empty parts leave no trace on the page.
        path: The HTML file; its folder is made if needed.
    """
    # Captions may hold half of a surrogate pair, which no file can.
    page = _page(report).encode("utf-8", errors="replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line, as a run writes its metrics.

    A last line that does not parse is what a killed run leaves behind, and is skipped.

    Raises:
        ValueError: If an earlier line is not a JSON object.
    """
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    records: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number != lines[-1][0]:
            raise ValueError(f"{path}:{number} is not a JSON object; repair or remove that line")
    return records


def _page(report: Report) -> str:
    by_caption = _examples(
        [_text_query(query) for query in report.text_queries],
        [query.correct for query in report.text_queries],
    )
    by_picture = _examples(
        [_image_query(query) for query in report.image_queries],
        [query.correct for query in report.image_queries],
    )
    curves = _pair(map(chart, report.curves))
    if curves:
        curves = f'<p class="note">Beside each name is its last value.</p>{curves}'
    parts: list[tuple[str, str, str]] = [
        ("results", "Results", _columns(map(_table, report.tables))),
        ("confusion", "What is taken for what", _columns(map(_matrix, report.matrices))),
        ("text-to-image", "Pictures found by caption", by_caption),
        ("image-to-text", "Captions found by picture", by_picture),
        ("curves", "Curves", curves),
        ("pictures", "A look inside", _pair(map(_picture, report.pictures))),
        ("facts", "How it was made", _facts(report.facts)),
    ]
    shown = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in shown)
    sections = "\n".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{name}</h2>{body}</section>'
        for anchor, name, body in shown
    )
    lead = "".join(f'<p class="lead">{escape(text)}</p>' for text in report.summary[:1])
    points = "".join(f"<li>{escape(text)}</li>" for text in report.summary[1:])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(report.title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
{lead}{f'<ul class="points">{points}</ul>' if points else ""}
{f'<nav aria-label="Sections">{links}</nav>' if len(shown) > 1 else ""}
</header>
<main>
{sections}
</main>
<footer>Written by softmoe-clip. This page is one file and loads nothing else.</footer>
</body>
</html>
"""


def _pair(figures: Iterable[str]) -> str:
    body = "".join(figures)
    return f'<div class="pair">{body}</div>' if body else ""


def _columns(blocks: Iterable[str]) -> str:
    """Tables beside each other where there is room; one alone has it all."""
    body = "".join(f"<div>{block}</div>" for block in blocks)
    return f'<div class="columns">{body}</div>' if body else ""


def _table(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True))
    numeric = [index > 0 and all(map(_NUMBER.fullmatch, c)) for index, c in enumerate(columns)]
    kinds = [' class="num"' if is_number else "" for is_number in numeric] or [""] * len(
        table.header
    )
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for kind, name in zip(kinds, table.header, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{k}>{escape(c)}</td>" for k, c in zip(kinds[1:], row[1:], strict=True))
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # A wide table scrolls in its own box, which the keyboard must be able to reach.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">'
        f"<table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _matrix(matrix: Matrix) -> str:
    """Rows are the true classes; a cell is the darker, the larger its share of the row."""
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in matrix.names)
    lines = []
    for row, (name, counts) in enumerate(zip(matrix.names, matrix.counts, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td class="{"hit" if row == column else "slip"}" style="--share:{n / total:.3f}">'
            f"{n or ''}</td>"
            for column, n in enumerate(counts)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    note = f'<p class="note">{escape(matrix.note)}</p>' if matrix.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(matrix.title)}">'
        f'<table class="matrix"><caption>{escape(matrix.title)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _examples(figures: list[str], correct: list[list[bool]]) -> str:
    if not figures:
        return ""
    first = sum(marks[0] for marks in correct)
    found = sum(any(marks) for marks in correct)
    return (
        f'<p class="note">A right answer comes first in {first} of these {len(figures)} examples '
        f"and is among those shown in {found}. Green and \N{CHECK MARK} mark right answers; the "
        f"numbers are similarities.</p>{_pair(figures)}"
    )


def _text_query(query: TextQuery) -> str:
    items = []
    answers = zip(query.images, query.scores, query.correct, strict=True)
    for rank, (image, score, right) in enumerate(answers, 1):
        alt = f"Picture ranked {rank} for {query.text}: {'right' if right else 'wrong'}"
        picture = f'<img src="{_thumbnail(image)}" alt="{escape(alt)}">'
        items.append(f"<li{_good(right)}>{picture}{_score(score, right)}</li>")
    return (
        f'<figure class="card">{_origin(query.note)}<figcaption class="ask">'
        f'<q dir="auto">{escape(query.text)}</q>{_verdict(query.correct, query.rank)}</figcaption>'
        f'<ol class="answers">{"".join(items)}</ol></figure>'
    )


def _image_query(query: ImageQuery) -> str:
    top = max(*query.scores, 1e-12)
    items = []
    for caption, score, right in zip(query.captions, query.scores, query.correct, strict=True):
        part = max(score, 0.0) / top
        items.append(
            f'<li{_good(right)} style="--part:{part:.3f}">'
            f'<span class="text" dir="auto">{escape(caption)}</span>{_score(score, right)}</li>'
        )
    answer = next(
        (c for c, right in zip(query.captions, query.correct, strict=True) if right), None
    )
    alt = f"Query picture: {answer}" if answer else "Query picture; no caption shown is right"
    return (
        f'<figure class="card show"><img class="shown" src="{_thumbnail(query.image)}" '
        f'alt="{escape(alt)}"><div>{_origin(query.note)}'
        f"<figcaption>{_verdict(query.correct, query.rank)}</figcaption>"
        f'<ol class="captions">{"".join(items)}</ol></div></figure>'
    )


def _picture(picture: Picture) -> str:
    width, height = struct.unpack(">II", picture.png[16:24])
    wide = " wide" if width > 1.7 * height else ""
    note = f"<small>{escape(picture.note)}</small>" if picture.note else ""
    return (
        f'<figure class="card picture{wide}"><figcaption>{escape(picture.title)}{note}</figcaption>'
        f'<img src="{_data_uri("png", picture.png)}" alt="{escape(picture.alt)}" '
        f'width="{width}" height="{height}"></figure>'
    )


def _facts(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>" if items else ""


def _good(right: bool) -> str:
    return ' class="good"' if right else ""


def _score(score: float, right: bool) -> str:
    mark = '<span class="mark">\N{CHECK MARK}</span> ' if right else ""
    text = f"{score:.3f}" if abs(score) < 10 else f"{score:.1f}"
    return f'<span class="score">{mark}{text}</span>'


def _origin(note: str) -> str:
    return f'<small class="origin">{escape(note)}</small>' if note else ""


def _verdict(correct: list[bool], known: int | None) -> str:
    """Say in words and a symbol how far down the first right answer is."""
    if True not in correct and known is not None:
        return f'<span class="verdict">\N{BALLOT X} rank {known:,}</span>'
    if True not in correct:
        return f'<span class="verdict">\N{BALLOT X} not in the top {len(correct)}</span>'
    rank = correct.index(True) + 1
    place = "first" if rank == 1 else f"rank {rank}"
    return f'<span class="verdict good">\N{CHECK MARK} {place}</span>'


def _thumbnail(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90)
    return _data_uri("webp", file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
