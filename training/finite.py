"""Watching for losses and gradients that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_ROW_OF_SKIPS = 20  # a scaler halves 2**16 to below one in fewer


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite, step after step under fp16."""


class FiniteGuard:
    """Stops a run whose loss or gradient norm is not finite.

    On CPU, `check` raises before the update, so the weights stay as they were. On other devices
    reading a value stops the host, so `check` only collects a flag on the device and the updates
    go on; `verify` reads it, and raises when a step since the last call was not finite. The
    weights in memory are lost then; called before every save, it keeps them out of checkpoints.
    Under fp16 the gradient scaler skips such updates by itself, and `count` raises when it has
    skipped too many in a row.

    Args:
        device: where the losses are.
        precision: `fp32`, `bf16` or `fp16`.

    Attributes:
        skipped: updates that the scaler has skipped so far.
        verified: the last step up to which all is known to be finite.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.scaled, self.deferred = precision == "fp16", device.type != "cpu"
        self.skipped, self.verified, self._row = 0, 0, 0
        self._broken: Tensor = torch.zeros((), dtype=torch.bool, device=device)

    def check(self, loss: Tensor, norm: Tensor, step: int) -> None:
        """Look at the 0-D loss and gradient norm of `step` (1-based) before its update.

        Raises:
            NonFiniteError: on CPU, one of them is not finite.
        """
        if self.scaled:
            return
        broken = ~(torch.isfinite(loss.float()) & torch.isfinite(norm))
        if self.deferred:
            self._broken |= broken
        elif bool(broken):
            raise NonFiniteError(
                f"loss {float(loss)}, gradient norm {float(norm)} at step {step}: the weights"
                " were left as they were; lower optimizer.lr or lengthen the warm-up"
            )

    def count(self, was_skipped: bool, step: int) -> None:
        """Count the updates that the gradient scaler has skipped.

        Raises:
            NonFiniteError: it has skipped too many in a row, so lowering the scale does not help.
        """
        self.skipped += was_skipped
        self._row = self._row + 1 if was_skipped else 0
        if self._row >= LARGEST_ROW_OF_SKIPS:
            raise NonFiniteError(
                f"gradients that are not finite in {self._row} steps in a row up to step {step}:"
                " none of them changed the weights; lower optimizer.lr or use bf16"
            )

    def verify(self, step: int) -> None:
        """Wait for the device and look at all steps up to `step`.

        Raises:
            NonFiniteError: one since the last call was not finite.
        """
        if self.deferred and bool(self._broken):
            raise NonFiniteError(
                "loss or gradient norm that is not finite in one of the steps"
                f" {self.verified + 1} to {step}: no checkpoint holds what it did to the weights;"
                " lower optimizer.lr or lengthen the warm-up"
            )
        self.verified = step
