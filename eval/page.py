"""The page people play with, in gradio: name a picture, search, look inside.

Everything it needs comes from this machine, and only this machine is asked: see `page_server`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from fastapi import FastAPI
from torch import Tensor

from data_pipelines.shards import FieldError
from data_pipelines.transforms import eval_transform
from eval import page_html
from eval.collection import Hit
from eval.page_style import CSS
from eval.playground import Playground, Refused

HITS = 12
CAPTIONS = 10
SAMPLES = 8
DRAWN = 320  # pixels of slot maps
LABELS = ["cat", "dog", "bird", "car", "tree", "house", "food", "person"]
# Clicks on buttons of our own HTML, as events that carry what the button stands for.
PICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick]');
  if (button) trigger('click', {pick: button.dataset.pick});
});
"""
NO_PICTURE = "Drop a picture, or click one of the set's."
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
        cards = [self._card(number) for number in self.sample_numbers(shuffled)]
        return page_html.cards(cards, "Take this picture", "samples")

    def labels(self) -> list[str]:
        """Those that were asked for, else the names of the first samples, else everyday things."""
        if self.options.labels or self.pictures is None:
            return list(self.options.labels) or LABELS
        own = [self.pictures.captions(number)[:1] for number in self.sample_numbers(False)]
        return list(dict.fromkeys(itertools.chain.from_iterable(own))) or LABELS

    def queries(self) -> list[str]:
        """Captions of pictures that are not among the first samples, to search with."""
        if self.playground.collection is None or self.pictures is None:
            return []
        numbers = self.playground.collection.numbers.tolist()
        between = [numbers[(2 * place + 1) * len(numbers) // 10] for place in range(5)]
        own = [self.pictures.captions(number)[:1] for number in between]
        return list(dict.fromkeys(itertools.chain.from_iterable(own)))

    # What people do

    def classify(self, payload: Any, labels: str, templates: str) -> str:
        def answer(data: bytes) -> str:
            scores = self.playground.classify(data, _lines(labels), _lines(templates))
            return page_html.bars(scores, self.playground.logits)

        return self._about(payload, answer)

    def describe(self, payload: Any) -> str:
        collection = self.playground.collection
        if collection is None or not collection.captions:
            return page_html.notice(NO_SET if collection is None else NO_CAPTIONS)
        captions = collection.captions

        def answer(data: bytes) -> str:
            hits = self.playground.describe(data, CAPTIONS)
            return page_html.captions([(captions[hit.number], hit.score) for hit in hits])

        return self._about(payload, answer)

    def find(self, query: str) -> str:
        if self.playground.collection is None:
            return page_html.notice(NO_SET)
        if not query.strip():
            return page_html.notice("Type what you look for, or click an example.")
        try:
            return self._hits(self.playground.find(query, HITS))
        except Refused as error:
            return page_html.notice(str(error), "wrong")

    def find_alike(self, payload: Any) -> str:
        if self.playground.collection is None:
            return page_html.notice(NO_SET)
        return self._about(payload, lambda data: self._hits(self.playground.find_alike(data, HITS)))

    def slot(self, payload: Any, layer: float, slot: float) -> str:
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

    def slot_range(self, layer: float, slot: float) -> Any:
        """The slider that ends at a layer's last slot."""
        last = self._sizes(layer).slots - 1
        return gr.Slider(maximum=max(1, last), value=min(int(slot), last))

    def take(self, event: gr.EventData) -> str:
        """A picture of the set, as a file for the picture field."""
        number = int(event._data["pick"])
        if self.pictures is None or not 0 <= number < len(self.pictures):
            raise gr.Error("There is no such picture in the set.")
        path = self.files / f"picture-{number}"
        path.write_bytes(self.pictures.read(number))
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

    def _inside(self, data: bytes, layer: float) -> tuple[Tensor, Tensor, Any]:
        sizes = self._sizes(layer)
        place = self.playground.layers.index(sizes)
        found = self.playground.look_inside(data)[place]
        return self.draw(self.playground.picture(data)), self.playground.seen(data), found

    def _sizes(self, layer: float) -> Any:
        layers = self.playground.layers
        return layers[min(max(int(layer), 1), len(layers)) - 1]

    def _hits(self, hits: Sequence[Hit]) -> str:
        cards = [self._card(hit.number, f"{hit.score:.3f}") for hit in hits]
        return page_html.cards(cards, "Take this picture")

    def _card(self, number: int, value: str = "") -> page_html.Card:
        assert self.pictures is not None
        caption = (self.pictures.captions(number) or [""])[0]
        try:
            source = _thumbnail(self.playground, self.pictures.read(number))
        except (FieldError, Refused):  # the file has changed since it was embedded
            source = page_html.data_uri(torch.zeros(3, 8, 8, dtype=torch.uint8))
        return page_html.Card(str(number), source, caption, value)


def _thumbnail(playground: Playground, data: bytes) -> str:
    return page_html.data_uri(playground.picture(data), page_html.THUMBNAIL)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def build_page(playground: Playground, options: PageOptions, files: Path) -> gr.Blocks:
    """Lay out the page."""
    page = Page(playground, options, files)
    with gr.Blocks(title=options.title, analytics_enabled=False, fill_width=True) as blocks:
        _html(page_html.headline(options.title, options.facts))
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                picture = _picture_column(page)
            with gr.Column(scale=8, min_width=320), gr.Tabs():
                with gr.Tab("Name it", id="name"):
                    _naming(page, picture)
                with gr.Tab("Search", id="search"):
                    _searching(page, picture)
                with gr.Tab("Look inside", id="inside"):
                    _looking_inside(page, picture)
    blocks.queue(max_size=64, default_concurrency_limit=4)
    return blocks


def mount_page(app: FastAPI, blocks: gr.Blocks, max_upload: int) -> None:
    """Put the page of `build_page` at the root of a web application.

    Args:
        max_upload: bytes of an uploaded file.
    """
    gr.mount_gradio_app(
        app, blocks, "/", theme=_theme(), css=CSS, footer_links=[], run_history=False,
        max_file_size=max_upload, ssr_mode=False, pwa=False, show_error=True, mcp_server=False,
        enable_monitoring=False,
    )  # fmt: skip


def _theme() -> Any:
    """gradio's base theme in our colours, with fonts that every machine has."""
    sans = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="stone", font=sans, font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        body_background_fill="#fbfaf7", body_background_fill_dark="#15171a",
        block_background_fill="#ffffff", block_background_fill_dark="#1d2024",
        block_border_color="#e2ded5", block_border_color_dark="#33373d",
        input_background_fill="#ffffff", input_background_fill_dark="#1d2024",
        button_primary_background_fill="#0b62a8", button_primary_background_fill_dark="#0b62a8",
        button_primary_background_fill_hover="#0b5f9e", button_primary_text_color="#ffffff",
        slider_color="#0b62a8", slider_color_dark="#6cb2f5",
    )  # fmt: skip


def _on(trigger: Any, answer: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Listen; of several changes while an answer is on its way, only the last one counts."""
    return trigger(
        answer,
        inputs,
        outputs,
        # Pictures stay files, which we read with our own limits.
        preprocess=False,
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )


def _html(value: str, name: str | None = None) -> gr.HTML:
    """Our own markup in our own style; its buttons with `data-pick` are click events."""
    return gr.HTML(value, js_on_load=PICKS, elem_id=name, apply_default_css=False)


def _picture_column(page: Page) -> gr.Image:
    picture = gr.Image(
        label="Picture", sources=["upload", "clipboard"], type="filepath", height=300,
        elem_id="picture", buttons=[], placeholder="Drop a picture here\nor click to choose one",
    )  # fmt: skip
    if page.pictures is not None:
        _html('<p class="heading">From your set</p>')
        samples = _html(page.samples(), "samples")
        other = gr.Button("Other pictures", size="sm")
        _on(samples.click, page.take, None, picture)
        _on(other.click, lambda: page.samples(shuffled=True), None, samples)
    return picture


def _naming(page: Page, picture: gr.Image) -> None:
    scores = _html(page_html.notice(NO_PICTURE), "scores")
    with gr.Row():
        labels = gr.Textbox(
            "\n".join(page.labels()), label="Labels, one per line", lines=6, max_lines=12,
            min_width=200, elem_id="labels",
        )  # fmt: skip
        templates = gr.Textbox(
            "\n".join(page.options.templates), label="Templates, {} is the label", lines=6,
            max_lines=12, min_width=200, elem_id="templates",
        )  # fmt: skip
    for trigger in (picture.change, labels.change, templates.change):
        _on(trigger, page.classify, [picture, labels, templates], scores)


def _searching(page: Page, picture: gr.Image) -> None:
    query = gr.Textbox(
        label="What do you look for?", placeholder="type a few words and press Enter",
        elem_id="query",
    )  # fmt: skip
    with gr.Row():
        search = gr.Button("Search", variant="primary", size="md", min_width=120)
        alike = gr.Button("Pictures like mine", size="md", min_width=120)
    examples = _html(page_html.chips(page.queries()), "examples")
    found = _html(page.find(""), "found")
    _html('<p class="heading">Captions nearest to your picture</p>')
    captions = _html(page.describe(None), "captions")
    for trigger in (query.submit, search.click):
        _on(trigger, page.find, query, found)
    for buttons in (examples, captions):
        chosen = _on(buttons.click, _picked, None, query)
        _on(chosen.then, page.find, query, found)
    _on(alike.click, page.find_alike, picture, found)
    _on(found.click, page.take, None, picture)
    _on(picture.change, page.describe, picture, captions)


def _looking_inside(page: Page, picture: gr.Image) -> None:
    layers = page.playground.layers
    if not layers:
        _html(page_html.notice(page.playground.no_layers), "inside")
        return
    first = layers[0]
    with gr.Row():
        layer = gr.Slider(
            1, max(2, len(layers)), 1, step=1, label=f"Routed layer, 1 to {len(layers)}",
            interactive=True, visible=len(layers) > 1, min_width=180, elem_id="layer",
        )  # fmt: skip
        slot = gr.Slider(
            0, max(1, first.slots - 1), 0, step=1, label="Slot", interactive=True, min_width=180,
            elem_id="slot",
        )  # fmt: skip
    inside = _html(page_html.notice(NO_PICTURE), "inside")
    slots = _html("", "slots")
    for trigger in (picture.change, layer.change, slot.change):
        _on(trigger, page.slot, [picture, layer, slot], inside)
    for trigger in (picture.change, layer.change):
        _on(trigger, page.slots, [picture, layer], slots)
    if len({sizes.slots for sizes in layers}) > 1:
        _on(layer.change, page.slot_range, [layer, slot], slot)
    _on(slots.click, _picked_slot, None, slot)


def _picked(event: gr.EventData) -> str:
    return str(event._data["pick"])


def _picked_slot(event: gr.EventData) -> int:
    return int(event._data["pick"])
