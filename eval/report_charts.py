"""Line charts as inline SVG, for the HTML report.

The charts carry no colours of their own: every shape has a class (`c0` ... `c5`), and the page's
style sheet gives it a colour that suits a light or a dark page. Series differ by marker shape too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from eval.report_data import Curve, Point

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 442, 30, 244
_MAX_POINTS = 400  # more than the plot has pixels to show
_ALL_MARKED = 24  # a series of at most this many points gets a marker on each of them
_COLOURS = 6
# Filled outlines around (0, 0). Five shapes and six colours repeat together only after 30 series.
_MARKERS = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0-6.8 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4.2L4 3H-4z",
    "M0 -4.4L4.4 0L0 4.4L-4.4 0z",
    "M0 4.2L4 -3H-4z",
)


def smooth(points: Sequence[Point], half_life: float) -> list[Point]:
    """Smooth a noisy series with a bias-corrected exponential moving average.

    Weights decay with the distance in x, not with the number of points, so uneven logging does not
    change the curve. The correction divides by the sum of the weights seen so far, as Adam does:
    the first value is itself, not pulled towards zero.

    Args:
        points: `(x, y)` pairs, in any order. A `y` that is not finite is passed through as it is
            and does not enter the average.
        half_life: Distance in x after which a value counts half.

    Returns:
        One smoothed point for each given one, sorted by x.

    Raises:
        ValueError: If `half_life` is not positive.
    """
    if not half_life > 0:
        raise ValueError(f"half_life is {half_life}; give a distance in x greater than 0")
    smoothed: list[Point] = []
    total = weight = 0.0
    last_x = -math.inf
    for x, y in sorted(points, key=lambda point: point[0]):
        if math.isfinite(y):
            decay = 0.5 ** ((x - last_x) / half_life)
            total, weight, last_x = total * decay + y, weight * decay + 1.0, x
            y = total / weight
        smoothed.append((x, y))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round axis positions (steps of 1, 2, 2.5 or 5 times a power of ten) that enclose a range.

    The first tick is at or below `low`, the last at or above `high`. A range without extent is
    widened.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    # The tolerance keeps 0.30000000000000004 from opening another step.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [index * step for index in range(first, last + 1)]


def tick_labels(positions: Sequence[float]) -> list[str]:
    """Short labels for evenly spaced ticks: one unit and one precision for a whole axis."""
    top = max(abs(position) for position in positions)
    if top < 1e-3:
        split = [f"{position:.2e}".split("e") for position in positions]
        labels = [f"{float(m):g}e{int(e)}" if float(m) else "0" for m, e in split]
    else:
        scale, unit = next(
            (item for item in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= 10 * item[0]),
            (1.0, ""),
        )
        step = (positions[1] - positions[0]) / scale
        digits = next((d for d in range(6) if abs(step - round(step, d)) < 1e-6 * step), 6)
        labels = [f"{p / scale:.{digits}f}{unit}" if p else "0" for p in positions]
    return [
        label.replace("-", "\N{MINUS SIGN}", 1) if label[0] == "-" else label for label in labels
    ]


def value_text(value: float) -> str:
    """A value to be read beside a name: four significant digits, thousands grouped."""
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}", 1) if text[0] == "-" else text


def chart(curve: Curve) -> str:
    """Draw a curve as an HTML `<figure>`: caption, legend with the last values, SVG.

    Series without a finite point are listed in the legend as empty.
    """
    series = {name: _clean(points) for name, points in curve.series.items()}
    caption = f"<figcaption>{escape(curve.title)}</figcaption>"
    legend = "".join(
        f'<li><svg class="key c{index % _COLOURS}" viewBox="-13 -6 26 12" aria-hidden="true">'
        f'<path class="line" d="M-12 0H12"/><path class="dot" d="{_marker(index)}"/></svg>'
        f"{escape(name)} <b>{_last(points)}</b></li>"
        for index, (name, points) in enumerate(series.items())
    )
    drawing = _drawing(curve, series) if any(_finite(p) for p in series.values()) else ""
    return f'<figure class="chart">{caption}<ul class="legend">{legend}</ul>{drawing}</figure>'


def _drawing(curve: Curve, series: dict[str, list[Point]]) -> str:
    everything = [point for points in series.values() for point in _finite(points)]
    xs, ys = [x for x, _ in everything], [y for _, y in everything]
    # A range that comes close to zero anyway is shown from zero: heights then compare honestly.
    bottom = 0.0 if 0 < min(ys) < 0.35 * max(ys) else min(ys)
    y_ticks = ticks(bottom, max(ys))
    x_ticks = ticks(min(xs), max(xs), count=6)
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_ticks[0], x_ticks[-1]
    # A first step of 1 starts at 0: the axis needs its origin more than the plot needs the sliver.
    if x_low - x_ticks[0] < 0.02 * (x_high - x_low):
        x_low = x_ticks[0]

    def place(point: Point) -> Point:
        across = (point[0] - x_low) / (x_high - x_low)
        up = (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [_axes(curve, x_ticks, y_ticks, x_low, x_high)]
    for index, (name, points) in enumerate(series.items()):
        runs = [[place(point) for point in run] for run in _runs(points)]
        kind = "line noisy" if _is_noisy(runs) else "line"
        line = "".join(map(_path, runs))
        parts.append(f'<g class="c{index % _COLOURS}"><path class="{kind}" d="{line}"/>')
        for x, y in _marked(_finite(points), index, len(series)):
            px, py = place((x, y))
            parts.append(
                f'<path class="dot" transform="translate({px:.1f} {py:.1f})" d="{_marker(index)}">'
                f"<title>{escape(name)}, {escape(curve.x_label)} {value_text(x)}: "
                f"{value_text(y)}</title></path>"
            )
        parts.append("</g>")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(_in_words(curve, series))}">{"".join(parts)}</svg>'
    )


def _axes(
    curve: Curve, x_ticks: list[float], y_ticks: list[float], x_low: float, x_high: float
) -> str:
    parts = [f'<text class="name" x="2" y="14">{escape(curve.y_label)}</text>']
    for index, label in enumerate(tick_labels(y_ticks)):
        y = _BOTTOM - index / (len(y_ticks) - 1) * (_BOTTOM - _TOP)
        parts.append(
            f'<path class="{"grid" if index else "axis"}" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    slack = 1e-6 * (x_high - x_low)
    for position, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if not x_low - slack <= position <= x_high + slack:
            continue
        x = _LEFT + (position - x_low) / (x_high - x_low) * (_RIGHT - _LEFT)
        parts.append(
            f'<path class="axis" d="M{x:.1f} {_BOTTOM}v4"/>'
            f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{label}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(curve.x_label)}</text>"
    )
    return "".join(parts)


def _clean(points: Sequence[Point]) -> list[Point]:
    """Sort by x; a point whose x is not finite has no place."""
    return sorted((p for p in points if math.isfinite(p[0])), key=lambda point: point[0])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """Cut at values that are not finite, and thin what is left to what a plot can show."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    share = _MAX_POINTS / max(1, len(points))
    return [_thin(run, max(2, round(share * len(run)))) for run in runs if run]


def _thin(points: list[Point], limit: int) -> list[Point]:
    """Keep the lowest and highest point of each stretch, so that no spike is lost, and the ends."""
    if len(points) <= limit:
        return points
    stretches = max(1, limit // 2)
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        begin = stretch * len(points) // stretches
        inside = range(begin, (stretch + 1) * len(points) // stretches)
        kept.add(min(inside, key=lambda index: points[index][1]))
        kept.add(max(inside, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def _is_noisy(runs: list[list[Point]]) -> bool:
    """Whether a drawn line goes up and down over many times the height of the plot."""
    travel = sum(abs(b[1] - a[1]) for run in runs for a, b in pairwise(run))
    return travel > 6 * (_BOTTOM - _TOP)


def _path(places: Sequence[Point]) -> str:
    # A lone point becomes a line of no length, which round caps show as a dot.
    first, *rest = [f"{x:.1f} {y:.1f}" for x, y in places]
    return f"M{first}" + ("".join(f"L{place}" for place in rest) or "h0")


def _marked(points: list[Point], index: int, series: int) -> list[Point]:
    """The points that get a marker: all of a short series, some of a long one, always the last."""
    if len(points) <= _ALL_MARKED:
        return points
    stride = len(points) // 7
    some = points[stride * (index + 1) // (series + 1) :: stride] if series > 1 else []
    return [*some[:-1], points[-1]]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _last(points: Sequence[Point]) -> str:
    finite = _finite(points)
    return value_text(finite[-1][1]) if finite else "no values"


def _in_words(curve: Curve, series: dict[str, list[Point]]) -> str:
    """What a reader who cannot see the chart gets: where each series starts and ends."""
    sentences = [f"{curve.title}: {curve.y_label} against {curve.x_label}."]
    for name, points in series.items():
        if finite := _finite(points):
            (x0, y0), (x1, y1) = finite[0], finite[-1]
            sentences.append(
                f"{name} goes from {value_text(y0)} at {value_text(x0)} "
                f"to {value_text(y1)} at {value_text(x1)}."
            )
    return " ".join(sentences)
