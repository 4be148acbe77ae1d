"""Exact ranks of all matching image-text pairs, from tiles of float32 products.

A float32 product decides every comparison that is further apart than its rounding error can be;
the few that are closer are decided by float64 products of the same rows, rounded to float32. So
equal rows tie whatever the matrix kernel does, and the large products run at float32 speed.

Shape legend: N images, M texts, d width, K most captions of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, COLUMNS = 1024, 8192  # of a tile: 32 MiB of float32
PAIRS = 65_536  # rows that are multiplied one by one at a time
CLOSE = 8  # a tile of which more than one in CLOSE is undecided is multiplied in float64


class PairRanks(NamedTuple):
    """0-based ranks of the M matching pairs; of equal scores, what does not match ranks first.

    Of captions of one image that score the same, the earlier ranks first.

    Attributes:
        text: (M,) int64, the rank of text j among all texts, for the image that it describes.
        image: (M,) int64, the rank of that image among all images, for text j.
    """

    text: Tensor
    image: Tensor


@torch.no_grad()
def pair_ranks(
    images: Tensor, texts: Tensor, owners: Tensor, rows: int = ROWS, columns: int = COLUMNS
) -> PairRanks:
    """Rank every text for its image and every text's image for the text.

    Time grows with N * M * (d + K), memory with (N + M) * d and the size of a tile.

    Args:
        images: (N, d) float32 rows of length 1.
        texts: (M, d) float32 rows of length 1, on the same device.
        owners: (M,) int64, the image that each text describes.
        rows: images of a tile.
        columns: texts of a tile.

    Returns:
        Ranks on the CPU.
    """
    with torch.autocast(images.device.type, enabled=False):
        ranker = _Ranker(images, texts, owners)
        for first in range(0, len(images), rows):
            for start in range(0, len(texts), columns):
                ranker.add(slice(first, first + rows), slice(start, start + columns))
    return PairRanks(ranker.text_ranks.cpu(), ranker.image_ranks.cpu())


class _Ranker:
    """Counts, tile by tile, what ranks ahead of each pair."""

    def __init__(self, images: Tensor, texts: Tensor, owners: Tensor) -> None:
        self.images, self.texts, self.owners = images, texts, owners
        self.own = self._products(owners, torch.arange(len(texts), device=texts.device))
        self.slots = _slots(owners, len(images))
        self.text_ranks = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
        self.image_ranks = torch.zeros_like(self.text_ranks)
        # Rounding of a sum of d products whose absolute values add up to 1 at most.
        self.margin = (images.shape[1] + 2) * 2.0**-24
        # TF32 and bfloat16 products keep no such promise.
        precise = torch.get_float32_matmul_precision() == "highest"
        if images.is_cuda:
            precise = precise and not torch.backends.cuda.matmul.allow_tf32
        self.precise = precise

    def _products(self, images: Tensor, texts: Tensor) -> Tensor:
        """Similarity of the given pairs (P,), (P,) as float32 (P,), by float64 products."""
        parts = [
            (self.images[i].double() * self.texts[t].double()).sum(1).float()
            for i, t in zip(images.split(PAIRS), texts.split(PAIRS), strict=True)
        ]
        return torch.cat(parts) if parts else self.images.new_empty(0)

    def add(self, rows: slice, columns: slice) -> None:
        """Count the tile of the given images and texts for all pairs that it concerns."""
        tile = self._tile(rows, columns)
        first, start = rows.start, columns.start
        texts = torch.arange(start, start + tile.shape[1], device=tile.device)
        self.image_ranks[columns] += self._ahead(tile.T, self.own[columns], None, texts, first)
        images = torch.arange(first, first + tile.shape[0], device=tile.device)
        for slot in self.slots.unbind(1):
            pairs = slot[rows]
            present = pairs >= 0
            if not present.all():
                part, numbers, pairs = tile[present], images[present], pairs[present]
            else:
                part, numbers = tile, images
            if len(pairs):
                ahead = self._ahead(part, self.own[pairs], pairs, numbers, start)
                self.text_ranks[pairs] += ahead

    def _tile(self, rows: slice, columns: slice) -> Tensor:
        if self.precise:
            return self.images[rows] @ self.texts[columns].T
        return (self.images[rows].double() @ self.texts[columns].double().T).float()

    def _ahead(
        self, tile: Tensor, own: Tensor, pairs: Tensor | None, queries: Tensor, start: int
    ) -> Tensor:
        """How many columns of `tile` (Q, P) rank ahead of each query's `own` score (Q,).

        `queries` (Q,) are image numbers if `pairs` (Q,), the texts that own the scores, are given,
        and else text numbers; column c is pool entry start + c.
        """
        high, low = (own + self.margin)[:, None], (own - self.margin)[:, None]
        ahead = _count(tile > high)
        undecided = _count(tile >= low) - ahead
        right = self.owners[queries] if pairs is None else pairs
        alone = (right >= start) & (right < start + tile.shape[1])
        unsure = torch.nonzero(undecided > alone).flatten()  # by more than the pair itself
        if not len(unsure):
            return ahead
        for part in unsure.split(256):
            scores = tile[part]
            close = (scores >= low[part]) & (scores <= high[part])
            ahead[part] += self._decide(close, queries[part], own[part], right[part], start, pairs)
        return ahead

    def _decide(
        self, close: Tensor, queries: Tensor, own: Tensor, right: Tensor, start: int, pairs: object
    ) -> Tensor:
        """Of the marked columns (Q, P), how many rank ahead by exact scores."""
        columns = torch.arange(start, start + close.shape[1], device=close.device)
        # What loses a tie: the pair itself, and captions of the same image that stand behind it.
        behind = columns >= right[:, None]
        if pairs is None:
            behind &= columns <= right[:, None]
        else:
            behind &= self.owners[columns] == queries[:, None]
        if close.sum() * CLOSE > close.numel():
            sources = (self.texts, self.images) if pairs is None else (self.images, self.texts)
            pool = sources[1][start : start + close.shape[1]].double()
            exact = (sources[0][queries].double() @ pool.T).float()
            return _count(close & ((exact > own[:, None]) | ((exact == own[:, None]) & ~behind)))
        row, column = close.nonzero(as_tuple=True)
        there = queries[row], columns[column]
        exact = self._products(*(there[::-1] if pairs is None else there))
        wins = (exact > own[row]) | ((exact == own[row]) & ~behind[row, column])
        return torch.bincount(row[wins], minlength=len(queries))


def _count(marks: Tensor) -> Tensor:
    """Marks in each row of (Q, P) bool, as int64 (Q,)."""
    if marks.is_cpu:  # numpy counts ten times as fast
        return torch.from_numpy(np.count_nonzero(marks.numpy(), axis=1))
    return marks.sum(1)


def _slots(owners: Tensor, images: int) -> Tensor:
    """(N, K) int64: the texts of each image, -1 where it has fewer than K."""
    order = owners.argsort(stable=True)
    sorted_owners = owners[order]
    counts = torch.bincount(owners, minlength=images)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(owners), device=owners.device) - first[sorted_owners]
    slots = torch.full((images, int(counts.max())), -1, device=owners.device)
    slots[sorted_owners, place] = order
    return slots


def average_precision(ranks: Tensor, owners: Tensor, images: int) -> Tensor:
    """Average precision of each image's captions: the mean precision at each of its captions.

    Args:
        ranks: (M,) int64, `PairRanks.text`.
        owners: (M,) int64; every image has a text.
        images: N.

    Returns:
        (N,) float64.
    """
    order = torch.argsort(ranks, stable=True)
    order = order[owners[order].argsort(stable=True)]  # by image, then by rank
    counts = torch.bincount(owners, minlength=images)
    first = counts.cumsum(0) - counts
    found = torch.arange(1, len(owners) + 1) - first[owners[order]]
    precision = found.double() / (ranks[order] + 1)
    return torch.zeros(images, dtype=torch.float64).index_add_(0, owners[order], precision) / counts


def unit_rows32(rows: Tensor) -> Tensor:
    """Rows (Q, d) of any floating type as float32 of length 1, without a float64 copy of them all.

    A row of zeros stays zero.
    """
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        unit[part] = F.normalize(rows[part].double(), dim=1).float()
    return unit
