"""Normalisation: torchvision's numbers, no keys in checkpoints, no waiting for the GPU."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from encoders.pixels import Normalize

MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8, generator=generator)


def test_torchvision_normalises_alike() -> None:
    found = Normalize(MEAN, STD)(pictures())
    expected = F.normalize(pictures().float() / 255, list(MEAN), list(STD))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_checkpoints_gain_no_keys() -> None:
    assert Normalize(MEAN, STD).state_dict() == {}


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for() -> None:
    normalize, images = Normalize(MEAN, STD).cuda(), pictures().cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = normalize(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), Normalize(MEAN, STD)(pictures()))
