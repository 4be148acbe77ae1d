"""What the page of `scripts/app.py` can do, without the page: name a picture, search, look inside.

Pictures come as the bytes of a file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode import FORMATS, DecodeError, decode_rgb
from encoders.routing_inspection import InspectedLayer, inspected_layers
from encoders.routing_statistics import collect_routing
from eval.collection import Collection, Hit
from eval.embedder import Embedder
from eval.prompts import class_prompts
from eval.retrieval import unit_rows
from eval.zero_shot import class_vectors

MAX_PROMPTS = 4096  # of all labels together
MAX_TEXT = 2000  # characters of a label, a template or a query
REMEMBERED = 8  # pictures, and sets of labels
ORIENTATION = 274  # EXIF's tag


class Refused(ValueError):
    """What a user gave cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Score:
    """A label's share among all labels, or its own probability, and its cosine."""

    label: str
    probability: float
    cosine: float


@dataclass(frozen=True)
class LayerSizes:
    """A layer with slots: the number of its block, its slots and its experts."""

    block: int
    slots: int
    experts: int


class Playground:
    """A model, and perhaps a collection to search.

    Args:
        embedder: the model.
        collection: what can be searched; None for nothing.
        max_pixels: pictures with more are refused.
    """

    def __init__(
        self,
        embedder: Embedder,
        collection: Collection | None = None,
        max_pixels: int = 64_000_000,
    ) -> None:
        self.embedder, self.collection, self.max_pixels = embedder, collection, max_pixels
        self.logits = embedder.logits()
        self._vectors = lru_cache(REMEMBERED)(self._class_vectors)
        self._embedding = lru_cache(REMEMBERED)(self._embed)
        self._inside = lru_cache(REMEMBERED)(self._look_inside)
        self.layers, self.no_layers = self._find_layers()
        """Layers that can be looked into, and the reason when there are none."""

    def picture(self, data: bytes) -> Tensor:
        """Decode to uint8 (3, H, W), upright as cameras and browsers show it.

        Raises:
            Refused: no picture, or too large.
        """
        try:
            return _upright(decode_rgb(data, self.max_pixels), data)
        except DecodeError as error:
            raise Refused(self._why(str(error))) from error

    def seen(self, data: bytes) -> Tensor:
        """The picture as the model gets it, uint8 (3, S, S)."""
        return self.embedder.transform(self.picture(data))

    def classify(self, data: bytes, labels: Sequence[str], templates: Sequence[str]) -> list[Score]:
        """Score each label, the likeliest first.

        With a softmax over the labels, or, for models of the sigmoid loss, each by itself.

        Args:
            data: the picture.
            labels: at least one.
            templates: prompts with one `{}` for the label, at least one.

        Raises:
            Refused: a picture or texts that cannot be used.
        """
        vectors = self._vectors(tuple(labels), tuple(templates))
        image = unit_rows(self._embedding(data)[None], "image embedding")
        cosines = (image @ vectors.double().T)[0]
        scaled = self.logits.scale * cosines + self.logits.bias
        shares = scaled.sigmoid() if self.logits.sigmoid else scaled.softmax(0)
        rows = zip(labels, shares.tolist(), cosines.tolist(), strict=True)
        return sorted((Score(*row) for row in rows), key=lambda score: -score.probability)

    def find(self, query: str, k: int) -> list[Hit]:
        """The pictures nearest to a text, by their numbers in the set.

        Raises:
            Refused: an empty or too long text.
        """
        query = _checked("query", [query])[0]
        if self.collection is None:
            return []
        return self.collection.nearest_pictures(self.embedder.texts([query])[0], k)

    def find_alike(self, data: bytes, k: int) -> list[Hit]:
        """The pictures nearest to a picture."""
        if self.collection is None:
            return []
        return self.collection.nearest_pictures(self._embedding(data), k)

    def describe(self, data: bytes, k: int) -> list[Hit]:
        """The captions of the collection nearest to a picture."""
        if self.collection is None:
            return []
        return self.collection.nearest_captions(self._embedding(data), k)

    def look_inside(self, data: bytes) -> list[InspectedLayer]:
        """Routing of the picture in each of `layers`, on the CPU; B is 1."""
        return self._inside(data)

    def _why(self, reason: str) -> str:
        if "pixels" in reason:
            return f"This picture has more than {self.max_pixels:,} pixels: scale it down."
        return (
            "This file is no picture that can be read:"
            f" give one as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."
        )

    def _class_vectors(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        names, forms = _checked("label", labels), _checked("template", templates)
        if len(names) * len(forms) > MAX_PROMPTS:
            raise Refused(
                f"{len(names)} labels in {len(forms)} templates are over {MAX_PROMPTS:,} prompts:"
                " take fewer."
            )
        try:
            prompts = class_prompts(names, forms)
        except ValueError as error:
            raise Refused(f"{error}.") from error
        return class_vectors(self.embedder.texts, prompts)

    def _embed(self, data: bytes) -> Tensor:
        return self.embedder.images(self.seen(data)[None])[0]

    def _look_inside(self, data: bytes) -> list[InspectedLayer]:
        return self._layers_of(self.seen(data)[None])

    @torch.inference_mode()
    def _layers_of(self, images: Tensor) -> list[InspectedLayer]:
        trunk = self.embedder.image_trunk()
        if trunk is None:
            return []
        with self.embedder.lock:
            routing = collect_routing(trunk, self.embedder.pixels(images))
        return [
            InspectedLayer(
                layer.block, layer.dispatch.float().cpu(), layer.combine.float().cpu(),
                layer.num_experts, None,
            )
            for layer in inspected_layers(trunk, routing)
        ]  # fmt: skip

    def _find_layers(self) -> tuple[list[LayerSizes], str]:
        """What a blank picture goes through."""
        size, found = self.embedder.opened.image_size, list[InspectedLayer]()
        reason = "no routed layers"
        with suppress(ValueError):  # there is none
            found = self._layers_of(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            if self.embedder.image_trunk() is not None:
                reason = "no routed layers with slots"
        sizes = [
            LayerSizes(layer.block, layer.dispatch.shape[2], layer.num_experts) for layer in found
        ]
        return sizes, "" if sizes else f"The image encoder of this model has {reason}."


def _checked(what: str, texts: Sequence[str]) -> list[str]:
    """The texts without white space around them; Refused when there are none, or long ones."""
    found = [text.strip() for text in texts]
    if not found or not all(found):
        raise Refused(f"There is no {what}: type one.")
    if max(map(len, found)) > MAX_TEXT:
        raise Refused(f"A {what} is over {MAX_TEXT:,} characters: shorten it.")
    return found


def _upright(picture: Tensor, data: bytes) -> Tensor:
    """Turn or mirror a picture as the tag of its camera says."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        turn = image.getexif().get(ORIENTATION, 1)
    if turn in (2, 4, 5, 7):
        picture = picture.flip(2 if turn in (2, 5, 7) else 1)
    quarters = {3: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(turn, 0)
    return picture.rot90(quarters, (1, 2)).contiguous() if quarters else picture
