"""Contrastive losses against big_vision's and vmoe's numbers, and against their definitions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contrastive.losses import check_features, clip_loss, normalize_features, siglip_loss
from contrastive.targets import Targets, Teacher

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.npz"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        return {
            key.removeprefix(f"{name}/"): torch.from_numpy(np.asarray(arrays[key]))
            for key in arrays
            if key.startswith(f"{name}/")
        }


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def rows(seed: int, count: int = 7, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(draws, dim=1)


def reference_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    by_image = logits.logsumexp(1) - logits.diagonal()
    by_text = logits.logsumexp(0) - logits.diagonal()
    return (by_image + by_text).mean() / 2


def reference_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return (1 + (-signs * logits).exp()).log().sum() / len(image)


def check_gradient(leaf: Tensor, expected: Tensor) -> None:
    """Equal up to float32 sums in another order; observed 5e-6 of the largest entry."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-5 * largest)


def test_clip_golden() -> None:
    arrays = golden("clip")
    image, text, log_scale = leaves(arrays["img"], arrays["txt"], arrays["log_scale"])
    zimg, ztxt = normalize_features(image), normalize_features(text)
    loss = clip_loss(zimg, ztxt, zimg, ztxt, log_scale.exp())
    loss.backward()
    torch.testing.assert_close(loss, arrays["loss"], rtol=2e-6, atol=0)
    for name, leaf in (("img", image), ("txt", text), ("log_scale", log_scale)):
        check_gradient(leaf, arrays[f"grad/{name}"])


def test_siglip_golden() -> None:
    arrays = golden("siglip")
    image, text, log_scale, bias = leaves(
        arrays["img"], arrays["txt"], arrays["params/s"], arrays["params/b"]
    )
    zimg, ztxt = normalize_features(image), normalize_features(text)
    torch.testing.assert_close(zimg, arrays["zimg"], rtol=1e-6, atol=1e-7)
    loss = siglip_loss(zimg, ztxt, log_scale.exp(), bias)
    loss.backward()
    torch.testing.assert_close(loss, arrays["loss"], rtol=2e-6, atol=0)
    named = {"img": image, "txt": text, "params/s": log_scale, "params/b": bias}
    for name, leaf in named.items():
        check_gradient(leaf, arrays[f"grad/{name}"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("scale", [1.0, 14.29, 100.0])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_with_offsets_average_to_the_definition(kind: str, scale: float, parts: int) -> None:
    numbers = (torch.tensor(math.log(scale)).double(), torch.tensor(-3.0).double())
    image, text, log_scale, bias = leaves(rows(0, 8), rows(1, 8), *numbers)
    exact = leaves(image.detach(), text.detach(), *numbers)
    if kind == "clip":
        expected = reference_clip(exact[0], exact[1], exact[2].exp()) + 0 * exact[3]
    else:
        expected = reference_siglip(exact[0], exact[1], exact[2].exp(), exact[3])
    expected.backward()
    size, losses = 8 // parts, []
    for start in range(0, 8, size):
        own = slice(start, start + size)
        if kind == "clip":
            loss = clip_loss(image[own], text[own], image, text, log_scale.exp(), start)
        else:
            loss = siglip_loss(image[own], text, log_scale.exp(), bias, start)
        losses.append(loss)
    loss = torch.stack(losses).mean() + 0 * bias
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip((image, text, log_scale, bias), exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-11)


def test_pairs_of_one_group_are_not_negatives() -> None:
    image, text, scale = rows(0, 4), rows(1, 4), torch.tensor(3.0).double()
    groups = torch.tensor([5, 6, 5, 7])
    targets = Targets(groups, groups)
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[0, 2] = keep[2, 0] = False
    logits = torch.where(keep, scale * image @ text.T, -torch.inf)
    rowwise = (logits.logsumexp(1) - logits.diagonal()).mean()
    columnwise = (logits.logsumexp(0) - logits.diagonal()).mean()
    loss = clip_loss(image, text, image, text, scale, 0, targets)
    torch.testing.assert_close(loss, (rowwise + columnwise) / 2)

    bias = torch.tensor(-1.0).double()
    signs = 2 * torch.eye(4).double() - 1
    terms = -torch.nn.functional.logsigmoid(signs * (scale * image @ text.T + bias))
    loss = siglip_loss(image, text, scale, bias, 0, targets)
    torch.testing.assert_close(loss, terms[keep].sum() / 4)
    half = siglip_loss(image[2:], text, scale, bias, 2, Targets(groups[2:], groups))
    torch.testing.assert_close(half, terms[2:][keep[2:]].sum() / 2)


def test_groups_without_repetition_change_nothing() -> None:
    image, text, scale = rows(0), rows(1), torch.tensor(9.0).double()
    groups = torch.arange(7) * 3
    plain = clip_loss(image, text, image, text, scale)
    for same_group in ("mask", "positive"):
        targets = Targets(groups, groups, same_group)
        assert torch.equal(clip_loss(image, text, image, text, scale, 0, targets), plain)


def test_the_largest_scale_is_finite_and_equal_rows_give_ln_of_the_batch() -> None:
    same = normalize_features(torch.ones(16, 8)).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    loss = clip_loss(same, same, same, same, scale)
    assert loss.item() == pytest.approx(math.log(16), rel=1e-5)
    bias = torch.tensor(-10.0, requires_grad=True)
    (loss + siglip_loss(same, same, scale, bias)).backward()
    for tensor in (same, scale, bias):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_features_are_normalised_in_float32() -> None:
    features = torch.tensor([[3.0, 4.0]])
    assert normalize_features(features.bfloat16()).dtype == torch.float32
    assert normalize_features(features.double()).dtype == torch.float64
    torch.testing.assert_close(normalize_features(features), torch.tensor([[0.6, 0.8]]))
    assert torch.equal(normalize_features(torch.zeros(1, 2)), torch.zeros(1, 2))


GROUPS = torch.tensor([5, 6, 5, 7, 5, 6, 8])
ALIKE = GROUPS[:, None] == GROUPS[None, :]


def cross_entropy(logits: Tensor, wanted: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Both directions, with targets (B, B) of rows; those of columns are their transpose."""
    by_row = -(wanted * logits.log_softmax(dim=1)).sum(dim=1) * weights
    by_column = -(wanted.T * logits.log_softmax(dim=0)).sum(dim=0) * weights
    return (by_row + by_column).mean() / 2


def binary_cross_entropy(logits: Tensor, wanted: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    likely = logits.sigmoid()
    terms = wanted * likely.log() + (1 - wanted) * (1 - likely).log()
    return -(terms.sum(dim=1) * weights).mean()


def both_losses(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Clip loss and siglip loss of seven pairs, and their common logits (scale 3, bias 0)."""
    image, text, scale = rows(0), rows(1), torch.tensor(3.0).double()
    clip = clip_loss(image, text, image, text, scale, 0, targets)
    siglip = siglip_loss(image, text, scale, torch.zeros(()).double(), 0, targets)
    return clip, siglip, scale * image @ text.T


def test_pairs_of_one_group_can_be_positives() -> None:
    clip, siglip, logits = both_losses(Targets(GROUPS, GROUPS, "positive"))
    shares = ALIKE / ALIKE.sum(dim=1, keepdim=True)
    torch.testing.assert_close(clip, cross_entropy(logits, shares))
    torch.testing.assert_close(siglip, binary_cross_entropy(logits, ALIKE.double()))


def test_label_smoothing_is_torchs_own() -> None:
    clip, siglip, logits = both_losses(Targets(label_smoothing=0.1))
    by_row, by_column = (
        torch.nn.functional.cross_entropy(side, torch.arange(7), label_smoothing=0.1)
        for side in (logits, logits.T)
    )
    torch.testing.assert_close(clip, (by_row + by_column) / 2)
    wanted = torch.eye(7).double() * 0.9 + 0.05
    torch.testing.assert_close(siglip, binary_cross_entropy(logits, wanted))


def test_smoothing_spares_what_is_left_out() -> None:
    clip, _, logits = both_losses(Targets(GROUPS, GROUPS, "mask", 0.1))
    keep = ~ALIKE | torch.eye(7, dtype=torch.bool)
    wanted = 0.9 * torch.eye(7).double() + 0.1 * keep / keep.sum(dim=1, keepdim=True)
    logits = torch.where(keep, logits, -1e9)
    torch.testing.assert_close(clip, cross_entropy(logits, wanted))


def test_weights_multiply_the_terms_of_rows() -> None:
    weights = torch.linspace(0, 2, 7).double()
    clip, siglip, logits = both_losses(Targets(weights=weights))
    own = torch.eye(7).double()
    torch.testing.assert_close(clip, cross_entropy(logits, own, weights))
    torch.testing.assert_close(siglip, binary_cross_entropy(logits, own, weights))


def test_a_teacher_gives_soft_targets() -> None:
    image, text = rows(2, width=3), rows(3, width=3)
    clip, siglip, logits = both_losses(Targets(teacher=Teacher(image, text, image, text, 4.0, -1)))
    similar = 4 * image @ text.T
    by_row = -(similar.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    by_column = -(similar.softmax(dim=0) * logits.log_softmax(dim=0)).sum(dim=0)
    torch.testing.assert_close(clip, (by_row + by_column).mean() / 2)
    torch.testing.assert_close(siglip, binary_cross_entropy(logits, (similar - 1).sigmoid()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": GROUPS}, "must be given together"),
        ({"same_group": "drop"}, "must be mask or positive, got 'drop'"),
        ({"label_smoothing": 1.0}, r"must be in \[0, 1\), got 1"),
        ({"label_smoothing": 0.1, "teacher": Teacher(*[rows(0)] * 4, 1.0)}, "teacher replaces"),
    ],
)
def test_impossible_targets_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Targets(**options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_features_are_named(value: float) -> None:
    good, bad = rows(0), rows(1)
    check_features(good, bad)
    bad[4, 2] = bad[6, 0] = value
    with pytest.raises(ValueError, match=r"text features .* in 2 of 7 rows, first in row 4"):
        check_features(good, bad)
    with pytest.raises(ValueError, match="image features"):
        check_features(normalize_features(bad), good)
