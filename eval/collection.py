"""A set of pictures as a model sees it, ready to be searched; embeddings are kept on disk.

Shape legend: N usable pictures, T distinct captions, d width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data_pipelines.picture_sets import PictureSet
from eval.embedder import Embedder
from eval.search_index import EXACT_LIMIT, SearchIndex, build_index, import_faiss

LAYOUT = "1"  # changes with what a file of embeddings holds


@dataclass(frozen=True)
class Hit:
    """A picture's number in its set, or a caption's in the collection, and its cosine."""

    number: int
    score: float


@dataclass(frozen=True)
class Collection:
    """What can be searched.

    `numbers` (N,) are the places in `pictures` of the vectors in `images`; `captions` are T
    distinct texts, whose vectors are in `texts` (None without any); `skipped` counts the reasons
    of pictures that are left out.
    """

    pictures: PictureSet
    images: SearchIndex
    numbers: Tensor
    captions: Sequence[str]
    texts: SearchIndex | None
    skipped: Counter[str]

    def nearest_pictures(self, query: Tensor, k: int) -> list[Hit]:
        """The pictures nearest to a vector (d,), the nearest first."""
        return [
            Hit(int(self.numbers[hit.number]), hit.score) for hit in _search(self.images, query, k)
        ]

    def nearest_captions(self, query: Tensor, k: int) -> list[Hit]:
        """The captions nearest to a vector (d,), the nearest first."""
        return [] if self.texts is None else _search(self.texts, query, k)


def _search(index: SearchIndex, query: Tensor, k: int) -> list[Hit]:
    scores, numbers = index.search(query[None], k)
    # faiss answers -1 where its lists hold fewer than k.
    pairs = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
    return [Hit(number, score) for number, score in pairs if number >= 0]


def build_collection(
    embedder: Embedder,
    pictures: PictureSet,
    *,
    cache: Path | None = None,
    exact_limit: int = EXACT_LIMIT,
    batch_size: int = 256,
    workers: int = 0,
) -> Collection:
    """Embed pictures and captions, or read what an earlier call with the same has kept.

    Args:
        cache: folder for embeddings, made when missing; None keeps nothing.
        exact_limit: see `build_index`.
        batch_size: pictures embedded at once.
        workers: processes that decode; with 0 this one does.

    Raises:
        ValueError: no picture can be used, or faiss is needed and not installed.
    """
    if len(pictures) > exact_limit:
        import_faiss(len(pictures))  # before the hours that it takes to embed them
    model = embedder.fingerprint() if cache else ""

    def kept(kind: str, content: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if cache is None:
            return make()
        name = hashlib.sha256("\n".join([LAYOUT, kind, model, content]).encode()).hexdigest()
        path = cache / f"{kind}-{name[:32]}.safetensors"
        return _read(path) or _write(path, make())

    found = kept(
        "images",
        f"{pictures.fingerprint()} {pictures.max_pixels}" if cache else "",
        lambda: _embed_pictures(embedder, pictures, batch_size, workers),
    )
    skipped = Counter(json.loads(bytes(found["skipped"].tolist())))
    if not len(found["numbers"]):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        raise ValueError(f"none of the {len(pictures)} pictures can be used: {reasons}")
    numbers = found["numbers"].tolist()
    bar = tqdm(numbers, desc="captions", unit="picture", disable=None, leave=False)
    captions = list(dict.fromkeys(text for number in bar for text in pictures.captions(number)))
    texts = None
    if captions:
        if len(captions) > exact_limit:
            import_faiss(len(captions))
        content = hashlib.sha256("\0".join(captions).encode()).hexdigest() if cache else ""
        rows = kept("texts", content, lambda: {"vectors": _embed_texts(embedder, captions)})
        texts = build_index(rows["vectors"], exact_limit, embedder.device)
    images = build_index(found["vectors"], exact_limit, embedder.device)
    return Collection(pictures, images, found["numbers"], captions, texts, skipped)


def _embed_pictures(
    embedder: Embedder, pictures: PictureSet, batch_size: int, workers: int
) -> dict[str, Tensor]:
    vectors, numbers, skipped = [], list[int](), Counter[str]()
    with tqdm(total=len(pictures), desc="pictures", unit="picture", disable=None) as bar:
        for images, places, reasons in pictures.batches(batch_size, workers):
            skipped.update(reasons)
            numbers += places
            if places:
                vectors.append(embedder.images(images))
            bar.update(len(places) + reasons.total())
    return {
        "vectors": torch.cat(vectors) if vectors else torch.empty(0, 1),
        "numbers": torch.tensor(numbers, dtype=torch.int64),
        "skipped": torch.tensor(list(json.dumps(skipped).encode()), dtype=torch.uint8),
    }


def _embed_texts(embedder: Embedder, texts: Sequence[str]) -> Tensor:
    step = embedder.batch_size
    starts = tqdm(range(0, len(texts), step), desc="captions", unit="batch", disable=None)
    return torch.cat([embedder.texts(texts[start : start + step]) for start in starts])


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, or None when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(tensors, partial)
    os.replace(partial, path)
    return tensors
