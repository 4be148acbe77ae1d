"""The nearest of many vectors by cosine: exact in torch, or approximate with faiss.

Shape legend: N vectors, Q queries, d width, k hits.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

EXACT_LIMIT = 1_000_000
CHUNK = 65_536  # vectors scored, normalised or added at a time


class SearchIndex(Protocol):
    """Vectors that can be searched."""

    def __len__(self) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The nearest vectors of each query.

        Args:
            queries: (Q, d) floating point, of any scale.
            k: how many; fewer come back where there are fewer.

        Returns:
            Cosines (Q, k) float32, the largest first, and numbers of vectors (Q, k) int64; both
            on the CPU.

        Raises:
            ValueError: k below 1, or a query of another width or not finite.
        """
        ...


def build_index(
    vectors: Tensor, exact_limit: int = EXACT_LIMIT, device: torch.device | str = "cpu"
) -> SearchIndex:
    """Exact up to `exact_limit` vectors, faiss beyond.

    Args:
        vectors: (N, d) floating point, of any scale; N at least 1.
        exact_limit: the most vectors that are compared one by one.
        device: where the exact index computes.

    Raises:
        ValueError: no vectors, one that is not finite, or faiss is needed and not installed.
    """
    if len(vectors) <= exact_limit:
        return ExactIndex(vectors, device)
    return FaissIndex(vectors)


class ExactIndex:
    """Every vector is compared; memory beside the vectors is Q times CHUNK numbers."""

    def __init__(self, vectors: Tensor, device: torch.device | str = "cpu") -> None:
        self.vectors = _unit_vectors(vectors).to(device)

    def __len__(self) -> int:
        return len(self.vectors)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        queries = _unit_queries(queries, self.vectors.shape[1], k).to(self.vectors.device)
        scores = queries.new_empty(len(queries), 0)
        numbers = torch.empty_like(scores, dtype=torch.int64)
        for start in range(0, len(self.vectors), CHUNK):
            found = queries @ self.vectors[start : start + CHUNK].T
            best, places = found.topk(min(k, found.shape[1]))
            scores = torch.cat([scores, best], 1)
            numbers = torch.cat([numbers, places + start], 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            scores, numbers = scores[:, :k], numbers.gather(1, order)[:, :k]
        return scores.cpu(), numbers.cpu()


class FaissIndex:
    """Inverted lists of half-precision vectors, of which the nearest `probes` are looked through.

    Approximate: some of the nearest vectors lie in lists that are passed over.

    Args:
        vectors: (N, d) floating point, of any scale.
        lists: number of lists; None takes twice the square root of N.
        probes: lists looked through for a query; None takes a sixteenth of them, 16 at least.
    """

    def __init__(
        self, vectors: Tensor, lists: int | None = None, probes: int | None = None
    ) -> None:
        faiss = import_faiss(len(vectors))
        vectors = _unit_vectors(vectors)
        count, width = vectors.shape
        lists = lists or max(1, min(round(2 * math.sqrt(count)), count // 40))
        self.index: Any = faiss.index_factory(
            width, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT
        )
        # faiss asks for 39 vectors a list, and takes no more than 256.
        some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 48 * lists]
        self.index.cp.niter = 10  # of k-means; more hardly find more, and take minutes
        self.index.train(vectors[some].numpy())
        for part in vectors.split(CHUNK):
            self.index.add(part.numpy())
        self.index.nprobe = min(lists, probes or max(16, lists // 16))
        self.width = width

    def __len__(self) -> int:
        return self.index.ntotal

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = _unit_queries(queries, self.width, k).cpu().numpy()
        scores, numbers = self.index.search(found, min(k, len(self)))
        return torch.from_numpy(scores), torch.from_numpy(numbers)


def import_faiss(count: int) -> Any:
    """The faiss package, for `count` vectors; ValueError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"a search among {count} vectors needs faiss: pip install 'softmoe-clip[retrieval]',"
            " or raise exact_limit"
        ) from error
    return faiss


def _unit_vectors(vectors: Tensor) -> Tensor:
    """A copy (N, d) float32 on the CPU with rows of length 1."""
    if vectors.ndim != 2 or not vectors.numel():
        raise ValueError(f"an index needs vectors (N, d), got {tuple(vectors.shape)}")
    rows = torch.empty(vectors.shape, dtype=torch.float32)
    for start in range(0, len(vectors), CHUNK):
        part = vectors[start : start + CHUNK].float()
        if not part.isfinite().all():
            raise ValueError(
                "an embedding is not finite: the model diverged or its precision overflowed"
            )
        rows[start : start + CHUNK] = F.normalize(part, dim=1)
    return rows


def _unit_queries(queries: Tensor, width: int, k: int) -> Tensor:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit vectors of width {width}")
    if not queries.isfinite().all():
        raise ValueError("a query is not finite: the model diverged or its precision overflowed")
    return F.normalize(queries.float(), dim=1)
