"""Classification losses against big_vision's and vmoe's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from classification.losses import sigmoid_loss, smooth_targets, softmax_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.npz"


def golden(name: str) -> Tensor:
    with np.load(GOLDEN) as arrays:
        return torch.from_numpy(np.asarray(arrays[name]))


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        (sigmoid_loss, "sigmoid/labels", "sigmoid/hard"),
        (sigmoid_loss, "sigmoid/labels_soft", "sigmoid/soft"),
        (softmax_loss, "softmax/labels", "softmax"),
    ],
)
def test_values_and_gradients_are_the_references(loss: object, targets: str, expected: str) -> None:
    assert callable(loss)
    logits = golden("sigmoid/logits").requires_grad_()
    value = loss(logits, golden(targets))
    value.backward()
    torch.testing.assert_close(value, golden(f"{expected}/loss"), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, golden(f"{expected}/grad_logits"), rtol=1e-5, atol=1e-7)
    # Half-precision logits are computed on in float32.
    half = loss(logits.detach().bfloat16(), golden(targets))
    assert half.dtype == torch.float32


def test_smoothing_moves_mass_to_all_classes() -> None:
    smoothed = smooth_targets(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(
        smoothed, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    )
    soft = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert torch.equal(smooth_targets(soft, 4, 0.0), soft)
    torch.testing.assert_close(smooth_targets(soft, 4, 0.2).sum(), torch.tensor(1.0))
