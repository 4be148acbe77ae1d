"""Few-shot linear probe: ridge regression in closed form on the features of a few pictures.

The protocol of the Soft MoE paper's "10-shot" figures: a few pictures of every class, features
whitened with the statistics of those pictures alone, a constant feature of 100 as bias, one-hot
targets of -1 and +1. One decomposition serves all strengths of regularisation.

Source: google-research/vmoe `evaluate/fewshot.py`, google-research/big_vision
`evaluators/fewshot_lsr.py`.

Shape legend: N training pictures, M test pictures, C classes, d width, S shots per class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BIAS = 100.0
L2_DEFAULT = (1024.0,)
L2_GRID = tuple(2.0**power for power in range(-10, 20))


def few_shot_rows(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of the first `shots` of a permutation of each class, classes in order.

    Rows of fewer shots are among those of more.

    Args:
        labels: (N,) int64.
        shots: per class; a class with fewer gives all that it has.
        seed: of the permutations.

    Returns:
        (at most C * S,) int64.
    """
    rng = np.random.default_rng(seed)
    values = labels.numpy()
    chosen = [
        rng.permutation(np.flatnonzero(values == label))[:shots] for label in np.unique(values)
    ]
    return torch.from_numpy(np.concatenate(chosen))


@torch.no_grad()
def ridge_scores(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    classes: int,
    l2s: Sequence[float] = L2_DEFAULT,
) -> list[Tensor]:
    """Class scores of ridge regression for every strength, in float64.

    Args:
        train_features: (N, d), the few pictures.
        train_labels: (N,) int64 in [0, C).
        test_features: (M, d).
        classes: C.
        l2s: weights of the squared norm.

    Returns:
        One (M, C) float64 for each of `l2s`.

    Raises:
        ValueError: a strength that is not above 0.
    """
    if min(l2s) <= 0:
        raise ValueError(f"every l2 must be above 0, got {list(l2s)}")
    train, test = train_features.double(), test_features.double()
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    train = F.pad((train - mean) / std, (0, 1), value=BIAS)
    test = F.pad((test - mean) / std, (0, 1), value=BIAS)
    targets = 2 * F.one_hot(train_labels, classes).double() - 1
    wide = train.shape[0] < train.shape[1]
    # The smaller of X X' and X' X has the same nonzero eigenvalues.
    values, vectors = torch.linalg.eigh(train @ train.T if wide else train.T @ train)
    right = vectors.T @ (targets if wide else train.T @ targets)
    left = (test @ train.T if wide else test) @ vectors
    return [left @ (right / (values + l2)[:, None]) for l2 in l2s]


def few_shot_hits(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    shots: int,
    seed: int = 0,
    l2s: Sequence[float] = L2_DEFAULT,
) -> NDArray[np.bool_]:
    """Which test pictures each strength of regularisation gets right.

    Args:
        train: features (N, d) and labels (N,) int64.
        test: features (M, d) and labels (M,) int64.
        classes: C.
        shots: pictures of each class.
        seed: of the choice of pictures.
        l2s: strengths.

    Returns:
        (strengths, M) bool.
    """
    rows = few_shot_rows(train[1], shots, seed)
    scores = ridge_scores(train[0][rows], train[1][rows], test[0], classes, l2s)
    return np.stack([(score.argmax(1) == test[1]).numpy() for score in scores])


def best_l2(accuracies: NDArray[np.float64]) -> int:
    """Index of the strength with the best mean rank over data sets, for one number of shots.

    This is the rule of the reference; it looks at the accuracies of the evaluation sets. Equal
    accuracies rank by the index of their strength, which a stable sort makes sure of.

    Args:
        accuracies: (data sets, strengths).
    """
    ranks = accuracies.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return int(ranks.mean(0).argmax())


def sparse_classes(labels: Tensor, classes: int, shots: int) -> list[int]:
    """Classes with fewer than `shots` pictures."""
    return torch.nonzero(torch.bincount(labels, minlength=classes) < shots).flatten().tolist()
