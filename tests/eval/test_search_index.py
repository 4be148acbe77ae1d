"""The nearest vectors: exact ones against a full sort, those of faiss against the exact ones."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from eval import search_index
from eval.search_index import ExactIndex, FaissIndex, build_index


@pytest.mark.parametrize("count", [1, 6, 7, 8, 50])
def test_the_exact_index_is_a_full_sort(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(search_index, "CHUNK", 7)
    torch.manual_seed(count)
    vectors, queries = torch.randn(count, 5), 3 * torch.randn(4, 5)
    cosines = F.normalize(queries, dim=1) @ F.normalize(vectors, dim=1).T
    for k in (1, 3, count, count + 9):
        scores, numbers = ExactIndex(vectors).search(queries, k)
        expected, order = cosines.sort(dim=1, descending=True)
        torch.testing.assert_close(scores, expected[:, :k])
        assert torch.equal(numbers, order[:, :k])


def test_equal_vectors_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_index, "CHUNK", 2)
    scores, numbers = ExactIndex(torch.ones(6, 3)).search(torch.ones(1, 3), 6)
    assert numbers.tolist() == [[0, 1, 2, 3, 4, 5]]
    torch.testing.assert_close(scores, torch.ones(1, 6))


def test_faiss_finds_nearly_the_nearest() -> None:
    torch.manual_seed(0)
    centres = torch.randn(50, 32)
    vectors = centres[torch.randint(50, (6000,))] + 0.5 * torch.randn(6000, 32)
    queries = vectors[:100] + 0.1 * torch.randn(100, 32)
    exact, near = build_index(vectors), build_index(vectors, exact_limit=5999)
    assert isinstance(exact, ExactIndex)
    assert isinstance(near, FaissIndex)
    assert len(near) == len(exact) == 6000
    scores, numbers = near.search(queries, 10)
    best, right = exact.search(queries, 10)
    found = (numbers[:, :, None] == right[:, None]).any(1)
    assert found.float().mean() > 0.95
    assert (numbers[:, 0] == right[:, 0]).float().mean() > 0.95
    torch.testing.assert_close(scores[:, 0], best[:, 0], atol=2e-2, rtol=0)


def test_faiss_with_fewer_vectors_than_are_asked_for() -> None:
    scores, numbers = FaissIndex(torch.eye(3), lists=1).search(torch.eye(3)[:1], 9)
    assert numbers[0, 0] == 0
    assert scores.shape == numbers.shape == (1, 3)


def test_what_cannot_be_searched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="an index needs vectors"):
        build_index(torch.empty(0, 4))
    with pytest.raises(ValueError, match="not finite"):
        build_index(torch.tensor([[1.0, torch.nan]]))
    index = build_index(torch.eye(4))
    with pytest.raises(ValueError, match="do not fit vectors of width 4"):
        index.search(torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(torch.ones(1, 4), 0)
    with pytest.raises(ValueError, match="not finite"):
        index.search(torch.full((1, 4), torch.inf), 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"among 4 vectors needs faiss: pip install"):
        build_index(torch.eye(4), exact_limit=3)
