"""Retrieval: goldens of two public implementations, hand-worked ranks, ties and bad inputs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.retrieval import (
    RetrievalRanks,
    ranks_from_similarity,
    recall_from_ranks,
    retrieval_metrics,
    retrieval_ranks,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "retrieval.npz")
DIRECTIONS = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}


def from_similarity(similarity: Tensor, owner: Tensor) -> RetrievalRanks:
    own = owner == torch.arange(len(similarity))[:, None]
    return RetrievalRanks(
        ranks_from_similarity(similarity, own), ranks_from_similarity(similarity.T, own.T)
    )


def recalls(metrics: dict[str, float], direction: str, ks: tuple[int, ...]) -> list[float]:
    return [metrics[f"{DIRECTIONS[direction]}_recall@{k}"] for k in ks]


def random_case(seed: int = 0, images: int = 21, width: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """1 to 7 captions per image, in shuffled order, near enough to their image to be found."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 8, (images,), generator=rng)
    owner = torch.repeat_interleave(torch.arange(images), counts)
    owner = owner[torch.randperm(len(owner), generator=rng)]
    image = torch.randn(images, width, generator=rng)
    text = image[owner] + 1.5 * torch.randn(len(owner), width, generator=rng)
    return image * 3, text * 7, owner


@pytest.mark.parametrize("case", ["five_captions", "variable_captions_shuffled", "one_caption"])
def test_equals_big_vision_and_clip_benchmark(case: str) -> None:
    similarity = torch.from_numpy(GOLDEN[f"{case}/similarity"])
    owner = torch.from_numpy(GOLDEN[f"{case}/text_to_image"]).long()
    metrics = recall_from_ranks(from_similarity(similarity, owner))
    for direction in DIRECTIONS:
        ours = np.array(recalls(metrics, direction, (1, 5, 10)), np.float32)
        for source in ("big_vision", "clip_benchmark"):
            np.testing.assert_array_equal(ours, GOLDEN[f"{case}/{source}/{direction}"])


def test_ties_give_the_least_that_any_order_gives() -> None:
    similarity = torch.from_numpy(GOLDEN["ties/similarity"])
    owner = torch.from_numpy(GOLDEN["ties/text_to_image"]).long()
    metrics = recall_from_ranks(from_similarity(similarity, owner))
    for direction in DIRECTIONS:
        low, high = GOLDEN[f"ties/tie_bounds/{direction}"].T
        assert (low < high).any()
        ours = np.array(recalls(metrics, direction, (1, 5, 10)), np.float32)
        np.testing.assert_array_equal(ours, low)


def test_three_images_by_hand() -> None:
    owner = torch.tensor([0, 0, 1, 1, 2])
    similarity = torch.tensor([[0.9, 0.2, 0.3, 0.1, 0], [0.8, 0.1, 0.4, 0.7, 0.6], [0.5] * 5])
    ranks = from_similarity(similarity, owner)
    assert ranks.image_to_text.tolist() == [0, 1, 4]
    assert ranks.text_to_image.tolist() == [0, 1, 1, 0, 1]
    metrics = recall_from_ranks(ranks, ks=(1, 2, 5))
    assert metrics == pytest.approx(
        {
            "text_retrieval_recall@1": 1 / 3,
            "text_retrieval_recall@2": 2 / 3,
            "text_retrieval_recall@5": 1.0,
            "text_retrieval_median_rank": 2.0,
            "text_retrieval_mean_rank": 8 / 3,
            "image_retrieval_recall@1": 0.4,
            "image_retrieval_recall@2": 1.0,
            "image_retrieval_recall@5": 1.0,
            "image_retrieval_median_rank": 2.0,
            "image_retrieval_mean_rank": 1.6,
        }
    )


def test_four_images_with_two_captions_by_hand() -> None:
    """The shape and the expected recalls of big_vision's own retrieval test, on our numbers."""
    owner = torch.arange(4).repeat_interleave(2)
    similarity = torch.tensor(
        [
            [0.9, 0.2, 0.3, 0.4, 0.8, 0.10, 0.7, 0.6],
            [0.3, 0.5, 0.1, 0.9, 0.2, 0.15, 0.8, 0.7],
            [0.8, 0.9, 0.4, 0.1, 0.7, 0.30, 0.2, 0.5],
            [0.5, 0.4, 0.9, 0.8, 0.6, 0.25, 0.1, 0.2],
        ]
    )
    ranks = from_similarity(similarity, owner)
    assert ranks.image_to_text.tolist() == [0, 0, 2, 6]
    assert ranks.text_to_image.tolist() == [0, 3, 3, 0, 1, 0, 3, 3]
    metrics = recall_from_ranks(ranks)
    assert recalls(metrics, "image_to_text", (1, 5, 10)) == [0.5, 0.75, 1.0]
    assert recalls(metrics, "text_to_image", (1, 5, 10)) == [0.375, 1.0, 1.0]
    assert metrics["text_retrieval_median_rank"] == 2.0
    perfect = recall_from_ranks(from_similarity((owner == torch.arange(4)[:, None]).float(), owner))
    assert set(perfect.values()) == {1.0}


@pytest.mark.parametrize("width", [1, 8, 37])
def test_equal_embeddings_rank_last(width: int) -> None:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(width))
    owner = torch.arange(10).repeat_interleave(5)
    ranks = retrieval_ranks(vector.expand(10, -1), vector.expand(50, -1), owner, chunk=3)
    assert ranks.image_to_text.tolist() == [45] * 10  # all wrong captions come first
    assert ranks.text_to_image.tolist() == [9] * 50
    metrics = recall_from_ranks(ranks)
    assert recalls(metrics, "image_to_text", (1, 5, 10)) == [0, 0, 0]
    assert recalls(metrics, "text_to_image", (1, 5, 10)) == [0, 0, 1]
    # One after the other at ranks 46 to 50.
    expected = np.mean([n / (45 + n) for n in range(1, 6)])
    assert metrics["text_retrieval_average_precision"] == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_collapsed_images_do_not_score(chunk: int) -> None:
    _, text, owner = random_case(images=61, width=67)
    rng = torch.Generator().manual_seed(1)
    image = torch.randn(67, generator=rng).expand(61, -1)
    metrics = retrieval_metrics(image, text, owner, chunk=chunk)
    # Every image sees one and the same list of texts, every text the images with equal scores.
    assert metrics["text_retrieval_recall@1"] == 1 / 61
    for k in (1, 5, 10):
        assert metrics[f"image_retrieval_recall@{k}"] == 0


def test_duplicates_tie_against_the_model_and_not_with_their_own() -> None:
    """Caption 2, of image 1, repeats caption 0; captions 0 and 1 of image 0 are the same."""
    image = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    text = torch.tensor([[1.0, 0.5, 0], [1, 0.5, 0], [1, 0.5, 0], [0, 0, 1]])
    ranks = retrieval_ranks(image, text, torch.tensor([0, 0, 1, 2]))
    assert ranks.image_to_text.tolist() == [1, 2, 0]
    assert ranks.text_to_image.tolist() == [0, 0, 1, 0]
    assert ranks.average_precision is not None
    assert ranks.average_precision.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1 / 3, 1])


def test_ranks_do_not_depend_on_chunk_or_scale() -> None:
    image, text, owner = random_case()
    whole = retrieval_ranks(image, text, owner)
    assert 0 < (whole.image_to_text == 0).double().mean() < 1
    for chunk in (1, 4, 21, 22):
        part = retrieval_ranks(image, text, owner, chunk)
        assert torch.equal(part.image_to_text, whole.image_to_text)
        assert torch.equal(part.text_to_image, whole.text_to_image)
    lengths = torch.linspace(0.01, 50, len(text))[:, None]
    scaled = retrieval_ranks(image * 1e-3, text * lengths, owner)
    assert torch.equal(scaled.image_to_text, whole.image_to_text)
    assert torch.equal(scaled.text_to_image, whole.text_to_image)


def test_order_of_texts_changes_nothing() -> None:
    image, text, owner = random_case()
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(5))
    ranks = retrieval_ranks(image, text, owner)
    permuted = retrieval_ranks(image, text[order], owner[order])
    assert torch.equal(permuted.image_to_text, ranks.image_to_text)
    assert torch.equal(permuted.text_to_image, ranks.text_to_image[order])


def test_ranks_equal_a_sort_of_the_full_matrix() -> None:
    image, text, owner = random_case(seed=3)
    a, b = image.double().numpy(), text.double().numpy()
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    ranks = retrieval_ranks(image, text, owner, chunk=4)
    for i, row in enumerate(a @ b.T):
        assert ranks.image_to_text[i] == np.flatnonzero(owner[np.argsort(-row)] == i)[0]
    for j, row in enumerate(b @ a.T):
        assert ranks.text_to_image[j] == np.flatnonzero(np.argsort(-row) == owner[j].item())[0]


def test_k_beyond_the_pool_is_said(caplog: pytest.LogCaptureFixture) -> None:
    image, text, owner = torch.eye(3), -torch.eye(3)[[0, 0, 1, 1, 2, 2]], torch.arange(6) // 2
    with caplog.at_level(logging.WARNING, logger="eval.retrieval"):
        metrics = retrieval_metrics(image, text, owner, ks=(1, 5))
    assert metrics["image_retrieval_recall@5"] == 1.0
    assert metrics["image_retrieval_recall@1"] == 0.0
    assert [record.getMessage() for record in caplog.records] == [
        "image_retrieval_recall@5 is 1 by definition: the pool has 3"
    ]


def test_autocast_and_gradients_stay_out() -> None:
    image, text, owner = random_case()
    expected = retrieval_metrics(image, text, owner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(image, text, owner) == expected
    assert retrieval_metrics(image.requires_grad_(), text, owner) == expected


def test_bad_inputs_say_what_to_do() -> None:
    image, text, owner = random_case()
    missing = torch.where(owner == 4, 5, owner)
    with pytest.raises(ValueError, match=r"1 of 21 images have no caption \(first: image 4\)"):
        retrieval_metrics(image, text, missing)
    with pytest.raises(ValueError, match="holds 1 to 21, outside 0 to 20"):
        retrieval_metrics(image, text, owner + 1)
    with pytest.raises(ValueError, match="must be int64"):
        retrieval_metrics(image, text, owner.float())
    with pytest.raises(ValueError, match="one image index for each"):
        retrieval_metrics(image, text, owner[:-1])
    with pytest.raises(ValueError, match="width 13 and 12"):
        retrieval_metrics(image, text[:, 1:], owner)
    with pytest.raises(ValueError, match="non-empty"):
        retrieval_metrics(image[:0], text, owner)
    with pytest.raises(ValueError, match="k must be at least 1"):
        retrieval_metrics(image, text, owner, ks=(0,))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        retrieval_metrics(image, text, owner, chunk=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_does_not_rank_first(bad: float) -> None:
    image, text, owner = random_case()
    text[3, 2] = bad
    with pytest.raises(ValueError, match="text_embeddings row 3 is not finite"):
        retrieval_metrics(image, text, owner)
    with pytest.raises(ValueError, match="similarity is NaN"):
        ranks_from_similarity(torch.full((1, 2), torch.nan), torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="no right answer"):
        ranks_from_similarity(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
