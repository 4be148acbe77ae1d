"""Contrastive losses on features in their plain form, the definition of the tiled form.

Shape legend: b pairs of this process, B pairs of all processes, D embedding width. `offset` is
the place of this process's first pair among all B, so the own column of row i is offset + i. The
mean of these losses over processes is the loss of the global batch. All (b, B) logits are kept for
backward; `contrastive.tiled_losses` computes the same without.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastive.targets import Targets

SMALLEST_NORM = 1e-12  # F.normalize's


def normalize_features(features: Tensor) -> Tensor:
    """Unit rows in float32 (float64 stays), whatever the compute precision was.

    A row of zeros, or of a norm below 1e-12, has no direction: it becomes zero and its gradient is
    zero. `F.normalize` would hand on gradients of order 1e12.
    """
    wide = widen(features)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / norm.masked_fill(norm < SMALLEST_NORM, torch.inf)


def widen(tensor: Tensor) -> Tensor:
    """A tensor of any shape in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_features(image: Tensor, text: Tensor) -> None:
    """Look for NaN and infinity in features (b, D), which waits for the device.

    Raises:
        ValueError: names the side and the first bad row of this process's batch.
    """
    for side, features in (("image", image), ("text", text)):
        bad = ~features.isfinite().all(dim=1)
        if bad.any():
            first, count = int(bad.int().argmax()), int(bad.sum())
            raise ValueError(
                f"{side} features are not finite in {count} of {len(bad)} rows, first in row"
                f" {first} of this process's batch: look at that sample and at the {side} tower"
            )


def clip_loss(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    offset: int = 0,
    targets: Targets | None = None,
) -> Tensor:
    """Softmax cross-entropy over the batch, mean of both directions (Radford et al., 2021).

    Args:
        image: unit rows (b, D) of this process.
        text: unit rows (b, D) of this process.
        all_image: unit rows (B, D) of all processes.
        all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated.
        offset: own column of the first row.
        targets: options; None is the own pair alone.

    Returns:
        0-D loss, the mean over the b rows of this process; float32, or float64 for such features.
    """
    targets = targets or Targets()
    teacher = targets.teacher
    to_text = to_image = None
    if teacher is not None:
        to_text = (teacher.logit_scale * teacher.image @ teacher.all_text.T).softmax(dim=1)
        to_image = (teacher.logit_scale * teacher.text @ teacher.all_image.T).softmax(dim=1)
    by_image = _cross_entropy(image, all_text, logit_scale, offset, targets, to_text)
    by_text = _cross_entropy(text, all_image, logit_scale, offset, targets, to_image)
    return (by_image + by_text) / 2


def _cross_entropy(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    offset: int,
    targets: Targets,
    wanted: Tensor | None,
) -> Tensor:
    logits = scale * widen(rows) @ widen(columns).T
    positive, excluded = _pairs(logits, offset, targets)
    if wanted is None:
        share, kept = targets.label_smoothing, (~excluded).to(logits.dtype)
        wanted = (1 - share) * positive / positive.sum(dim=1, keepdim=True)
        wanted = wanted + share * kept / kept.sum(dim=1, keepdim=True)
    # Not lse - logits: those differ by little where rows match well.
    likely = logits.masked_fill(excluded, -torch.inf).log_softmax(dim=1).masked_fill(excluded, 0.0)
    return -_mean((wanted * likely).sum(dim=1), targets)


def siglip_loss(
    image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int = 0,
    targets: Targets | None = None,
) -> Tensor:
    """Sigmoid loss over all pairs, summed over texts, mean over images (Zhai et al., 2023).

    Args:
        image: unit rows (b, D) of this process.
        all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated.
        logit_bias: 0-D.
        offset: own column of the first row.
        targets: options; None is the own pair alone.

    Returns:
        0-D, of this process's rows.
    """
    targets = targets or Targets()
    logits = logit_scale * widen(image) @ widen(all_text).T + logit_bias
    positive, excluded = _pairs(logits, offset, targets)
    wanted = (1 - targets.label_smoothing) * positive + targets.label_smoothing / 2
    if (teacher := targets.teacher) is not None:
        similar = teacher.logit_scale * teacher.image @ teacher.all_text.T
        wanted = (similar + teacher.logit_bias).sigmoid()
    terms = wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits)
    return -_mean(terms.masked_fill(excluded, 0.0).sum(dim=1), targets)


def _pairs(logits: Tensor, offset: int, targets: Targets) -> tuple[Tensor, Tensor]:
    """(b, B) positive pairs, one in the precision of logits, and bool pairs that are left out."""
    own = torch.zeros_like(logits, dtype=torch.bool)
    own.diagonal(offset)[: len(logits)] = True
    alike = own
    if targets.groups is not None and targets.all_groups is not None:
        alike = targets.groups[:, None] == targets.all_groups[None, :]
    positive = alike if targets.spreads else own
    return positive.to(logits.dtype), alike & ~positive


def _mean(terms: Tensor, targets: Targets) -> Tensor:
    return (terms if targets.weights is None else terms * targets.weights).mean()
