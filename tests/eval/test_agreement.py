"""Our figures equal those of the usual tools, on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.exact_ranks import pair_ranks, unit_rows32
from eval.few_shot import (
    L2_GRID,
    best_l2,
    few_shot_hits,
    few_shot_rows,
    ridge_scores,
)
from eval.label_metrics import measure_labels, measure_multilabel
from eval.retrieval import retrieval_metrics, retrieval_ranks

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "fewshot_probe.npz")
NO_PEER = "make peers installs clip-benchmark, whose own requirements do not fit"


def golden_set(name: str) -> list[torch.Tensor]:
    keys = ("train_features", "train_labels", "test_features", "test_labels")
    found = [torch.from_numpy(GOLDEN[f"{name}/{key}"]) for key in keys]
    return [rows.long() if not rows.is_floating_point() else rows for rows in found]


@pytest.mark.parametrize(("name", "seed"), [("ds0", 0), ("ds1", 3)])
def test_few_shot_equals_the_papers_code(name: str, seed: int) -> None:
    train, labels, test, truth = golden_set(name)
    for number, shots in enumerate(GOLDEN["shots"].tolist()):
        rows = few_shot_rows(labels, shots, seed)
        assert rows.tolist() == GOLDEN[f"{name}/indices_{shots}shot"].tolist()
        classes = int(labels.max()) + 1
        hits = few_shot_hits((train, labels), (test, truth), classes, shots, seed, L2_GRID)
        np.testing.assert_array_equal(hits.mean(1), GOLDEN[f"f64/{name}/accuracy"][number])


def test_the_best_strength_is_the_papers() -> None:
    for number, expected in enumerate(GOLDEN["f64/best_l2_stable_sort"]):
        found = np.stack([GOLDEN[f"f64/{name}/accuracy"][number] for name in ("ds0", "ds1")])
        assert L2_GRID[best_l2(found)] == expected


@pytest.mark.parametrize("count", [7, 60])
def test_ridge_equals_a_direct_solve_for_few_and_for_many_pictures(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    train, test = torch.randn(count, 20, generator=rng), torch.randn(5, 20, generator=rng)
    labels = torch.arange(count) % 3
    (scores,) = ridge_scores(train, labels, test, 3, [3.0])
    x, y = train.double().numpy(), 2 * np.eye(3)[labels.numpy()] - 1
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.column_stack([(x - mean) / std, np.full(count, 100.0)])
    z = np.column_stack([(test.double().numpy() - mean) / std, np.full(5, 100.0)])
    direct = z @ np.linalg.solve(x.T @ x + 3 * np.eye(21), x.T @ y)
    np.testing.assert_allclose(scores.numpy(), direct, rtol=1e-7, atol=1e-8)


def retrieval_case(images: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 8, (images,), generator=rng)
    owner = torch.repeat_interleave(torch.arange(images), counts)
    image = torch.randn(images, 16, generator=rng)
    return image, image[owner] + 2 * torch.randn(len(owner), 16, generator=rng), owner


def test_retrieval_equals_clip_benchmark() -> None:
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=NO_PEER)
    image, text, owner = retrieval_case()

    class Model:
        encode_image = staticmethod(lambda rows: rows)
        encode_text = staticmethod(lambda rows: rows)

    groups = [text[owner == i] for i in range(len(image))]
    loader = [(image[i : i + 8], groups[i : i + 8]) for i in range(0, len(image), 8)]
    expected = peer.evaluate(Model(), loader, torch.stack, "cpu", amp=False,
                             recall_k_list=[1, 5, 10])  # fmt: skip
    ours = retrieval_metrics(image, torch.cat(groups), owner)
    assert 0.05 < ours["image_retrieval_recall@5"] < 0.95
    assert {name: pytest.approx(ours[name], abs=1e-6) for name in expected} == expected


def test_retrieval_equals_torchmetrics_and_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score
    from torchmetrics.retrieval import RetrievalHitRate

    image, text, owner = retrieval_case(12)
    scores = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text).T
    relevant = owner == torch.arange(len(image))[:, None]
    metrics = retrieval_metrics(image, text, owner)
    for name, s, r in (("text", scores, relevant), ("image", scores.T, relevant.T)):
        queries = torch.arange(len(s))[:, None].expand_as(s).flatten()
        for k in (1, 5, 10):
            peer = RetrievalHitRate(top_k=k)
            expected = peer(s.flatten(), r.flatten(), indexes=queries)
            assert metrics[f"{name}_retrieval_recall@{k}"] == pytest.approx(float(expected))
        expected = [average_precision_score(own, row) for own, row in zip(r, s, strict=True)]
        assert metrics[f"{name}_retrieval_average_precision"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("tile", [(7, 11), (64, 500)])
def test_close_scores_are_decided_in_float64(tile: tuple[int, int]) -> None:
    """Rows that differ by less than a float32 product can tell, many of them equal."""
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(1, 64, generator=rng)
    image = base + 1e-5 * torch.randn(40, 64, generator=rng)
    image[10:20] = image[5]
    owner = torch.arange(120) // 3
    text = base + 1e-5 * torch.randn(120, 64, generator=rng)
    text[30:50] = text[3]
    image, text = unit_rows32(image), unit_rows32(text)
    ranks = pair_ranks(image, text, owner, *tile)
    exact = (image.double()[:, None] * text.double()[None]).sum(2).float().numpy()
    for j, i in enumerate(owner.tolist()):
        row, column, own = exact[i], exact[:, j], exact[i, j]
        wrong = owner.numpy() != i
        ties = (row[wrong] == own).sum() + (row[:j][~wrong[:j]] == own).sum()
        assert ranks.text[j] == (row > own).sum() + ties
        assert ranks.image[j] == (column >= own).sum() - 1


def test_memory_does_not_grow_with_the_product_of_both_sides() -> None:
    """9,000 x 9,000 scores would be 324 MB; no tensor is larger than a tile."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(9_000, 4, generator=rng)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        retrieval_ranks(image, image, torch.arange(9_000))
    assert largest <= 1024 * 8192 * 8


def test_classification_equals_clip_benchmark_and_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (300,), generator=rng)
    labels[labels == 4] = 5  # a class that does not occur
    scores = torch.randn(300, 9, generator=rng)
    scores[torch.arange(300), labels] += 1.5
    measured = measure_labels(scores, labels, [str(i) for i in range(9)])
    predicted = scores.argmax(1)
    recall = balanced_accuracy_score(labels, predicted)
    assert measured.metrics["mean_per_class_recall"] == pytest.approx(recall)
    matrix = confusion_matrix(labels, predicted, labels=range(9))
    assert measured.details["confusion_matrix"] == matrix.tolist()
    low, high = measured.ci95["acc1"]
    assert low < measured.metrics["acc1"] < high
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason=NO_PEER)
    # Its `accuracy` turns arrays of one element into floats, which numpy has given up.
    top5 = [float(t in row) for t, row in zip(labels, scores.topk(5).indices, strict=True)]
    assert measured.metrics["acc5"] == pytest.approx(np.mean(top5))
    sets = torch.stack([labels, torch.where(labels == 0, -1, 0)], 1)
    truth = torch.zeros(300, 9).scatter_(1, labels[:, None], 1)
    truth[:, 0] = 1
    expected = float(peer.average_precision_per_class(scores, truth).mean())
    ours = measure_multilabel(scores, sets, [str(i) for i in range(9)])
    assert ours.metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)


def test_any_of_several_labels_is_right_and_none_is_left_out() -> None:
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 1, 1]])
    labels = torch.tensor([[2, 0], [1, 2], [-1, -1], [1, -1]])
    measured = measure_labels(scores, labels, ["a", "b", "c"], topk=(1, 2, 5))
    assert measured.metrics == {"acc1": 1 / 3, "acc2": 1.0, "acc5": None}
    assert measured.details["n_without_label"] == 1
