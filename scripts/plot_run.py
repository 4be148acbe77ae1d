"""Draw the curves of one run, or of several above one another.

python -m scripts.plot_run RUN [RUN ...] [--output FILE.png] [--only loss,grad_norm]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.cli import run

FIRST = ("loss", "grad_norm", "lr", "logit_scale", "batch_accuracy")  # then by name
LARGEST = 24  # panels
SKIPPED = ("step", "time", "samples")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="PNG; default: plots/curves.png of the first")
    parser.add_argument("--only", default="", help="comma-separated figures; default: all")
    options = parser.parse_args(argv)
    output = options.output or options.runs[0] / "plots" / "curves.png"
    run(lambda: draw_runs(options.runs, output, [name for name in options.only.split(",") if name]))


def draw_runs(runs: Sequence[Path], output: Path, only: Sequence[str] = ()) -> None:
    """Draw every figure of the runs into a panel of its own.

    Raises:
        ValueError: a run without rows, or a figure that no run has.
    """
    rows = {str(path): read_rows(path) for path in runs}
    names = {name for run_rows in rows.values() for row in run_rows for name in row}
    names -= set(SKIPPED)
    unknown = sorted(set(only) - names)
    if unknown:
        raise ValueError(f"--only: no figure {unknown}; there are {', '.join(sorted(names))}")
    order = {name: place for place, name in enumerate(FIRST)}
    curves = {name for name in names if any(has_curve(found, name) for found in rows.values())}
    chosen = sorted(curves or names, key=lambda name: (order.get(name, len(order)), name))
    panels = list(only) or chosen
    output.parent.mkdir(parents=True, exist_ok=True)
    _draw(rows, panels[:LARGEST], output)
    left = len(panels) - LARGEST
    print(f"{output}" + (f"; {left} more figures: choose with --only" if left > 0 else ""))


def has_curve(rows: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether there is more than a single point to draw."""
    return sum(isinstance(row.get(name), int | float) for row in rows) > 1


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics and evaluations, the latter's names as they are; torn lines are left out.

    Raises:
        ValueError: there is none.
    """
    found = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        path = run_dir / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # a run that is going on
    if not found:
        raise ValueError(f"'{run_dir}' has no rows in metrics.jsonl: is it a run directory?")
    return found


def _draw(rows: dict[str, list[dict[str, Any]]], panels: Sequence[str], output: Path) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, name in zip(axes, panels, strict=False):
        for number, (label, run_rows) in enumerate(rows.items()):
            points = [
                (row["step"], row[name])
                for row in run_rows
                if isinstance(row.get(name), int | float)
            ]
            marker = "o" if len(points) < 20 else ""
            axis.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=f"C{number}", marker=marker, markersize=3, linewidth=1.2, label=label,
            )  # fmt: skip
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
