"""The figure of `data_pipelines.shard_stats`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from data_pipelines.shard_stats import ShardStats, label_name, top_of
from data_pipelines.shard_survey import printable

COLOUR, MARK = "#3b6ea5", "#c2452d"
COLUMNS = 3
Panel = Callable[[Axes], None]


def render_stats(stats: ShardStats, top: int, names: Sequence[str] | None = None) -> bytes:
    """The figure of `draw_stats` as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        draw_stats(stats, top, names).savefig(buffer, format="png")
    return buffer.getvalue()


def draw_stats(stats: ShardStats, top: int, names: Sequence[str] | None = None) -> Figure:
    """Histograms and lists of what there is; panels without figures are left out.

    Args:
        stats: what was measured.
        top: how many words, tokens and labels are listed.
        names: class names by label.
    """
    panels = _panels(stats, top, names)
    rows = -(-len(panels) // COLUMNS)
    tall = max(3.2, 0.6 + 0.16 * top)
    figure = Figure(figsize=(4.4 * COLUMNS, tall * rows), dpi=110, layout="constrained")
    figure.suptitle(f"{stats.samples:,} samples in {stats.shards:,} shards")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, COLUMNS, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
    return figure


def _panels(stats: ShardStats, top: int, names: Sequence[str] | None) -> list[Panel]:
    found, tally = stats.distributions(), stats.tally
    panels: list[Panel] = []
    if "width" in found:
        panels.append(lambda axes: _sizes(axes, found["width"], found["height"]))
        ratio = "width / height"
        panels.append(lambda axes: _histogram(axes, found[ratio], ratio, log=True))
        name = "bytes per picture"
        panels.append(lambda axes: _histogram(axes, found[name], name, log=True))
    if "words per caption" in found:
        words = "words per caption"
        panels.append(lambda axes: _histogram(axes, found[words], words))
        panels.append(lambda axes: _bars(axes, top_of(tally.word_counts, top), "top words"))
    if "tokens per caption" in found:
        panels.append(lambda axes: _tokens(axes, found["tokens per caption"], stats))
        panels.append(lambda axes: _bars(axes, top_of(tally.token_counts, top), "top tokens"))
    if tally.labels:
        labels = [[label_name(k, names), n] for k, n in top_of(tally.labels, top)]
        panels.append(lambda axes: _bars(axes, labels, "top labels"))
        panels.append(lambda axes: _label_curve(axes, np.array(list(tally.labels.values()))))
    return panels


def _sizes(axes: Axes, widths: np.ndarray, heights: np.ndarray) -> None:
    """How many pictures have each size; one dot for each, the larger the more."""
    sizes, counts = np.unique(np.stack([widths, heights]), axis=1, return_counts=True)
    # The area grows slowly with the count, or one common size would cover all others.
    area = 6 + 90 * np.sqrt(counts / counts.max())
    axes.scatter(*sizes, s=area, color=COLOUR, alpha=0.5, linewidth=0)
    for scale, values in ((axes.set_xscale, widths), (axes.set_yscale, heights)):
        if values.max() > 8 * values.min():
            scale("log")
            _plain_ticks(axes.xaxis if scale == axes.set_xscale else axes.yaxis)
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    different = sizes.shape[1]
    what = f"{different:,} size{'s' if different > 1 else ''} of {len(widths):,} pictures"
    axes.set_title(what, fontsize=10)


def _histogram(axes: Axes, values: np.ndarray, name: str, log: bool = False) -> None:
    spans = log and values.min() > 0 and values.max() > 4 * values.min()
    if spans:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        bins: list[float] | int = np.geomspace(values.min(), values.max(), 41).tolist()
    elif np.issubdtype(values.dtype, np.integer):
        # Whole numbers per bar, or some bars would hold more of them than others.
        step = max(1, -(-int(values.max() - values.min() + 1) // 40))
        bins = (np.arange(values.min(), values.max() + step + 1, step) - 0.5).tolist()
    else:
        bins = 41
    axes.hist(values, bins=bins, color=COLOUR)
    axes.axvline(float(np.median(values)), color=MARK, linewidth=1)
    axes.set_title(f"{name} (median {np.median(values):.4g})", fontsize=10)
    axes.set_ylabel("count")
    if spans and "bytes" in name:
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))


def _plain_ticks(axis: Axis) -> None:
    """Numbers such as 200 and 0.5 on a logarithmic axis, and not so many that they overlap."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _tokens(axes: Axes, values: np.ndarray, stats: ShardStats) -> None:
    _histogram(axes, values, f"{stats.tokenizer} tokens per caption")
    share = 100 * stats.over_context / len(values)
    if values.max() > stats.context_length:
        axes.axvline(stats.context_length + 0.5, color="black", linewidth=1, linestyle=":")
    axes.set_xlabel(f"{share:.2g} % have more than {stats.context_length}")


def _bars(axes: Axes, entries: Sequence[Sequence[object]], name: str) -> None:
    labels = [printable(str(entry[0]), 28).replace("$", r"\$") for entry in entries]
    axes.barh(range(len(entries)), [float(str(entry[1])) for entry in entries], color=COLOUR)
    axes.set_yticks(range(len(entries)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(name, fontsize=10)


def _label_curve(axes: Axes, counts: np.ndarray) -> None:
    axes.plot(np.arange(1, len(counts) + 1), np.sort(counts)[::-1], color=COLOUR, drawstyle="steps")
    axes.set_ylim(0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"samples of {len(counts):,} labels, most frequent first", fontsize=10)
