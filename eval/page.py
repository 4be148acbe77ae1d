"""The page people play with, laid out in gradio: name a picture, search, look inside.

Everything it needs comes from this machine, and only this machine is asked: see `page_server`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from eval import page_html
from eval.page_answers import NO_PICTURE, Page, PageOptions
from eval.page_style import CSS
from eval.playground import Playground, Refused

LINES = 12  # of labels and of templates that are seen at once
KEPT = (3600, 6 * 3600)  # every hour, files over six hours old go, seconds
# Clicks on buttons of our own HTML, as events that carry what the button stands for.
PICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-pick]');
  if (button) trigger('click', {pick: button.dataset.pick});
});
"""


def build_page(playground: Playground, options: PageOptions, files: Path) -> gr.Blocks:
    """Lay out the page."""
    page = Page(playground, options, files)
    with gr.Blocks(
        title=options.title, analytics_enabled=False, fill_width=True, delete_cache=KEPT
    ) as blocks:
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
        block_label_background_fill="#ffffff", block_label_background_fill_dark="#1d2024",
        button_secondary_background_fill="#ece9e1", button_secondary_background_fill_dark="#2b2f35",
        button_secondary_background_fill_hover="#e2ded5",
        button_secondary_background_fill_hover_dark="#3a3f46",
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
        # Answers come with the request. Through the queue they come by a stream that the browser
        # opens and closes all the time, and some get lost.
        queue=False,
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
        _on(samples.click, _taker(page), None, picture)
        _on(other.click, lambda: page.samples(shuffled=True), None, samples)
    return picture


def _naming(page: Page, picture: gr.Image) -> None:
    scores = _html(page_html.notice(NO_PICTURE), "scores")
    own, forms = page.labels(), page.options.templates
    lines = min(max(6, len(own), len(forms)), LINES)  # both alike
    with gr.Row():
        labels = gr.Textbox(
            "\n".join(own), label="Labels, one per line", lines=lines, max_lines=LINES,
            min_width=200, elem_id="labels",
        )  # fmt: skip
        templates = gr.Textbox(
            "\n".join(forms), label="Templates, {} is the label", lines=lines, max_lines=LINES,
            min_width=200, elem_id="templates",
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
        alike = gr.Button("More like mine", size="md", min_width=120)
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
    _on(found.click, _taker(page), None, picture)
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
        _on(layer.change, _slot_range(page), [layer, slot], slot)
    _on(slots.click, _picked_number, None, slot)


def _taker(page: Page) -> Callable[..., str]:
    def take(event: gr.EventData) -> str:
        try:
            return page.take(_picked_number(event))
        except Refused as error:
            raise gr.Error(str(error)) from error

    return take


def _slot_range(page: Page) -> Callable[..., Any]:
    def end(layer: float, slot: float) -> Any:
        last = page.last_slot(layer)
        return gr.Slider(maximum=max(1, last), value=min(int(slot), last))

    return end


def _picked(event: gr.EventData) -> str:
    return str(event._data["pick"])


def _picked_number(event: gr.EventData) -> int:
    return int(event._data["pick"])
