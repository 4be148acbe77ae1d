"""Slot maps as pictures: grey where a slot does not look, coloured where it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoders.slot_pictures import heat_colours, heat_scale, paint_slot

GREY = torch.full((3, 20, 30), 100, dtype=torch.uint8)
PALE = 110 + 57


def test_weak_patches_stay_grey_and_strong_ones_get_the_last_colour() -> None:
    weights = torch.full((6,), 0.1)
    weights[4] = 0.5  # row 1, column 1 of two by three
    painted = paint_slot(GREY, weights, (2, 3), top=3.0)
    assert painted.shape == (20, 30, 3)
    inside = np.zeros((20, 30), dtype=bool)
    inside[10:, 10:20] = True
    assert (painted[~inside] == PALE).all()
    last = np.array([int(heat_colours()[-1][place : place + 2], 16) for place in (1, 3, 5)])
    np.testing.assert_allclose(painted[inside], [0.75 * last + 0.25 * PALE] * 100, atol=1)


def test_uniform_weights_have_no_colour() -> None:
    weights = torch.full((6,), 1 / 6)
    assert (paint_slot(GREY, weights, (2, 3), top=2.0) == PALE).all()
    assert heat_scale(weights[:, None]) == pytest.approx(1.1)
    assert heat_scale(torch.tensor([[1.0], [0.0]])) == pytest.approx(1.98)


def test_pictures_that_the_grid_does_not_divide() -> None:
    weights = torch.eye(4)[3]
    painted = paint_slot(GREY[:, :7, :7], weights, (2, 2), top=2.0)
    assert (painted[4:, 4:] != PALE).any(-1).all()
    assert (painted[:3] == PALE).all()
    with pytest.raises(ValueError, match="does not hold"):
        paint_slot(GREY, weights, (3, 2), top=2.0)
