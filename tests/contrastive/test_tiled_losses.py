"""The tiled losses equal the plain ones in value and every gradient, in little memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from contrastive.losses import clip_loss, normalize_features, siglip_loss
from contrastive.targets import Targets, Teacher
from contrastive.tiled_losses import Diagnostics, tiled_clip_loss, tiled_siglip_loss

TOTAL = 11
GROUPS = torch.tensor([1, 2, 1, 3, 4, 1, 5, 2, 6, 7, 7])  # repeats in and between parts
OPTIONS = ("own", "mask", "positive", "smooth", "smooth mask", "smooth positive", "weights")
OPTIONS += ("all", "teacher", "weighted teacher")


def unit_rows(seed: int, count: int = TOTAL, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def make_targets(option: str, part: slice, dtype: torch.dtype) -> Targets:
    options: dict[str, Any] = {}
    if "mask" in option or "positive" in option or option == "all":
        options |= {"groups": GROUPS[part], "all_groups": GROUPS}
        options["same_group"] = "mask" if "mask" in option else "positive"
    if "smooth" in option or option == "all":
        options["label_smoothing"] = 0.1
    if "weight" in option or option == "all":
        options["weights"] = torch.linspace(0, 2, TOTAL, dtype=dtype)[part]
    if "teacher" in option:
        image, text = unit_rows(5, width=4).to(dtype), unit_rows(6, width=4).to(dtype)
        options["teacher"] = Teacher(image[part], text[part], image, text, 5.0, -1.0)
    return Targets(**options)


class Inputs:
    """Leaves of a loss: rows of a part, gathered rows, scale and bias."""

    def __init__(self, part: slice | None, dtype: torch.dtype, scale: float = 14.29) -> None:
        own = part or slice(0, TOTAL)
        image, text = unit_rows(0).to(dtype), unit_rows(1).to(dtype)
        self.image = image[own].clone().requires_grad_()
        self.text = text[own].clone().requires_grad_()
        self.all_image, self.all_text = self.image, self.text
        if part is not None:
            self.all_image = image.requires_grad_()
            self.all_text = text.requires_grad_()
        self.scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
        self.bias = torch.tensor(-2.0, dtype=dtype, requires_grad=True)

    def loss(
        self, kind: str, offset: int, targets: Targets, tile: int | None
    ) -> tuple[Tensor, Diagnostics | None]:
        """Tiled, or plain without a tile size."""
        if kind == "clip":
            features = (self.image, self.text, self.all_image, self.all_text, self.scale)
            if tile is None:
                return clip_loss(*features, offset, targets), None
            return tiled_clip_loss(*features, offset, targets, tile)
        features = (self.image, self.all_text, self.scale, self.bias)
        if tile is None:
            return siglip_loss(*features, offset, targets), None
        return tiled_siglip_loss(*features, offset, targets, tile)

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in vars(self).items() if leaf.grad is not None}


def compare(
    kind: str, option: str, part: slice | None, tile: int, dtype: torch.dtype, scale: float
) -> None:
    """Values to 1e-12 or 1e-6 of theirs, gradients to as much of the largest."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    own = part or slice(0, TOTAL)
    ours, plain = Inputs(part, dtype, scale), Inputs(part, torch.float64, scale)
    loss, _ = ours.loss(kind, own.start, make_targets(option, own, dtype), tile)
    expected, _ = plain.loss(kind, own.start, make_targets(option, own, torch.float64), None)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    theirs, found = plain.gradients(), ours.gradients()
    assert set(found) == set(theirs)
    for name, gradient in theirs.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name].double(), gradient, rtol=0, atol=tolerance * largest, msg=name
        )


PARTS = [None, slice(0, 4), slice(4, 11), slice(10, 11)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("part", PARTS, ids=["alone", "first", "last", "one"])
def test_tiles_change_nothing(kind: str, option: str, part: slice | None) -> None:
    for tile in (1, 3, 11, 64):
        compare(kind, option, part, tile, torch.float64, 14.29)
    compare(kind, option, part, 3, torch.float32, 5.0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_tiles_change_nothing_up_to_the_cap_of_the_scale(kind: str, scale: float) -> None:
    for part in PARTS[:3]:
        compare(kind, "own", part, 4, torch.float64, scale)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("frozen", ["image", "text", "scale", "image text"])
def test_frozen_inputs_get_no_gradient(kind: str, frozen: str) -> None:
    results = []
    for tile in (4, None):
        inputs = Inputs(None, torch.float64)
        for name in frozen.split():
            getattr(inputs, name).requires_grad_(False)
        loss, _ = inputs.loss(kind, 0, Targets(), tile)
        loss.backward()
        results.append(inputs.gradients())
        assert not set(results[-1]) & set(frozen.split())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bfloat16_features_are_summed_in_float32(kind: str) -> None:
    low = Inputs(None, torch.bfloat16)
    exact = Inputs(None, torch.float64)
    for name in vars(low):
        getattr(exact, name).data.copy_(getattr(low, name).detach())
    loss, _ = low.loss(kind, 0, Targets(), 4)
    expected, _ = exact.loss(kind, 0, Targets(), None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for name, gradient in low.gradients().items():
        assert gradient.dtype == torch.bfloat16
        wanted = exact.gradients()[name]
        # Half a unit in the last of eight binary places.
        torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_autocast_does_not_reach_the_products(kind: str) -> None:
    losses = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inputs = Inputs(None, torch.float32)
            losses.append(inputs.loss(kind, 0, Targets(), 4)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_saved_memory_grows_with_the_batch_and_not_with_its_square(kind: str) -> None:
    saved: dict[int, int] = {}
    for count in (64, 128, 256):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        image, text = (unit_rows(seed, count).requires_grad_() for seed in (0, 1))
        scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            if kind == "clip":
                tiled_clip_loss(image, text, image, text, scale, tile_rows=16)
            else:
                tiled_siglip_loss(image, text, scale, bias, tile_rows=16)
        saved[count] = sum(tensor.nbytes for tensor in kept)
    assert saved[64] >= 2 * 64 * 6 * 8
    assert saved[256] - saved[128] == 2 * (saved[128] - saved[64])


@pytest.mark.parametrize("option", ["own", "mask", "positive"])
@pytest.mark.parametrize("part", PARTS[:3], ids=["alone", "first", "last"])
def test_diagnostics_describe_the_logits(option: str, part: slice | None) -> None:
    own = part or slice(0, TOTAL)
    inputs, targets = Inputs(part, torch.float64), make_targets(option, own, torch.float64)
    count = len(inputs.image)
    _, clip = inputs.loss("clip", own.start, targets, 3)
    _, siglip = inputs.loss("siglip", own.start, targets, 3)
    assert clip is not None
    assert siglip is not None
    logits = (inputs.scale * inputs.image @ inputs.all_text.T).detach()
    by_text = (inputs.scale * inputs.text @ inputs.all_image.T).detach()
    marks = torch.arange(TOTAL) if option == "own" else GROUPS
    alike = marks[own, None] == marks[None, :]
    mine = torch.arange(count) + own.start
    positive, negative = logits[torch.arange(count), mine].mean(), logits[~alike].mean()
    torch.testing.assert_close(clip.positive_logit, positive)
    torch.testing.assert_close(clip.negative_logit, negative)
    torch.testing.assert_close(siglip.positive_logit, positive - 2)
    torch.testing.assert_close(siglip.negative_logit, negative - 2)
    best = []
    for side in (logits, by_text):
        if option == "mask":
            others = alike.index_put((torch.arange(count), mine), torch.tensor(False))
            side = side.masked_fill(others, -torch.inf)
        best.append((marks[side.argmax(dim=1)] == marks[own]).double().mean())
    assert clip.image_accuracy == siglip.image_accuracy == best[0]
    assert clip.text_accuracy == best[1]
    assert siglip.text_accuracy is None
    assert not clip.negative_logit.requires_grad


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equal_rows_give_ln_of_the_batch_and_no_accuracy(scale: float) -> None:
    same = normalize_features(torch.ones(16, 8)).requires_grad_()
    other = normalize_features(torch.ones(16, 8))
    weight = torch.tensor(scale, requires_grad=True)
    loss, found = tiled_clip_loss(same, other, same, other, weight, tile_rows=5)
    assert loss.item() == pytest.approx(math.log(16), rel=1e-5)
    assert found.image_accuracy == found.text_accuracy == 1 / 16
    loss.backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("tiny", [0.0, 1e-20])
def test_duplicates_have_finite_gradients_and_a_zero_feature_none(kind: str, tiny: float) -> None:
    raw = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    raw[3], raw[4] = raw[2], tiny
    raw.requires_grad_()
    image = normalize_features(raw)
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (100.0, -10.0))
    if kind == "clip":
        loss, _ = tiled_clip_loss(image, image, image, image, scale, tile_rows=4)
    else:
        loss, _ = tiled_siglip_loss(image, image, scale, bias, tile_rows=4)
    loss.backward()
    assert torch.isfinite(loss)
    assert not image[4].any()
    assert raw.grad is not None
    assert scale.grad is not None
    assert not raw.grad[4].any()
    assert 0 < raw.grad.abs().max() < 1e3
    assert torch.isfinite(scale.grad)


def test_one_pair_alone_has_no_clip_loss_and_no_negatives() -> None:
    image, text = unit_rows(0, 1), unit_rows(1, 1)
    loss, found = tiled_clip_loss(image, text, image, text, torch.tensor(9.0))
    assert loss == 0
    assert found.negative_logit == 0
    assert found.text_accuracy == 1


def test_no_tiles_and_second_derivatives_are_refused() -> None:
    inputs = Inputs(None, torch.float64)
    for kind in ("clip", "siglip"):
        with pytest.raises(ValueError, match="tile_rows must be at least 1, got 0"):
            inputs.loss(kind, 0, Targets(), 0)
        loss, _ = inputs.loss(kind, 0, Targets(), 4)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, inputs.image, create_graph=True)


def test_evaluation_computes_no_gradient() -> None:
    inputs = Inputs(None, torch.float64)
    with torch.no_grad():
        quiet, _ = inputs.loss("clip", 0, Targets(), 4)
    assert not quiet.requires_grad
    assert torch.equal(quiet, inputs.loss("clip", 0, Targets(), 4)[0])
