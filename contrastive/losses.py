"""Contrastive losses on features; pure functions, float32 inside.

Shape legend: b pairs of this process, B pairs of all processes, D embedding width. `offset` is
the place of this process's first pair among all B, so the positives of row i are column
offset + i. The mean of these losses over processes is the loss of the global batch.

`groups` (b,) and `all_groups` (B,) are optional int64 marks: pairs with equal marks show the same
thing and are not treated as negatives of each other. Positives stay the pairs themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize_features(features: Tensor) -> Tensor:
    """Unit rows in float32 (float64 stays), whatever the compute precision was."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def clip_loss(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    offset: int = 0,
    groups: Tensor | None = None,
    all_groups: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over the batch, mean of both directions (Radford et al., 2021).

    Args:
        image, text: unit rows (b, D) of this process.
        all_image, all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated.

    Returns:
        0-D loss, the mean over the b rows of this process.
    """
    targets = torch.arange(len(image), device=image.device) + offset
    excluded = _same_group(groups, all_groups, targets)
    by_image = _mask(logit_scale * image @ all_text.T, excluded, -torch.inf)
    by_text = _mask(logit_scale * text @ all_image.T, excluded, -torch.inf)
    return (F.cross_entropy(by_image, targets) + F.cross_entropy(by_text, targets)) / 2


def siglip_loss(
    image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int = 0,
    groups: Tensor | None = None,
    all_groups: Tensor | None = None,
) -> Tensor:
    """Sigmoid loss over all pairs, summed over texts, mean over images (Zhai et al., 2023).

    Args:
        image: unit rows (b, D) of this process; all_text: unit rows (B, D) of all processes.
        logit_scale: 0-D, already exponentiated; logit_bias: 0-D.
    """
    targets = torch.arange(len(image), device=image.device) + offset
    logits = logit_scale * image @ all_text.T + logit_bias
    signs = -torch.ones_like(logits)
    signs[torch.arange(len(image), device=image.device), targets] = 1
    terms = _mask(F.logsigmoid(signs * logits), _same_group(groups, all_groups, targets), 0.0)
    return -terms.sum(dim=1).mean()


def _same_group(groups: Tensor | None, all_groups: Tensor | None, targets: Tensor) -> Tensor | None:
    """(b, B) bool: pairs to leave out, because they share a mark without being the own pair."""
    if groups is None or all_groups is None:
        return None
    same = groups[:, None] == all_groups[None, :]
    same[torch.arange(len(targets), device=targets.device), targets] = False
    return same


def _mask(values: Tensor, excluded: Tensor | None, fill: float) -> Tensor:
    return values if excluded is None else values.masked_fill(excluded, fill)
