"""Image-text retrieval with any number of captions per image.

Ranks are counted instead of read off a sort, so ties follow one rule everywhere, and against the
model: a right answer ranks behind all wrong ones that score the same. A collapsed model, which
tells nothing apart, therefore finds nothing, where other rules give it up to 100 %.

Shape legend: N images, M texts, Q queries, P pool entries, d width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.exact_ranks import average_precision, pair_ranks, unit_rows32

TIE_RULE = "pessimistic"  # as records call it
_logger = logging.getLogger(__name__)


class RetrievalRanks(NamedTuple):
    """The 0-based rank of the best right answer of every query.

    Attributes:
        image_to_text: (N,) int64, the rank of each image's best own caption among M texts.
        text_to_image: (M,) int64, the rank of each text's image among N images.
        average_precision: (N,) float64 of each image's captions, or None where not all captions
            were ranked. A text has one image, so its average precision is 1 / (rank + 1).
    """

    image_to_text: Tensor
    text_to_image: Tensor
    average_precision: Tensor | None = None


@torch.no_grad()
def retrieval_metrics(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall at k, ranks and average precision both ways; arguments as `retrieval_ranks`.

    Returns:
        What `recall_from_ranks` returns.

    Raises:
        ValueError: as `retrieval_ranks` and `recall_from_ranks`.
    """
    ranks = retrieval_ranks(image_embeddings, text_embeddings, image_of_text, chunk)
    return recall_from_ranks(ranks, ks)


def recall_from_ranks(ranks: RetrievalRanks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Summarise ranks under the names of CLIP_benchmark: the name is what is retrieved.

    `text_retrieval_recall@k` is the share of images with at least one own caption among the
    first k texts (any-hit, not the fraction of captions found); `image_retrieval_recall@k` is the
    share of texts with their image among the first k images. `*_median_rank` and `*_mean_rank`
    count from 1; `*_average_precision` is the mean over queries, where all answers were ranked. A
    k beyond the pool means the whole pool: its recall is 1 whatever the model
    does, and a warning is logged that says so.

    Raises:
        ValueError: a k below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"every k must be at least 1, got {list(ks)}")
    metrics: dict[str, float] = {}
    directions = (
        ("text_retrieval", ranks.image_to_text, len(ranks.text_to_image)),
        ("image_retrieval", ranks.text_to_image, len(ranks.image_to_text)),
    )
    for name, tensor, pool in directions:
        values = tensor.cpu().numpy()
        for k in ks:
            if k > pool:
                _logger.warning("%s_recall@%d is 1 by definition: the pool has %d", name, k, pool)
            metrics[f"{name}_recall@{k}"] = float(np.mean(values < k))
        metrics[f"{name}_median_rank"] = float(np.median(values)) + 1
        metrics[f"{name}_mean_rank"] = float(np.mean(values)) + 1
    if ranks.average_precision is not None:
        of_texts = 1 / (ranks.text_to_image.double() + 1)
        metrics["text_retrieval_average_precision"] = float(ranks.average_precision.mean())
        metrics["image_retrieval_average_precision"] = float(of_texts.mean())
    return metrics


@torch.no_grad()
def retrieval_ranks(
    image_embeddings: Tensor, text_embeddings: Tensor, image_of_text: Tensor, chunk: int = 1024
) -> RetrievalRanks:
    """Rank every caption set among the texts and every image among the images.

    Args:
        image_embeddings: (N, d) floating point, of any scale.
        text_embeddings: (M, d) floating point, of any scale.
        image_of_text: (M,) int64, the image that each text describes; any order.
        chunk: Images scored at once. Memory grows with (N + M) * d, never with N * M.

    Raises:
        ValueError: shapes that do not fit, an embedding that is not finite, an image index out
            of range, or an image without a caption.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    _check_rows(image_embeddings, "image_embeddings")
    _check_rows(text_embeddings, "text_embeddings")
    check_width(image_embeddings, text_embeddings)
    images = unit_rows32(image_embeddings)
    texts = unit_rows32(text_embeddings).to(images.device)
    owners = image_of_text.to(images.device)
    if owners.shape != texts.shape[:1]:
        raise ValueError(
            f"image_of_text has shape {tuple(owners.shape)}; it needs one image index for each of "
            f"the {len(texts)} texts"
        )
    check_indices(owners, len(images), "image_of_text")
    captions = torch.bincount(owners.cpu(), minlength=len(images))
    if (captions == 0).any():
        bare = torch.nonzero(captions == 0).flatten().tolist()
        raise ValueError(
            f"{len(bare)} of {len(images)} images have no caption (first: image {bare[0]}); "
            "leave them out, their recall is undefined"
        )
    ranks = pair_ranks(images, texts, owners, chunk, 8 * chunk)
    owners = owners.cpu()
    best = torch.full((len(images),), len(texts)).scatter_reduce_(0, owners, ranks.text, "amin")
    precision = average_precision(ranks.text, owners, len(images))
    return RetrievalRanks(best, ranks.image, precision)


def ranks_from_similarity(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Count the rank of each row's best relevant column; ties go to columns that are not.

    Args:
        similarity: (Q, P) floating point, higher is nearer.
        relevant: (Q, P) bool, at least one per row.

    Returns:
        (Q,) int64: the other columns that score at least as high.

    Raises:
        ValueError: a row without a relevant column, or a score that is NaN.
    """
    check_scores(similarity, relevant)
    best = similarity.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~relevant).sum(dim=1)


def check_scores(similarity: Tensor, relevant: Tensor) -> None:
    """Raise ValueError for a row of (Q, P) without a relevant column, or a score that is NaN."""
    if not relevant.any(dim=1).all():
        raise ValueError("a query has no right answer in the pool; leave it out")
    if similarity.isnan().any():
        # No score is greater than NaN, so a diverged model would rank first everywhere.
        raise ValueError("a similarity is NaN; the model diverged or an input was not finite")


def unit_rows(embeddings: Tensor, name: str) -> Tensor:
    """Return `embeddings` (Q, d) as float64 rows of length 1; a row of zeros stays zero.

    Raises:
        ValueError: not a non-empty matrix, or a value that is not finite.
    """
    _check_rows(embeddings, name)
    return F.normalize(embeddings.double(), dim=1)


def _check_rows(embeddings: Tensor, name: str) -> None:
    if embeddings.ndim != 2 or embeddings.numel() == 0:
        raise ValueError(f"{name} must be a non-empty (rows, d), got {tuple(embeddings.shape)}")
    finite = embeddings.isfinite().all(dim=1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        raise ValueError(
            f"{name} row {row} is not finite; the model diverged or its precision overflowed"
        )


def check_width(images: Tensor, texts: Tensor) -> None:
    """Raise ValueError unless the rows of both have one width."""
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"embeddings of width {images.shape[1]} and {texts.shape[1]} cannot be compared; "
            "take both from one model, after its projections"
        )


def check_indices(indices: Tensor, size: int, name: str) -> None:
    """Raise ValueError unless `indices` holds integers of [0, size)."""
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {indices.dtype}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name} holds {low} to {high}, outside 0 to {size - 1}")
