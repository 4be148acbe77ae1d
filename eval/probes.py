"""Linear probe and nearest neighbours on cached features.

Shape legend: N training pictures, M test pictures, C classes, d width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 5_000  # training pictures up to which logistic regression is solved, not descended
STRENGTHS = tuple(10.0**power for power in range(-4, 2))
STEPS = 500  # of the descent at least, however few the pictures
HELD_OUT = 0.2  # of the training pictures, to choose the strength by
Features = tuple[Tensor, Tensor]


@dataclass
class ProbeScores:
    """Class scores (M, C) of the test pictures, and how they came about, as JSON."""

    scores: Tensor
    details: dict[str, Any] = field(default_factory=dict)


@torch.autocast("cpu", enabled=False)  # a training run evaluates under its own, which rounds
def linear_probe(
    train: Features,
    test: Tensor,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    small: int = SMALL,
) -> ProbeScores:
    """Train a linear classifier on features that are whitened by the training set.

    Up to `small` pictures scikit-learn's logistic regression solves it, above that Adam descends
    in minibatches. The strength is chosen on a fifth of the training pictures, drawn from each
    class by the seed; the test pictures have no part in it. Then all are trained on.

    Args:
        train: features (N, d), labels (N,) int64.
        test: features (M, d).
        classes: C.
        strengths: inverse strengths of regularisation, scikit-learn's C.

    Raises:
        ValueError: fewer than two classes among the labels.
    """
    features, labels = train[0].float(), train[1]
    if len(labels.unique()) < 2:
        raise ValueError("a linear probe needs training pictures of at least two classes")
    mean, std = features.mean(0), features.std(0, correction=0) + 1e-5
    features, test = (features - mean) / std, (test.float() - mean) / std
    solve = _logistic if len(features) <= small else _descend
    held_out = _held_out(labels, seed)
    sweep = {}
    for strength in strengths if len(strengths) > 1 and held_out.any() else ():
        fitted = solve(features[~held_out], labels[~held_out], classes, strength, seed)
        right = fitted(features[held_out]).argmax(1) == labels[held_out]
        sweep[strength] = float(right.double().mean())
    # Of equal ones the more regularised.
    best = max(sweep, key=lambda strength: (sweep[strength], -strength)) if sweep else strengths[0]
    fitted = solve(features, labels, classes, best, seed)
    solver = "logistic regression, lbfgs" if solve is _logistic else "Adam on cached features"
    sweep_out = {f"{strength:g}": accuracy for strength, accuracy in sweep.items()}
    details = {"solver": solver, "C": best, "sweep_on_held_out_train": sweep_out, "seed": seed}
    return ProbeScores(fitted(test), details)


def _held_out(labels: Tensor, seed: int) -> Tensor:
    """(N,) bool: a share of each class, none of classes with one picture."""
    rng = np.random.default_rng(seed)
    marks = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = rng.permutation(torch.nonzero(labels == label).flatten().numpy())
        count = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        marks[torch.from_numpy(rows[:count])] = True
    return marks


def _logistic(features: Tensor, labels: Tensor, classes: int, strength: float, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=200, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.numpy(), labels.numpy())

    def scores(rows: Tensor) -> Tensor:
        found = model.decision_function(rows.numpy())
        if found.ndim == 1:  # of two classes there is one score
            found = np.stack([-found, found], axis=1)
        all_scores = torch.full((len(rows), classes), -torch.inf, dtype=torch.float64)
        all_scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(found).double()
        return all_scores

    return scores


def _descend(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strength: float,
    seed: int,
    batch: int = 1024,
) -> Any:
    """Multinomial regression by Adam; the squared norm counts 1 / (2 C N)."""
    generator = torch.Generator().manual_seed(seed)
    steps_of_epoch = -(-len(features) // batch)
    epochs = max(20, -(-STEPS // steps_of_epoch))
    penalty = 0.5 / (strength * len(features))
    # Evaluations in training run in inference mode, whose tensors gradients cannot pass.
    with torch.inference_mode(False), torch.enable_grad():
        features, labels = features.clone(), labels.clone()
        weight = nn.Parameter(torch.zeros(classes, features.shape[1]))
        bias = nn.Parameter(torch.zeros(classes))
        optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
        steps = epochs * steps_of_epoch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(features), generator=generator).split(batch):
                logits = F.linear(features[rows], weight, bias)
                loss = F.cross_entropy(logits, labels[rows]) + penalty * weight.square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return lambda rows: F.linear(rows, weight, bias).detach()


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def neighbour_scores(
    train: Features, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes (M, C) of the k nearest training pictures by cosine, weighted by exp(cosine / t).

    A k beyond the training pictures means all of them.

    Source: Wu et al., 2018 (arXiv 1805.01978), as DINO and many others use it.

    Raises:
        ValueError: a k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    pool, labels = F.normalize(train[0].double(), dim=1).float(), train[1]
    votes = []
    for rows in F.normalize(test.double(), dim=1).float().split(1024):
        nearness, nearest = (rows @ pool.T).topk(min(k, len(pool)), dim=1)
        weights = (nearness.double() / temperature).exp()
        scores = torch.zeros(len(rows), classes, dtype=torch.float64)
        votes.append(scores.scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)
