"""Rows that repeat an earlier one, exactly or nearly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

BITS = 64


def repeats(digests: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (later row, first row that equals it) of `digests` (N, 2) uint64, zeros left out."""
    rows = np.ascontiguousarray(digests).view(np.dtype((np.void, 16))).ravel()
    _, first, which = np.unique(rows, return_index=True, return_inverse=True)
    first = first[which]
    late = np.flatnonzero((first != np.arange(len(rows))) & digests.any(1))
    return [(int(row), int(first[row])) for row in late]


def brightness_steps(image: Image.Image) -> int:
    """64 bits of an RGB picture: for 8 x 8 places, whether it grows brighter to the right.

    The difference hash of N. Krawetz, "Kind of Like That" (2013): shrinking and encoding anew
    change few of the bits.
    """
    grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(grey, np.int16)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def repeats_of_hashes(hashes: Sequence[int], distance: int) -> list[tuple[int, int]]:
    """Pairs (later row, earlier row) of 64-bit `hashes` that differ in at most `distance` bits.

    A row that is already paired pairs with no later one: without the later rows no pair is left.
    Of distance + 1 bands at least one is equal in two such hashes; only those are compared.
    """
    bands = distance + 1
    width = BITS // bands
    tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(bands)]
    pairs: list[tuple[int, int]] = []
    for row, value in enumerate(hashes):
        parts = [(value >> (band * width)) & ((1 << width) - 1) for band in range(bands)]
        found = [table[part] for table, part in zip(tables, parts, strict=True) if part in table]
        near = [o for rows in found for o in rows if (hashes[o] ^ value).bit_count() <= distance]
        if near:
            pairs.append((row, min(near)))
            continue
        for table, part in zip(tables, parts, strict=True):
            table[part].append(row)
    return pairs
