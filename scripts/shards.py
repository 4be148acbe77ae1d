"""Pack, check, measure and look at webdataset shards.

python -m scripts.shards pack photos --out data/photos
python -m scripts.shards validate data/photos --report problems.json --clean data/photos_clean
python -m scripts.shards stats 'data/photos/{00000..00041}.tar' --out photos_stats
python -m scripts.shards show data/photos --output photos.png
python -m scripts.shards index data/photos

Each has its own --help. See docs/shards.md.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.tool_config import (
    IndexConfig,
    PackConfig,
    ShowConfig,
    StatsConfig,
    ValidateConfig,
)
from scripts.cli import EXIT_USAGE, fail, parse_config, run


@dataclass(frozen=True)
class Tool:
    """A subcommand: its settings, the setting that may stand first without a name, and what it
    does, giving the exit code."""

    config: type[Any]
    first: str
    act: Callable[[Any], int]


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__)
        raise SystemExit(0)
    if not words or words[0] not in TOOLS:
        fail(_unknown(words), EXIT_USAGE)
    tool, rest = TOOLS[words[0]], words[1:]
    if rest and not rest[0].startswith("-"):
        rest.insert(0, f"--{tool.first}")
    config = parse_config(tool.config, rest, tool.config.__doc__ or "")
    codes: list[int] = []
    try:
        run(lambda: codes.append(tool.act(config)))
        sys.stdout.flush()
    except BrokenPipeError:  # a pager or head that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    if codes != [0]:
        raise SystemExit(codes[0])


def _unknown(words: list[str]) -> str:
    choices = ", ".join(TOOLS)
    if not words:
        return f"no tool given: choose one of {choices}"
    near = difflib.get_close_matches(words[0], TOOLS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {choices}"
    return f"there is no tool '{words[0]}'; {hint}"


def _workers(wanted: int | None) -> int:
    """Processes beside this one; with one core there are none."""
    from training.machine import available_cores

    if wanted is None:
        return available_cores() if available_cores() > 1 else 0
    if wanted < 0:
        raise ValueError(f"workers must not be negative, got {wanted}")
    return wanted


def _pack(config: PackConfig) -> int:
    from data_pipelines.pack import check_config, pack
    from data_pipelines.shards import describe_skips

    check_config(config)
    summary = pack(config, _workers(config.workers))
    kept = f" ({summary.kept} were there already)" if summary.kept else ""
    print(f"{summary.samples} samples in {summary.shards} shards{kept}: {config.out}/*.tar")
    if summary.skipped:
        print(f"{describe_skips(summary.skipped)}; which ones: {config.out}/*_stats.json")
    return 0


def _validate(config: ValidateConfig) -> int:
    from data_pipelines.clean_copy import check_folder, write_clean_copy
    from data_pipelines.shard_survey import find_shards
    from data_pipelines.shard_writer import write_json
    from data_pipelines.shards import describe_skips
    from data_pipelines.validate import validate

    if config.report is not None and not Path(config.report).parent.is_dir():
        raise ValueError(
            f"report: there is no folder '{Path(config.report).parent}': make it first"
        )
    if config.clean is not None:  # said now, not after hours
        check_folder(Path(config.clean), find_shards(config.shards))
    found = validate(config, _workers(config.workers))
    if config.report is not None:
        write_json(Path(config.report), found.as_json())
    print("\n".join(found.lines()))
    if config.clean is not None:
        copy = write_clean_copy(found, Path(config.clean))
        print(
            f"{copy.samples} samples without problems in {copy.shards} shards: {config.clean}/*.tar"
        )
        if copy.unread:
            print(f"not copied: {describe_skips(copy.unread)}")
    return 1 if found.findings else 0


def _stats(config: StatsConfig) -> int:
    from data_pipelines.classification import read_lines
    from data_pipelines.shard_stats import measure

    names = None if config.classnames is None else read_lines(config.classnames)
    stats = measure(config, _workers(config.workers))
    figures = stats.as_json(config.top, names)
    if config.out is not None:
        from data_pipelines.shard_plots import render_stats
        from data_pipelines.shard_writer import write_atomic, write_json

        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "stats.json", figures)
        write_atomic(out / "stats.png", render_stats(stats, config.top, names))
    _print_stats(figures)
    if config.out is not None:
        print(f"written: {config.out}/stats.json, {config.out}/stats.png")
    return 0


def _print_stats(figures: dict[str, Any]) -> None:
    from data_pipelines.shard_survey import printable
    from eval.tables import text_table

    recorded = " by their _stats.json" if figures["counts_from"] == "_stats.json" else ""
    print(f"{figures['samples']} samples in {figures['shards']} shards{recorded}")
    if figures["looked_at"] < figures["samples"]:
        print(f"looked at {figures['looked_at']} of them")
    for name in ("truncated_shards", "unreadable"):
        if figures[name]:
            print(f"{name.replace('_', ' ')}: {figures[name]} (see the validate tool)")
    print("formats: " + ", ".join(f"{name} {count}" for name, count in figures["formats"].items()))
    print()
    rows = figures["distributions"]
    header = ["", *next(iter(rows.values()))]
    cells = [[name, *(_figure(value) for value in row.values())] for name, row in rows.items()]
    print(text_table(header, cells))
    print()
    if figures["captions_over_context"] is not None:
        print(
            f"{figures['captions_over_context']} captions have more than"
            f" {figures['context_length']} tokens of {figures['tokenizer']}, start and end included"
        )
    for kind in ("words", "tokens", "labels"):
        if figures[f"top_{kind}"]:
            entries = (f"{printable(str(name), 40)} {n}" for name, n in figures[f"top_{kind}"])
            total = figures.get(f"different_{kind}")
            print(f"top {kind}" + (f" of {total}: " if total else ": ") + ", ".join(entries))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _show(config: ShowConfig) -> int:
    from data_pipelines.contact_sheet import draw_contact_sheet
    from data_pipelines.shard_writer import write_atomic

    sheet, count = draw_contact_sheet(config)
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_atomic(Path(config.output), picture.getvalue())
    print(f"{count} samples: {config.output}")
    return 0


def _index(config: IndexConfig) -> int:
    from data_pipelines.build_indexes import build_indexes

    index, folders = build_indexes(config)
    print(f"{len(index)} samples in {len(index.paths)} shards, fingerprint {index.fingerprint()}")
    for extension, places in index.members.items():
        print(f"{int((places[:, 0] >= 0).sum()):10} {extension}")
    for path in index.truncated:
        print(f"warning: '{path}' ends early; its complete samples are used")
    for folder, count in folders.items():
        print(f"{count} indexes in {folder}")
    if folders.total() < len(index.paths):
        print("warning: some indexes could not be kept; set --index_folder to a folder for them")
    return 0


TOOLS = {
    "pack": Tool(PackConfig, "source", _pack),
    "validate": Tool(ValidateConfig, "shards", _validate),
    "stats": Tool(StatsConfig, "shards", _stats),
    "show": Tool(ShowConfig, "shards", _show),
    "index": Tool(IndexConfig, "shards", _index),
}

if __name__ == "__main__":
    main()
