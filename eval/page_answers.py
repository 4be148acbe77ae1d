"""What the page answers to what people do on it, as HTML; see `eval.page` for where it stands."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.shards import FieldError
from data_pipelines.transforms import eval_transform
from encoders.routing_inspection import InspectedLayer
from eval import page_html
from eval.collection import Hit
from eval.playground import LayerSizes, Playground, Refused

HITS = 12
CAPTIONS = 10
SAMPLES = 8
DRAWN = 320  # pixels of slot maps
LABELS = ["cat", "dog", "bird", "car", "tree", "house", "food", "person"]
NO_PICTURE = "Drop or choose a picture to begin."
NO_SET = "There is no set of pictures: start the page with --images FOLDER or SHARDS."
NO_CAPTIONS = (
    "The set has no captions: they are read from a.txt beside a.jpg, or from the caption_key of"
    " shards."
)


@dataclass(frozen=True)
class PageOptions:
    """What the page starts with: its title, facts below it, labels and templates."""

    title: str
    facts: Sequence[str]
    labels: Sequence[str]
    templates: Sequence[str]
    max_upload: int
    """Bytes of an uploaded file."""


class Page:
    """The answers to what people do on the page; `files` is the folder of uploads and samples."""

    def __init__(self, playground: Playground, options: PageOptions, files: Path) -> None:
        self.playground, self.options, self.files = playground, options, files.resolve()
        self.pictures = None if playground.collection is None else playground.collection.pictures
        opened = playground.embedder.opened
        self.draw = eval_transform(DRAWN, opened.resize_mode, opened.interpolation)
        self.reading = threading.Lock()  # readers of shards share open files

    # What stands on the page

    def sample_numbers(self, shuffled: bool) -> list[int]:
        """Pictures of the set to click on, evenly spaced or drawn."""
        if self.playground.collection is None:
            return []
        numbers = self.playground.collection.numbers.tolist()
        count = min(SAMPLES, len(numbers))
        if shuffled:
            return random.sample(numbers, count)
        return [numbers[place * len(numbers) // count] for place in range(count)]

    def samples(self, shuffled: bool = False) -> str:
        """Pictures of the set to take, the same each time or drawn anew."""
        cards = [self._card(number) for number in self.sample_numbers(shuffled)]
        return page_html.cards(cards, "Take this picture", "samples")

    def labels(self) -> list[str]:
        """Those that were asked for, else captions of the first samples, else everyday things."""
        if self.options.labels or self.pictures is None:
            return list(self.options.labels) or LABELS
        own = self._captions(self.sample_numbers(False))
        return own if len(own) > 1 else LABELS  # one alone would always get 100 %

    def queries(self) -> list[str]:
        """Captions of pictures that are not among the first samples, to search with."""
        if self.playground.collection is None or self.pictures is None:
            return []
        numbers = self.playground.collection.numbers.tolist()
        between = [numbers[(2 * place + 1) * len(numbers) // 10] for place in range(5)]
        return self._captions(between)

    # What people do

    def classify(self, payload: Any, labels: str, templates: str) -> str:
        """Bars for the labels of a picture; labels and templates stand on lines of their own."""

        def answer(data: bytes) -> str:
            scores = self.playground.classify(data, _lines(labels), _lines(templates))
            return page_html.bars(scores, self.playground.logits)

        return self._about(payload, answer)

    def describe(self, payload: Any) -> str:
        """The captions of the set that are nearest to a picture."""
        collection = self.playground.collection
        if collection is None or not collection.captions:
            return page_html.notice(NO_SET if collection is None else NO_CAPTIONS)
        captions = collection.captions

        def answer(data: bytes) -> str:
            hits = self.playground.describe(data, CAPTIONS)
            return page_html.captions([(captions[hit.number], hit.score) for hit in hits])

        return self._about(payload, answer)

    def find(self, query: str) -> str:
        """The pictures of the set that are nearest to words."""
        if self.playground.collection is None:
            return page_html.notice(NO_SET)
        if not query.strip():
            return page_html.notice("Type what you look for.")
        try:
            return self._hits(self.playground.find(query, HITS))
        except Refused as error:
            return page_html.notice(str(error), "wrong")

    def find_alike(self, payload: Any) -> str:
        """The pictures of the set that are nearest to a picture."""
        if self.playground.collection is None:
            return page_html.notice(NO_SET)
        return self._about(payload, lambda data: self._hits(self.playground.find_alike(data, HITS)))

    def slot(self, payload: Any, layer: float, slot: float) -> str:
        """From which patches of a picture a slot takes its input, and where its output goes."""

        def answer(data: bytes) -> str:
            picture, seen, found = self._inside(data, layer)
            number = min(max(int(slot), 0), found.dispatch.shape[2] - 1)
            return page_html.slot_view(picture, seen, found, number)

        return self._about(payload, answer)

    def slots(self, payload: Any, layer: float) -> str:
        """The most telling slots of a layer; nothing without a picture, which `slot` says."""
        try:
            data = self._read(payload)
            return "" if data is None else page_html.slot_cards(*self._inside(data, layer))
        except Refused:
            return ""

    def last_slot(self, layer: float) -> int:
        """The number of a layer's last slot."""
        return self._sizes(layer).slots - 1

    def take(self, number: int) -> str:
        """A picture of the set, as a file for the picture field.

        Raises:
            Refused: there is none, or it cannot be read any more.
        """
        if self.pictures is None or not 0 <= number < len(self.pictures):
            raise Refused("There is no such picture in the set.")
        path = self.files / f"picture-{number}"
        try:
            with self.reading:
                path.write_bytes(self.pictures.read(number))
        except FieldError as error:
            raise Refused(f"This picture cannot be read any more: {error}.") from error
        return str(path)

    # Parts of the answers

    def _about(self, payload: Any, answer: Callable[[bytes], str]) -> str:
        try:
            data = self._read(payload)
            return page_html.notice(NO_PICTURE) if data is None else answer(data)
        except Refused as error:
            return page_html.notice(str(error), "wrong")

    def _read(self, payload: Any) -> bytes | None:
        """The file in the picture field, which a browser names by its path on this machine."""
        if not payload:
            return None
        path = Path(str(payload.get("path"))).resolve()
        if not path.is_relative_to(self.files) or not path.is_file():
            raise Refused("This picture is gone: drop it again.")
        if path.stat().st_size > self.options.max_upload:
            raise Refused(f"This file is over {self.options.max_upload / 2**20:g} MB.")
        return path.read_bytes()

    def _captions(self, numbers: Sequence[int]) -> list[str]:
        """The first captions of pictures, each text once."""
        assert self.pictures is not None
        with self.reading:
            own = [self.pictures.captions(number)[:1] for number in numbers]
        return list(dict.fromkeys(itertools.chain.from_iterable(own)))

    def _inside(self, data: bytes, layer: float) -> tuple[Tensor, Tensor, InspectedLayer]:
        sizes = self._sizes(layer)
        place = self.playground.layers.index(sizes)
        found = self.playground.look_inside(data)[place]
        return self.draw(self.playground.picture(data)), self.playground.seen(data), found

    def _sizes(self, layer: float) -> LayerSizes:
        layers = self.playground.layers
        return layers[min(max(int(layer), 1), len(layers)) - 1]

    def _hits(self, hits: Sequence[Hit]) -> str:
        cards = [self._card(hit.number, f"{hit.score:.3f}") for hit in hits]
        return page_html.cards(cards, "Take this picture")

    def _card(self, number: int, value: str = "") -> page_html.Card:
        assert self.pictures is not None
        caption = next(iter(self._captions([number])), "")
        try:
            with self.reading:
                data = self.pictures.read(number)
            source = page_html.data_uri(self.playground.picture(data), page_html.THUMBNAIL)
        except (FieldError, Refused):  # the file has changed since it was embedded
            source = page_html.data_uri(torch.zeros(3, 8, 8, dtype=torch.uint8))
        return page_html.Card(str(number), source, caption, value)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
