"""The benchmark of losses compares what is equal, and says when a bar is missed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contrastive_worlds
from benchmarks.contrastive_loss import (
    LARGEST,
    OURS,
    SIZES,
    THEIRS,
    TORCH,
    Case,
    build,
    cases_on,
    leaves,
    missed_bars,
    step,
    summarise,
)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_all_compute_the_same(loss: str) -> None:
    """Ours, open_clip's and torch's own operator: values and every gradient."""
    found = {}
    for case in cases_on("cpu"):
        if case.loss == loss:
            inputs = leaves(12, 16, torch.device("cpu"))
            value = step(build(case, 5), inputs)
            found[case] = value, [tensor.grad for tensor in inputs if tensor.grad is not None]
    ours = found[Case(loss, "ours")]
    assert len(ours[1]) == (3 if loss == "clip" else 4)
    assert len(found) == (3 if loss == "clip" and TORCH in cases_on("cpu") else 2)
    for other in found.values():
        torch.testing.assert_close(other, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_all_exchanges_compute_the_same(loss: str) -> None:
    found = []
    for case in contrastive_worlds.CASES:
        if case.loss == loss:
            inputs = leaves(12, 16, torch.device("cpu"))
            value = step(contrastive_worlds.build(case), inputs)
            found.append((value, [tensor.grad for tensor in inputs if tensor.grad is not None]))
    assert len(found) == (2 if loss == "clip" else 3)
    for other in found:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_ratios_and_bars() -> None:
    ours = {"seconds": [2.0, 3.0, 9.0], "peak_bytes": 2**20, "loss": 1.0}
    theirs = {"seconds": [1.0, 3.0, 3.0], "peak_bytes": 10 * 2**20, "loss": 1.0}
    first, second = summarise({OURS[0]: ours, THEIRS[0]: theirs})
    assert (first["step_ms"], first["time_ratio"], first["memory_ratio"]) == (3000.0, 2.0, 0.1)
    assert (second["peak_mib"], "time_ratio" in second) == (10.0, False)
    assert len(missed_bars({SIZES[-1]: [first, second]})) == 2
    assert missed_bars({SIZES[0]: [first], LARGEST: [first]}) == []
    assert len(missed_bars({LARGEST: [first | {"peak_mib": 1025.0}]})) == 1
