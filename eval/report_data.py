"""What the HTML report shows, as plain data without markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Point = tuple[float, float]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Curve:
    """A line chart: one or more named series over the same axes.

    Points may come in any order; a value that is not finite leaves a gap.
    """

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[Point]]


@dataclass(frozen=True)
class Table:
    """A table. The first column names the rows; columns of numbers are set flush right.

    Raises:
        ValueError: If a row and the header differ in length.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(
                    f"table {self.title!r}: row {row} has {len(row)} cells for "
                    f"{len(self.header)} columns; fill missing cells with an empty string"
                )


@dataclass(frozen=True)
class TextQuery:
    """A caption and the pictures found for it.

    Attributes:
        text: The caption.
        images: uint8 (H, W, 3) each, best first.
        scores: The similarity of each picture to the caption.
        correct: Whether each picture is a right answer.
        note: A few words on where the query comes from.
        rank: The place of the first right answer, from 1, where it is known.

    Raises:
        ValueError: If there is no answer, or lengths, shapes or dtypes are not as stated.
    """

    text: str
    images: list[np.ndarray]
    scores: list[float]
    correct: list[bool]
    note: str = ""
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_answers(f"text query {self.text!r}", self.images, self.scores, self.correct)
        for image in self.images:
            _check_image(image)


@dataclass(frozen=True)
class ImageQuery:
    """A picture and the captions found for it.

    Attributes:
        image: uint8 (H, W, 3).
        captions: The captions, best first.
        scores: The similarity of each caption to the picture.
        correct: Whether each caption is a right answer.
        note: A few words on where the query comes from.
        rank: The place of the first right answer, from 1, where it is known.

    Raises:
        ValueError: If there is no answer, or lengths, shapes or dtypes are not as stated.
    """

    image: np.ndarray
    captions: list[str]
    scores: list[float]
    correct: list[bool]
    note: str = ""
    rank: int | None = None

    def __post_init__(self) -> None:
        _check_answers("image query", self.captions, self.scores, self.correct)
        _check_image(self.image)


@dataclass(frozen=True)
class Picture:
    """A ready-made PNG, such as a slot map, with the words for readers who cannot see it.

    Raises:
        ValueError: If the bytes are not a PNG file, or `alt` is empty.
    """

    title: str
    png: bytes
    alt: str
    note: str = ""

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG_SIGNATURE) or len(self.png) < 24:
            raise ValueError(f"picture {self.title!r} is not a PNG file; save it as PNG first")
        if not self.alt.strip():
            raise ValueError(f"picture {self.title!r} has no alt text; say what it shows")


@dataclass(frozen=True)
class Matrix:
    """Counts of pairs, such as a confusion matrix: C rows and C columns of the same names.

    Raises:
        ValueError: If it is not square or not as large as there are names.
    """

    title: str
    names: list[str]
    counts: list[list[int]]
    note: str = ""

    def __post_init__(self) -> None:
        if {len(self.counts), *map(len, self.counts)} != {len(self.names)}:
            raise ValueError(f"matrix {self.title!r} needs {len(self.names)} rows and columns")


@dataclass(frozen=True)
class Report:
    """Everything on the page, in no markup: every text is escaped when the page is written.

    Attributes:
        title: The heading.
        summary: What to take away; the first entry is the lead.
        tables: Result tables.
        curves: Training and evaluation curves.
        text_queries: Examples of finding pictures by caption.
        image_queries: Examples of finding captions by picture.
        pictures: Ready-made pictures.
        facts: What it takes to repeat the run: machine, versions, seeds, budget.
        matrices: Confusion matrices.
    """

    title: str
    summary: list[str]
    tables: list[Table]
    curves: list[Curve]
    text_queries: list[TextQuery]
    image_queries: list[ImageQuery]
    pictures: list[Picture]
    facts: dict[str, str]
    matrices: list[Matrix] = field(default_factory=list)


def _check_answers(
    name: str, answers: Sequence[object], scores: list[float], correct: list[bool]
) -> None:
    if not len(answers) == len(scores) == len(correct) or not answers:
        raise ValueError(
            f"{name} has {len(answers)} answers, {len(scores)} scores and {len(correct)} "
            "marks of correctness; give one of each per answer, and at least one answer"
        )


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"an image is {image.dtype} {image.shape}; give uint8 (H, W, 3), undoing any "
            "normalisation and moving channels last"
        )
