"""Watching for losses and gradients that are not finite, or that stand out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.spikes import SpikeWindow

LARGEST_ROW_OF_SKIPS = 20  # a scaler halves 2**16 to below one in fewer
REMEMBERED = 256  # batches whose sample keys are at hand for the report
ADVICE = "lower optimizer.lr or lengthen the warm-up"


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite, or too often not usable."""


class FiniteGuard:
    """Stops a run whose loss or gradient norm is not finite, or leaves such updates out.

    With `skip` 0 it stops. On CPU, `check` raises before the update, so the weights stay as they
    were. On other devices reading a value stops the host, so `check` only collects a flag on the
    device and the updates go on; `verify` reads it, and raises when a step since the last call was
    not finite. The weights in memory are lost then; called before every save, it keeps them out of
    checkpoints. Under fp16 the gradient scaler skips such updates by itself, and `count` raises
    when it has skipped too many in a row.

    With `skip` or `spikes`, `check` tells what to leave out by a flag on the device, agreed among
    the processes, and `verify` raises when more than `skip` in a row were not usable.

    Args:
        device: where the losses are.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        skip: updates in a row that may be left out.
        spikes: the window of accepted steps, or None.
        reduce: the mean of a tensor over processes.
        report: where to write what was found when it stops the run, or None.
        rank: number of this process, for the report.

    Attributes:
        skipped: updates that the scaler has skipped so far.
        verified: the last step up to which all is known to be finite.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        *,
        skip: int = 0,
        spikes: SpikeWindow | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        report: Path | None = None,
        rank: int = 0,
    ) -> None:
        self.scaled, self.deferred = precision == "fp16", device.type != "cpu"
        self.skip, self.spikes, self.reduce, self.report = skip, spikes, reduce, report
        self.rank, self.skipped, self.verified, self._row = rank, 0, 0, 0
        self._first_broken = torch.full((), -1, dtype=torch.int64, device=device)
        self._counts = torch.zeros(5, dtype=torch.int64, device=device)  # see _leave_out
        self._own_loss = torch.zeros((), device=device)
        self._keys: deque[tuple[int, list[Any]]] = deque(maxlen=REMEMBERED)

    @property
    def leaves_out(self) -> bool:
        """Whether updates may be left out."""
        return self.skip > 0 or self.spikes is not None

    def check(
        self, loss: Tensor, norm: Tensor, step: int, keys: list[Any] | None = None
    ) -> Tensor | None:
        """Look at the 0-D loss and gradient norm of `step` (1-based) before its update.

        Args:
            keys: names of this process's samples, for the report.

        Returns:
            Whether to leave the update out, 0-D on the device; None where that is not done.

        Raises:
            NonFiniteError: on CPU, one of them is not finite and updates are not left out.
        """
        if self.scaled and not self.leaves_out:
            return None
        own, norm = loss.float(), norm.float()
        shared = self.reduce(own) if self.reduce is not None and self.leaves_out else own
        broken = ~(torch.isfinite(shared) & torch.isfinite(norm))
        if not self.scaled:
            self._note(own, broken, step, keys or [])
        if self.leaves_out:
            return self._leave_out(torch.stack([shared, norm]), broken)
        if not self.deferred and bool(broken):
            self._write_report(float(norm))
            raise NonFiniteError(
                f"loss {float(loss)}, gradient norm {float(norm)} at step {step}: the weights"
                f" were left as they were; {ADVICE}{self._where()}"
            )
        return None

    def _note(self, own: Tensor, broken: Tensor, step: int, keys: list[Any]) -> None:
        """Remember the first broken step, and whose samples were in it."""
        first = broken & (self._first_broken < 0)
        self._first_broken = torch.where(first, step, self._first_broken)
        self._own_loss = torch.where(first, own, self._own_loss)
        self._keys.append((step, keys))

    def _leave_out(self, pair: Tensor, broken: Tensor) -> Tensor:
        """Count in a row, and at most in a row: not finite, left out; and all left out."""
        out = broken
        if self.spikes is not None:
            out = broken | self.spikes.is_spike(pair)
            self.spikes.add(pair, ~out)
        rows = torch.where(torch.stack([broken, out]), self._counts[:2] + 1, 0)
        longest = torch.maximum(self._counts[2:4], rows)
        self._counts = torch.cat([rows, longest, (self._counts[4] + out)[None]])
        return out

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
            NonFiniteError: one since the last call was not finite, or too many in a row.
        """
        if self.leaves_out:
            longest, longest_out = self._counts[2:4].tolist()
            if longest > self.skip or longest_out > max(self.skip, LARGEST_ROW_OF_SKIPS):
                self._write_report(None)
                raise NonFiniteError(
                    f"{longest_out} updates in a row up to step {step} were not usable, with"
                    f" train.skip_updates {self.skip}: none of them changed the weights;"
                    f" {ADVICE}{self._where()}"
                )
        elif self.deferred and int(self._first_broken) >= 0:
            self._write_report(None)
            raise NonFiniteError(
                "loss or gradient norm that is not finite in one of the steps"
                f" {self.verified + 1} to {step}: no checkpoint holds what it did to the weights;"
                f" {ADVICE}{self._where()}"
            )
        self.verified = step

    @property
    def left_out(self) -> int:
        """Updates left out so far; waits for the device."""
        return int(self._counts[4]) if self.leaves_out else 0

    def _where(self) -> str:
        return f" (samples: {self.report})" if self.report is not None else ""

    def _write_report(self, norm: float | None) -> None:
        """Step, process and samples of the first broken step, by those whose loss was broken."""
        step, loss = int(self._first_broken), float(self._own_loss)
        finite = abs(loss) < float("inf")
        if self.report is None or (finite and self.rank):
            return
        content = {
            "step": step,
            "rank": self.rank,
            "loss": str(loss),
            "loss_is_finite": finite,
            "grad_norm": None if norm is None else str(norm),
            "keys": dict(self._keys).get(step, []),
        }
        self.report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs; empty if nothing can be left out."""
        if not self.leaves_out:
            return {}
        state = {"counts": self._counts}
        if self.spikes is not None:
            state |= {"window": self.spikes.values, "window_count": self.spikes.count}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`; what the checkpoint lacks starts afresh."""
        device = self._counts.device
        if "counts" in state and self.leaves_out:
            self._counts = state["counts"].to(device)
        if "window" in state and self.spikes is not None:
            self.spikes.values = state["window"].to(device)
            self.spikes.count = state["window_count"].to(device)
