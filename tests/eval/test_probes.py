"""Probes: both solvers, what they are chosen by, and the votes of neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.few_shot import L2_GRID, few_shot_hits
from eval.probes import linear_probe, neighbour_scores
from eval.tasks import FewShotOutcomes, ProbeOptions, settle_few_shot

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fewshot_probe.npz")


def clusters(count: int, seed: int, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """Points around three corners; labels 0, 2 and 3 of 5 classes."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 2, 3])[torch.arange(count) % 3]
    corners = torch.zeros(5, 6).index_fill_(0, torch.tensor([1, 4]), 9.0)
    corners[[0, 2, 3], [0, 1, 2]] = 1.0
    return corners[labels] + spread * torch.randn(count, 6, generator=rng), labels


@pytest.mark.parametrize("small", [0, 1000])
def test_both_solvers_separate_what_is_separable_also_within_training(small: int) -> None:
    train, (test, truth) = clusters(90, 0, 0.1), clusters(30, 1, 0.1)
    with torch.inference_mode():  # as the training loop evaluates
        probe = linear_probe((train[0] + 0, train[1] + 0), test, 5, small=small)
    assert (probe.scores.argmax(1) == truth).all()
    assert ("lbfgs" in probe.details["solver"]) == (small == 1000)


def test_both_solvers_agree_on_what_is_hard() -> None:
    train, (test, truth) = clusters(300, 0, 0.8), clusters(300, 1, 0.8)
    found = [linear_probe(train, test, 5, (0.1,), small=small).scores for small in (0, 1000)]
    right = [(scores.argmax(1) == truth).double().mean().item() for scores in found]
    assert 0.6 < right[0] < 0.95
    assert right[0] == pytest.approx(right[1], abs=0.02)
    # Classes without a picture come last: there is nothing to score them by.
    assert found[1][:, [1, 4]].isneginf().all()


def test_the_strength_is_chosen_without_the_test_pictures() -> None:
    train, (test, _) = clusters(60, 0, 0.8), clusters(30, 1)
    details = [linear_probe(train, pictures, 5).details for pictures in (test, -test)]
    assert details[0] == details[1]
    assert len(details[0]["sweep_on_held_out_train"]) > 1


def test_neighbours_vote_by_their_nearness() -> None:
    train, (test, _) = clusters(40, 0), clusters(10, 1)
    scores = neighbour_scores(train, test, 5, k=7, temperature=0.5)
    a, b = (rows.double().numpy() for rows in (train[0], test))
    cosine = (b @ a.T) / np.linalg.norm(b, axis=1)[:, None] / np.linalg.norm(a, axis=1)
    for row, own in zip(scores, cosine, strict=True):
        nearest = np.argsort(-own)[:7]
        for label in range(5):
            votes = sum(np.exp(own[i] / 0.5) for i in nearest if train[1][i] == label)
            assert row[label].item() == pytest.approx(votes, rel=1e-6)
    everybody = neighbour_scores(train, test, 5, k=1000)
    assert torch.equal(everybody, neighbour_scores(train, test, 5, k=40))


def test_one_strength_for_all_sets_by_the_rule_of_the_paper() -> None:
    found = []
    for name, seed in (("ds0", 0), ("ds1", 3)):
        parts = [GOLDEN[f"{name}/{split}_{kind}"] for split in ("train", "test")
                 for kind in ("features", "labels")]  # fmt: skip
        rows = [torch.from_numpy(part) for part in parts]
        train, test = (rows[0], rows[1].long()), (rows[2], rows[3].long())
        hits = {
            shots: few_shot_hits(train, test, int(train[1].max()) + 1, shots, seed, L2_GRID)[None]
            for shots in GOLDEN["shots"].tolist()
        }
        found.append(FewShotOutcomes(hits, {shots: [] for shots in hits}))
    options = ProbeOptions(GOLDEN["shots"].tolist(), (0,), L2_GRID)
    for measured in settle_few_shot(found, options):
        chosen = [measured.details[f"{shots}shot"]["l2"] for shots in options.shots]
        assert chosen == GOLDEN["f64/best_l2_stable_sort"].tolist()


def test_a_set_alone_would_choose_otherwise() -> None:
    accuracies = ([1.0, 0.5, 0.0], [0.0, 0.75, 0.25])  # of three strengths
    found = [
        FewShotOutcomes({10: np.array([[np.arange(4) < 4 * own for own in row]])}, {10: []})
        for row in accuracies
    ]
    options = ProbeOptions((10,), (0,), (1.0, 2.0, 3.0))

    def chosen(sets: list[FewShotOutcomes]) -> list[float]:
        return [measured.details["10shot"]["l2"] for measured in settle_few_shot(sets, options)]

    assert chosen(found[:1]) + chosen(found[1:]) == [1.0, 2.0]
    assert chosen(found) == [2.0, 2.0]
    assert [m.metrics["10shot_acc1"] for m in settle_few_shot(found, options)] == [0.5, 0.75]
