"""Parts of the page as HTML, without the page's framework; all text in them is escaped."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.routing_inspection import InspectedLayer
from encoders.routing_report import choose_slots, patch_grid
from encoders.slot_pictures import heat_colours, heat_scale, paint_slot
from eval.embedder import Logits
from eval.playground import Score

THUMBNAIL = 192  # pixels of the longer side
SHOWN_LABELS = 25
SHOWN_SLOTS = 12
SMALLEST = 6  # decimals of a percentage


@dataclass(frozen=True)
class Card:
    """A picture to click on: what the click gives, a data URI, and texts below it."""

    pick: str
    source: str
    caption: str = ""
    value: str = ""


def notice(text: str, kind: str = "empty") -> str:
    """A line in place of results; `kind` is empty or wrong."""
    return f'<p class="notice {kind}">{escape(text)}</p>'


def headline(title: str, facts: Sequence[str]) -> str:
    """The top of the page."""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f'<header class="top"><h1>{escape(title)}</h1><ul>{items}</ul></header>'


def bars(scores: Sequence[Score], logits: Logits) -> str:
    """Scores as bars, and what they mean."""
    rows = "".join(
        f'<li title="cosine {score.cosine:.3f}"><span class="name">{escape(score.label)}</span>'
        f'<span class="value">{percent(score.probability)}</span>'
        f'<span class="track"><i style="width:{100 * score.probability:.2f}%"></i></span></li>'
        for score in scores[:SHOWN_LABELS]
    )
    hidden = len(scores) - SHOWN_LABELS
    more = f"{hidden} more labels score less. " if hidden > 0 else ""
    meaning = (
        "Each label by itself: the model was trained with a sigmoid."
        if logits.sigmoid
        else "Shares among these labels: a softmax, so they always add up to 100 %."
    )
    return f'<ol class="bars">{rows}</ol><p class="small">{more}{meaning}</p>'


def cards(items: Sequence[Card], hint: str, kind: str = "") -> str:
    """Pictures in a grid, each a button."""
    buttons = "".join(
        f'<button type="button" class="card" data-pick="{escape(item.pick)}"'
        f' title="{escape(hint)}">'
        f'<img src="{item.source}" alt="{escape(item.caption) or "picture"}">'
        + (f'<span class="caption">{escape(item.caption)}</span>' if item.caption else "")
        + (f'<span class="value">{escape(item.value)}</span>' if item.value else "")
        + "</button>"
        for item in items
    )
    return f'<div class="cards {kind}">{buttons}</div>'


def captions(items: Sequence[tuple[str, float]]) -> str:
    """Texts with their cosines, each a button."""
    rows = "".join(
        f'<li><button type="button" data-pick="{escape(text)}" title="Search with this caption">'
        f'<span class="name">{escape(text)}</span><span class="value">{score:.3f}</span>'
        "</button></li>"
        for text, score in items
    )
    return f'<ol class="captions">{rows}</ol>'


def chips(texts: Sequence[str]) -> str:
    """Texts to click on."""
    buttons = "".join(
        f'<button type="button" data-pick="{escape(text)}">{escape(text)}</button>'
        for text in texts
    )
    return f'<div class="chips">{buttons}</div>' if texts else ""


def slot_view(picture: Tensor, seen: Tensor, layer: InspectedLayer, slot: int) -> str:
    """What a slot takes in and where its output goes.

    Args:
        picture: uint8 (3, H, W) to draw on, cut as the model's input is.
        seen: uint8 (3, S, S), the model's input.
        layer: routing of this picture, B = 1.
        slot: its number.
    """
    dispatch, combine = layer.dispatch[0], layer.combine[0]
    tokens, slots = dispatch.shape
    grid = patch_grid(seen.shape[1], seen.shape[2], tokens)
    shares = combine * slots / tokens  # 1/M where a token weighs all slots alike
    figures = [_figure("seen", seen, f"The model sees {seen.shape[2]} x {seen.shape[1]} pixels")]
    for weights, title in ((dispatch, "Takes its input from"), (shares, "Gives its output to")):
        top = heat_scale(weights)
        painted = paint_slot(picture, weights[:, slot], grid, top)
        figures.append(_figure("map", painted, title, _scale(top)))
    return (
        f'<div class="slot"><p><b>Block {layer.block}, slot {slot}</b> of expert'
        f" {slot * layer.num_experts // slots}. {_spread(dispatch[:, slot])}</p>"
        f'<div class="figures">{"".join(figures)}</div></div>'
    )


def _figure(kind: str, picture: Tensor | np.ndarray, title: str, below: str = "") -> str:
    return (
        f'<figure class="{kind}"><img src="{data_uri(picture)}" alt="{title}">'
        f"<figcaption>{title}{below}</figcaption></figure>"
    )


def slot_cards(picture: Tensor, seen: Tensor, layer: InspectedLayer) -> str:
    """The slots of a layer that look at the fewest and most different places, to click on."""
    dispatch = layer.dispatch[0]
    tokens, slots = dispatch.shape
    grid = patch_grid(seen.shape[1], seen.shape[2], tokens)
    top = heat_scale(dispatch)
    items = [
        Card(
            str(slot),
            data_uri(paint_slot(picture, dispatch[:, slot], grid, top), THUMBNAIL),
            f"slot {slot}",
        )
        for slot in choose_slots(layer.dispatch, min(slots, SHOWN_SLOTS))
    ]
    heading = '<p class="heading">Slots that look at few places, and at different ones</p>'
    return heading + cards(items, "Show this slot", "slots")


def data_uri(picture: Tensor | np.ndarray, longest: int | None = None) -> str:
    """A picture, uint8 tensor (3, H, W) or array (H, W, 3), to put into a page.

    Args:
        longest: scale its longer side down to this.
    """
    array = picture.permute(1, 2, 0).numpy() if isinstance(picture, torch.Tensor) else picture
    image = Image.fromarray(np.ascontiguousarray(array))
    if longest is not None:
        image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, lossless=max(image.size) <= 64)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def percent(share: float) -> str:
    """A share of one as people read it; of small ones, as sigmoids give, the first figure."""
    if share >= 0.0005:
        return f"{100 * share:.1f} %"
    if share < 10 ** -(SMALLEST + 2):
        return f"< {10**-SMALLEST:.{SMALLEST}f} %"
    return f"{100 * share:.{-math.floor(math.log10(100 * share))}f} %"


def _spread(weights: Tensor) -> str:
    """How few patches give a slot half of its input."""
    half = int((weights.sort(descending=True).values.cumsum(0) < 0.5).sum()) + 1
    return f"Half of its input comes from {half} of {len(weights)} patches."


def _scale(top: float) -> str:
    """The colours with their ends, in multiples of the average weight."""
    stops = ", ".join(heat_colours())
    return (
        '<span class="scale" title="weight, in multiples of the average">1x'
        f' <i style="background:linear-gradient(90deg, {stops})"></i> {top:.3g}x</span>'
    )
