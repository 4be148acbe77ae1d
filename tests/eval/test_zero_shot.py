"""Zero-shot classification: goldens, prompts of unequal length, ties, small class counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.embedding import EmbeddedSet
from eval.label_metrics import label_ranks, measure_labels
from eval.measurement import Measurement
from eval.prompts import class_prompts
from eval.tasks import measure_zero_shot
from eval.zero_shot import accuracy_from_ranks, class_scores, class_vectors

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "zeroshot_classifier.npz")
IMAGES = torch.from_numpy(GOLDEN["image_embeddings"])
LABELS = torch.from_numpy(GOLDEN["labels"]).long()


def lookup(table: dict[str, list[float]], text: list[str]) -> Tensor:
    return torch.tensor([table[t] for t in text])


def golden_text(texts: list[str]) -> Tensor:
    """Embeddings of the prompts "template class"."""
    embeddings = torch.from_numpy(GOLDEN["prompt_embeddings"])
    keys = [tuple(map(int, text.split())) for text in texts]
    return torch.stack([embeddings[c, t] for t, c in keys])


def golden_prompts() -> tuple[list[list[str]], list[str]]:
    """Prompts and class names."""
    classes, templates, _ = GOLDEN["prompt_embeddings"].shape
    names = [str(c) for c in range(classes)]
    return class_prompts(names, [f"{t} {{}}" for t in range(templates)]), names


def golden_vectors(batch_size: int = 256) -> Tensor:
    return class_vectors(golden_text, golden_prompts()[0], batch_size)


def embedded(images: Tensor, labels: Tensor) -> EmbeddedSet:
    numbers = list(range(len(images)))
    none = torch.empty(0, dtype=torch.int64)
    keys = list(map(str, numbers))
    return EmbeddedSet({"image": images}, labels[:, None], none, [], keys, numbers, keys)


def measure(images: Tensor, labels: Tensor, vectors: Tensor) -> Measurement:
    """Zero-shot figures where each class has one prompt, its number."""
    names = [str(number) for number in range(len(vectors))]

    def encode_text(texts: list[str]) -> Tensor:
        return vectors[list(map(int, texts))]

    return measure_zero_shot(embedded(images, labels), encode_text, [[n] for n in names], names)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_class_vectors_equal_big_vision_and_clip_benchmark(batch_size: int) -> None:
    vectors = golden_vectors(batch_size)
    assert vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors, GOLDEN["big_vision/class_vectors"], atol=1e-6)
    np.testing.assert_allclose(vectors.T, GOLDEN["clip_benchmark/classifier"], atol=1e-6)
    assert torch.equal(vectors, golden_vectors())


def test_accuracy_equals_the_references() -> None:
    prompts, names = golden_prompts()
    measured = measure_zero_shot(embedded(IMAGES, LABELS), golden_text, prompts, names)
    top1, top3 = GOLDEN["clip_benchmark/accuracy_top1_top3"].tolist()
    assert measured.metrics["acc1"] == pytest.approx(top1)
    assert measured.metrics["acc1"] == pytest.approx(GOLDEN["big_vision/accuracy"].item())
    predictions = torch.from_numpy(GOLDEN["big_vision/predictions"])
    np.testing.assert_array_equal(measured.samples["acc1"], predictions == LABELS)
    scores = class_scores(IMAGES, golden_vectors())
    others = measure_labels(scores, LABELS, names, topk=(1, 3, 5, 6)).metrics
    assert others["acc3"] == pytest.approx(top3)
    assert others["acc6"] == 1.0
    assert {name: others[name] for name in measured.metrics} == measured.metrics


def test_prompts_of_unequal_length_vote_equally() -> None:
    table = {"a": [100.0, 0.0], "b": [0.0, 1.0], "c": [-0.1, 0.0]}
    vectors = class_vectors(lambda text: lookup(table, text), [["a", "b"], ["c"], ["a", "b", "b"]])
    expected = [[0.5**0.5, 0.5**0.5], [-1.0, 0.0], [0.2**0.5, 0.8**0.5]]
    np.testing.assert_allclose(vectors, expected, atol=1e-7)


def test_all_aliases_share_one_mean() -> None:
    table = {"tench": [1.0, 0.0], "tinca": [0.0, 9.0], "cat": [-1.0, 1.0]}
    prompts = class_prompts(["tench, tinca", "cat"], ["{}"], aliases="all")
    vectors = class_vectors(lambda text: lookup(table, text), prompts)
    np.testing.assert_allclose(vectors, [[0.5**0.5] * 2, [-(0.5**0.5), 0.5**0.5]], atol=1e-7)


def test_class_vectors_refuse_gaps_and_nan() -> None:
    def encode_text(texts: list[str]) -> Tensor:
        return torch.full((len(texts), 2), torch.nan)

    with pytest.raises(ValueError, match="class 1 has no prompt"):
        class_vectors(encode_text, [["a"], []])
    with pytest.raises(ValueError, match="no classes"):
        class_vectors(encode_text, [])
    with pytest.raises(ValueError, match="row 0 is not finite"):
        class_vectors(encode_text, [["a"]])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        class_vectors(encode_text, [["a"]], batch_size=0)


def test_class_vectors_carry_no_gradient() -> None:
    weight = torch.randn(2, 2, requires_grad=True)
    assert not class_vectors(lambda text: weight[: len(text)], [["a"], ["b"]]).requires_grad


def test_equal_class_vectors_rank_by_index() -> None:
    vector = torch.randn(37, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat(7)
    scores = class_scores(vector.expand(70, -1), vector.expand(10, -1), chunk=9)
    assert torch.equal(label_ranks(scores, labels[:, None]), labels)
    metrics = measure(vector.expand(70, -1), labels, vector.expand(10, -1)).metrics
    assert metrics == pytest.approx({"acc1": 0.1, "acc5": 0.5, "mean_per_class_recall": 0.1})


@pytest.mark.parametrize(("classes", "acc5"), [(4, None), (5, 1.0)])
def test_acc5_needs_five_classes(classes: int, acc5: float | None) -> None:
    metrics = measure(torch.eye(classes), torch.arange(classes), torch.eye(classes)).metrics
    assert metrics == {"acc1": 1.0, "acc5": acc5, "mean_per_class_recall": 1.0}


def test_mean_per_class_recall_skips_absent_classes() -> None:
    images = torch.eye(4)[[0, 0, 0, 1, 1, 3]]
    labels = torch.tensor([0, 0, 0, 0, 1, 1])  # class 0: 3 of 4; class 1: 1 of 2; 2 and 3 absent
    metrics = measure(images, labels, torch.eye(4)).metrics
    assert metrics["acc1"] == pytest.approx(4 / 6)
    assert metrics["mean_per_class_recall"] == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_ranks_do_not_depend_on_chunk_or_scale() -> None:
    vectors = golden_vectors()
    lengths = torch.linspace(0.01, 50, len(IMAGES))[:, None]

    def ranks(images: Tensor, chunk: int) -> Tensor:
        return label_ranks(class_scores(images, vectors, chunk), LABELS[:, None])

    whole = ranks(IMAGES, len(IMAGES))
    for chunk in (1, 7, 30):
        assert torch.equal(ranks(IMAGES, chunk), whole)
        assert torch.equal(ranks(IMAGES * lengths, chunk), whole)


def test_bad_labels_and_embeddings_are_refused() -> None:
    vectors = golden_vectors()
    with pytest.raises(ValueError, match="a sample has label 6, but there are 6 class names"):
        measure(IMAGES, torch.where(LABELS == 5, 6, LABELS), vectors)
    with pytest.raises(ValueError, match="a sample has no label"):
        measure(IMAGES, torch.where(LABELS == 5, -1, LABELS), vectors)
    with pytest.raises(ValueError, match=f"{len(LABELS) - 1} labels do not belong to the scores"):
        measure(IMAGES, LABELS[:-1], vectors)
    with pytest.raises(ValueError, match="images row 0 is not finite"):
        measure(IMAGES * torch.nan, LABELS, vectors)
    with pytest.raises(ValueError, match="cannot be compared"):
        measure(IMAGES[:, 1:], LABELS, vectors)
    with pytest.raises(ValueError, match="k must be at least 1"):
        accuracy_from_ranks(torch.zeros(2, dtype=torch.int64), torch.arange(2), 2, topk=(0,))
