"""Classification losses on logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smooth_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels (B,) int64, or soft targets (B, C), to smoothed targets (B, C) float32.

    Smoothing moves this share of the mass to all classes alike.
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, num_classes)
    return labels.float() * (1 - smoothing) + smoothing / num_classes


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets (B, C): 0-D, mean over the batch."""
    logits = _wide(logits)
    return F.cross_entropy(logits, targets.to(logits.dtype))


def sigmoid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy summed over classes, mean over the batch (big_vision, vmoe)."""
    logits = _wide(logits)
    targets = targets.to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return terms.sum(dim=-1).mean()


def _wide(logits: Tensor) -> Tensor:
    """As float32, or as float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
