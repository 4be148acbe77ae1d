"""Zero-shot classification: class vectors from prompts, accuracy from ranks.

A class is the text it is nearest to. Of classes that score the same the one with the smaller index
ranks first, which is what `argmax` answers, so accuracy and confusion matrix agree.

Shape legend: N images, C classes, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.retrieval import check_scores, check_width, unit_rows

TIE_RULE = "index"  # as records call it


@torch.no_grad()
def class_vectors(
    encode_text: Callable[[list[str]], Tensor],
    prompts: Sequence[Sequence[str]],
    batch_size: int = 256,
) -> Tensor:
    """Average each class's prompt embeddings into one unit vector.

    Every prompt embedding is normalised before the mean, or long embeddings would outvote short
    ones, and the mean is normalised again, or classes with agreeing prompts would win.

    Args:
        encode_text: Maps a list of B strings to (B, d) floating-point embeddings of any scale.
        prompts: C lists of prompts, as `class_prompts` returns them.
        batch_size: Prompts encoded at once, across class borders.

    Returns:
        (C, d) float32 on the device of the embeddings.

    Raises:
        ValueError: no class, a class without a prompt, a batch size below 1, or an embedding that
            is not finite.

    Source: big_vision `discriminative_classifier.py`, CLIP_benchmark `zeroshot_classification.py`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for index, texts in enumerate(prompts):
        if not texts:
            raise ValueError(f"class {index} has no prompt; give every class at least one")
    flat = [text for texts in prompts for text in texts]
    owner = torch.tensor([i for i, texts in enumerate(prompts) for _ in texts])
    sums: Tensor | None = None
    device = torch.device("cpu")
    for start in range(0, len(flat), batch_size):
        part = slice(start, start + batch_size)
        embeddings = encode_text(flat[part])
        device = embeddings.device
        # On the CPU index_add_ adds in order: the same vectors whatever the device or batch size.
        rows = unit_rows(embeddings, "text embeddings").cpu()
        if sums is None:
            sums = rows.new_zeros(len(prompts), rows.shape[1])
        sums.index_add_(0, owner[part], rows)
    if sums is None:
        raise ValueError("no classes; pass the prompts of at least one")
    # A sum and a mean have the same direction.
    return F.normalize(sums, dim=1).float().to(device)


@torch.no_grad()
def class_scores(image_embeddings: Tensor, vectors: Tensor, chunk: int = 4096) -> Tensor:
    """Cosine of each image with each class.

    The logit scale and bias are left out: they change no rank.

    Args:
        image_embeddings: (N, d) floating point, of any scale.
        vectors: (C, d) from `class_vectors`, on the same device.
        chunk: Images scored at once; they are copied in float64.

    Returns:
        (N, C) float32.

    Raises:
        ValueError: widths that differ, no row, or an embedding that is not finite.
    """
    pool = unit_rows(vectors, "class vectors")
    check_width(image_embeddings, pool)
    # Matrix kernels add up edge tiles in another order, so float32 products of equal rows can
    # differ in the last bit and break ties at random. Rounding a float64 product removes that,
    # and TF32 and autocast do not touch float64.
    parts = image_embeddings.split(chunk)
    return torch.cat([(unit_rows(part, "images") @ pool.T).float() for part in parts])


def class_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Count the rank of each row's best right class; ties go to the smaller index.

    Args:
        scores: (N, C) floating point, higher is nearer.
        right: (N, C) bool, at least one per row.

    Returns:
        (N,) int64: the classes that score higher, plus those before it that score the same.

    Raises:
        ValueError: a row without a right class, or a score that is NaN.
    """
    check_scores(scores, right)
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    index = ((scores == best) & right).int().argmax(dim=1, keepdim=True)
    columns = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > best) | ((scores == best) & (columns < index))
    return ahead.sum(dim=1)


def accuracy_from_ranks(
    ranks: Tensor, labels: Tensor, num_classes: int, topk: Sequence[int] = (1, 5)
) -> dict[str, float | None]:
    """Summarise ranks under the names of CLIP_benchmark.

    Args:
        ranks: (N,) int64 from `class_ranks`.
        labels: (N,) int64.
        num_classes: C.
        topk: The k of the accuracies.

    Returns:
        `acc{k}` for every k, the share of samples whose class is in the top k, None where there
        are fewer than k classes; and `mean_per_class_recall`, the top-1 recall averaged over the
        classes that occur in `labels`.

    Raises:
        ValueError: a k below 1.
    """
    if any(k < 1 for k in topk):
        raise ValueError(f"every k must be at least 1, got {list(topk)}")
    ranks, labels = ranks.cpu(), labels.cpu()
    metrics: dict[str, float | None] = {
        f"acc{k}": (ranks < k).double().mean().item() if k <= num_classes else None for k in topk
    }
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[ranks < 1], minlength=num_classes)
    present = total > 0
    metrics["mean_per_class_recall"] = (right[present] / total[present].double()).mean().item()
    return metrics
