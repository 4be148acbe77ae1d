from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import resource
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.report import (
    Curve,
    ImageQuery,
    Picture,
    Report,
    Table,
    TextQuery,
    read_jsonl,
    smooth,
    write_report,
)
from eval.report_charts import chart, tick_labels, ticks

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Checks that tags balance, and keeps tags with their attributes, and text outside tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [a for name, a in self.tags if name == tag and (not kind or a.get("class") == kind)]


def painted(red: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    """A picture in one colour, wider than high."""
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[..., 1] = red, 90
    return image


def png(width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def report() -> Report:
    return Report(
        title="A title",
        summary=["the lead", "a point"],
        tables=[Table("Accuracy", ["model", "top-1", "remark"], [["ours", "71.3 %", "best"]])],
        curves=[Curve("Loss", "step", "nats", {"train": [(1, 3.0), (2, 2.0)], "val": [(2, 2.5)]})],
        text_queries=[
            TextQuery("red apple", [painted(10), painted(250)], [0.4, 0.3], [True, False]),
            TextQuery("blue whale", [painted(90), painted(180)], [0.2, 0.1], [False, False]),
        ],
        image_queries=[
            ImageQuery(painted(60), ["a fox", "an owl"], [0.5, 0.25], [False, True]),
        ],
        pictures=[Picture("Slot map", png(), "which patches a slot reads")],
        facts={"seed": "17"},
    )


def read(report: Report, folder: Path) -> str:
    path = folder / "made" / "report.html"
    write_report(report, path)
    return path.read_text("utf-8")


def picture_of(uri: str, kind: str) -> bytes:
    head, _, body = uri.partition(",")
    assert head == f"data:image/{kind};base64"
    return base64.b64decode(body, validate=True)


def test_page_is_balanced_and_asks_the_network_for_nothing(report: Report, tmp_path: Path) -> None:
    source = read(report, tmp_path)
    page = Page(source)
    assert not re.search(r"https?:|url\(|@import|<script", source)
    references = [a[k] for _, a in page.tags for k in ("src", "href", "srcset") if k in a]
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {a["href"][1:] for a in page.all("a")} <= set(identifiers)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy


def test_page_shows_every_part(report: Report, tmp_path: Path) -> None:
    page = Page(read(report, tmp_path))
    for text in ("A title", "the lead", "a point", "Accuracy", "71.3 %", "Loss", "red apple"):
        assert text in page.text
    for text in ("blue whale", "a fox", "an owl", "0.500", "Slot map", "seed", "17", "nats"):
        assert text in page.text
    assert len(page.all("img")) == 2 + 2 + 1 + 1
    assert all(image["alt"].strip() for image in page.all("img"))
    assert [a["scope"] for a in page.all("th")] == ["col"] * 3 + ["row"]
    assert len(page.all("td", "num")) == 1  # the percentage, not the remark


def test_empty_parts_leave_no_trace(report: Report, tmp_path: Path) -> None:
    only_facts = dataclasses.replace(
        report, summary=[], tables=[], curves=[], text_queries=[], image_queries=[], pictures=[]
    )
    page = Page(read(only_facts, tmp_path))
    assert [a["id"] for a in page.all("section")] == ["facts"]
    assert not page.all("nav")


def test_every_text_is_escaped(tmp_path: Path) -> None:
    made: list[str] = []

    def hostile() -> str:
        made.append(f"""{len(made)}"'><script>alert(1)</script>&amp;</title></style>""")
        return made[-1]

    report = Report(
        title=hostile(),
        summary=[hostile(), hostile()],
        tables=[Table(hostile(), [hostile(), hostile()], [[hostile(), hostile()]], hostile())],
        curves=[Curve(hostile(), hostile(), hostile(), {hostile(): [(0, 1)]})],
        text_queries=[TextQuery(hostile(), [painted(1)], [0.1], [True])],
        image_queries=[ImageQuery(painted(1), [hostile()], [0.1], [True])],
        pictures=[Picture(hostile(), png(), hostile(), hostile())],
        facts={hostile(): hostile()},
    )
    page = Page(read(report, tmp_path))
    assert not page.all("script")
    alts = [image["alt"] for image in page.all("img")]
    for text in made:
        assert text in page.text or text in alts


def test_right_answers_are_marked_by_class_and_symbol(report: Report, tmp_path: Path) -> None:
    source = read(report, tmp_path)
    page = Page(source)
    assert len(page.all("li", "good")) == 2
    assert len(page.all("span", "mark")) == 2
    verdicts = re.findall(r'class="verdict[^"]*">([^<]*)<', source)
    assert verdicts == ["✓ first", "✗ not in the top 2", "✓ rank 2"]
    alts = [image["alt"] for image in page.all("img")]
    assert alts[:2] == [
        "Picture ranked 1 for red apple: right",
        "Picture ranked 2 for red apple: wrong",
    ]
    assert alts[4] == "Query picture: an owl"


def test_pictures_arrive_whole_in_order_and_not_larger_than_needed(
    report: Report, tmp_path: Path
) -> None:
    photo = TextQuery("photo", [painted(200, (900, 1200))], [0.1], [True])
    report = dataclasses.replace(report, text_queries=[*report.text_queries, photo])
    sources = [image["src"] for image in Page(read(report, tmp_path)).all("img")]
    thumbnails = [Image.open(io.BytesIO(picture_of(uri, "webp"))) for uri in sources[:6]]
    assert [t.size for t in thumbnails] == [(30, 20)] * 4 + [(192, 144), (30, 20)]
    reds = [float(np.asarray(t.convert("RGB"))[..., 0].mean()) for t in thumbnails]
    assert reds == pytest.approx([10, 250, 90, 180, 200, 60], abs=4)
    assert picture_of(sources[6], "png") == report.pictures[0].png


def test_bars_start_at_zero(report: Report, tmp_path: Path) -> None:
    query = ImageQuery(painted(1), ["a", "b", "c"], [0.5, 0.25, -0.1], [True, False, False])
    bad = ImageQuery(painted(1), ["a"], [-0.3], [False])
    source = read(dataclasses.replace(report, image_queries=[query, bad]), tmp_path)
    assert re.findall(r"--part:([\d.]+)", source) == ["1.000", "0.500", "0.000", "0.000"]


def test_half_a_surrogate_pair_does_not_stop_the_report(report: Report, tmp_path: Path) -> None:
    report = dataclasses.replace(report, title="torn \ud83d caption")
    assert "torn ? caption" in Page(read(report, tmp_path)).text


def test_failed_write_keeps_the_old_page(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a disk that is full after 1000 bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(report, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(report, path)
    assert path.read_text("utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b'{"text": "caf\xc3', b"\0\0\0\n", b"3"])
def test_read_jsonl_skips_a_torn_last_line(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": NaN}\n\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_read_jsonl_names_a_broken_line_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 .*remove"):
        read_jsonl(path)


def test_smooth_weights_by_distance_and_skips_what_is_not_finite() -> None:
    points = [(0.0, 4.0), (10.0, 1.0), (15.0, math.nan), (40.0, 7.0), (20.0, -2.0)]
    result = smooth(points, 10.0)
    assert [x for x, _ in result] == [0.0, 10.0, 15.0, 20.0, 40.0]
    assert math.isnan(result[2][1])
    finite = sorted(point for point in points if math.isfinite(point[1]))
    for x, y in (point for point in result if math.isfinite(point[1])):
        past = [(0.5 ** ((x - px) / 10.0), py) for px, py in finite if px <= x]
        mean = sum(w * py for w, py in past) / sum(w for w, _ in past)
        assert y == pytest.approx(mean, rel=1e-12)
    assert smooth([(3.0, 5.0)], 1e6) == [(3.0, 5.0)]
    with pytest.raises(ValueError, match="greater than 0"):
        smooth(points, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 0.78, ["0", "0.2", "0.4", "0.6", "0.8"]),
        (0, 3000, ["0", "1000", "2000", "3000"]),
        (0, 12_300, ["0", "2.5k", "5.0k", "7.5k", "10.0k", "12.5k"]),
        (-1.1, 1.9, ["\N{MINUS SIGN}2", "\N{MINUS SIGN}1", "0", "1", "2"]),
        (0, 4.5e-5, ["0", "1e-5", "2e-5", "3e-5", "4e-5", "5e-5"]),
        (2, 2, ["1.8", "1.9", "2.0", "2.1", "2.2"]),
    ],
)
def test_ticks_are_round_and_enclose_the_range(low: float, high: float, labels: list[str]) -> None:
    positions = ticks(low, high)
    assert positions[0] <= low <= high <= positions[-1]
    assert tick_labels(positions) == labels


def lines(svg: str) -> list[str]:
    return re.findall(r'<g class="c\d"><path class="line[^"]*" d="([^"]*)"', svg)


def test_chart_breaks_at_gaps_and_keeps_spikes() -> None:
    wave = [(float(x), math.sin(x / 900)) for x in range(20_000)]
    wave[7_777] = (7_777.0, 100.0)
    gap = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 3.0), (5.0, 1.0)]
    first, second = lines(chart(Curve("t", "x", "y", {"wave": wave, "gap": gap})))
    assert first.count("L") < 500
    assert first.count("M") == 1
    # 100 is the top tick of the axis, so the spike must reach the upper edge of the plot.
    assert min(float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", first)) == 30.0
    assert second.count("M") == 2


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0.0, math.nan)],
        [(5.0, 2.0)],
        [(0.0, 3.0), (9.0, 3.0)],
        [(0.0, 0.0), (0.0, 0.0)],
        [(math.nan, 1.0), (1.0, 1e-300), (2.0, -1e12)],
    ],
)
def test_chart_survives_degenerate_series(points: list[tuple[float, float]]) -> None:
    figure = chart(Curve("t", "x", "y", {"s": points}))
    Page(figure)
    coordinates = " ".join(lines(figure))
    assert "nan" not in coordinates
    assert "inf" not in coordinates
    assert ("no values" in figure) == (coordinates == "")


def test_series_differ_without_colour_and_are_told_in_words() -> None:
    series = {name: [(1.0, 5.0), (2.0, 4.0 - index)] for index, name in enumerate("abcde")}
    figure = chart(Curve("Loss", "step", "nats", series))
    page = Page(figure)
    shapes = [a["d"] for a in page.all("path", "dot") if "transform" not in a]
    assert len(set(shapes)) == len(series)
    (drawing,) = [a for a in page.all("svg") if a.get("role") == "img"]
    assert "Loss: nats against step. a goes from 5 at 1 to 4 at 2." in drawing["aria-label"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table("t", ["a", "b"], [["1"]]), "1 cells for 2 columns"),
        (lambda: TextQuery("q", [], [], []), "at least one answer"),
        (lambda: TextQuery("q", [painted(1)], [0.1, 0.2], [True]), "one of each per answer"),
        (lambda: TextQuery("q", [painted(1) / 255], [0.1], [True]), "give uint8"),
        (lambda: ImageQuery(painted(1)[..., 0], ["a"], [0.1], [True]), r"\(H, W, 3\)"),
        (lambda: Picture("p", b"GIF89a" + bytes(30), "alt"), "save it as PNG"),
        (lambda: Picture("p", png(), " "), "say what it shows"),
    ],
)
def test_wrong_data_is_refused_with_a_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
