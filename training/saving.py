"""What a run saves of itself, and how it gets it back."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from training.checkpoint import (
    OPTIMIZER,
    STATE,
    CheckpointError,
    CheckpointWriter,
    load_optimizer_tensors,
    load_tensors,
    load_weights,
    optimizer_tensors,
    prune_checkpoints,
    random_state,
    read_state,
)
from training.ema import WeightAverage
from training.finite import FiniteGuard
from training.objective import Objective, TrainingStream
from training.parallel import Layout

GUARD = "guard.safetensors"
AVERAGE = "average.safetensors"
TRAINED = "training_weights.safetensors"


class Position(NamedTuple):
    """Where a run stands: steps done, skipped samples by reason, the state of every generator, and
    the steps that a run of a given time was found to have."""

    step: int
    skipped: Counter[str]
    random: dict[str, Tensor] | None
    planned_steps: int | None = None


class Saver:
    """Writes and loads the checkpoints of one run; every process calls every method."""

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        stream: TrainingStream,
        accelerator: Accelerator,
        guard: FiniteGuard,
        layout: Layout,
        *,
        keep_last: int,
        average: WeightAverage | None = None,
        exports_average: bool = False,
    ) -> None:
        self.folder, self.objective, self.optimizer = folder, objective, optimizer
        self.stream, self.accelerator, self.guard = stream, accelerator, guard
        self.layout, self.keep_last = layout, keep_last
        self.average, self.exports_average = average, exports_average
        self.last_step: int | None = None

    def write(self, skipped: Counter[str], **position: int) -> CheckpointWriter:
        """Write everything but the name of a checkpoint.

        Args:
            position: `step` and whatever else says how far the run has come.
        """
        accelerator, step = self.accelerator, position["step"]
        self.guard.verify(step)
        writer = CheckpointWriter(self.folder, step)
        state = self._state(skipped, position)
        main = accelerator.is_main_process
        weights = {
            name: self.layout.whole(tensors, main) for name, tensors in self._weights().items()
        }
        optimizer = self.layout.whole(optimizer_tensors(self.optimizer, self.objective), main)
        if main:
            writer.begin()
            for name, tensors in weights.items():
                writer.add_tensors(name, tensors)
            writer.add_tensors(OPTIMIZER, optimizer)
            writer.add_json(STATE, state)
            if self.guard.leaves_out:
                writer.add_tensors(GUARD, self.guard.state())
            for name, content in self.objective.config_files().items():
                writer.add_json(name, content)
        accelerator.wait_for_everyone()
        writer.add_tensors(f"rng/rank_{accelerator.process_index}.safetensors", random_state())
        accelerator.wait_for_everyone()
        return writer

    def publish(self, writer: CheckpointWriter, step: int) -> Path | None:
        """Give it its name and remove what is no longer kept; its path on the main process."""
        self.last_step = step
        if not self.accelerator.is_main_process:
            return None
        path = writer.publish(step)
        prune_checkpoints(writer.folder, path, self.keep_last)
        return path

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Files of weights: what other libraries open, and what training goes on with."""
        present, name = self.objective.model.state_dict(), self.objective.weights_file
        if self.average is None:
            return {name: present}
        averaged = {AVERAGE: self.average.state()}
        if not self.exports_average:
            return {name: present} | averaged
        return {name: self.average.state_dict(), TRAINED: present} | averaged

    def discard(self, writer: CheckpointWriter) -> None:
        """Remove what was written, of a checkpoint that gets no name."""
        if self.accelerator.is_main_process:
            shutil.rmtree(writer.partial, ignore_errors=True)

    def _load_average(self, folder: Path) -> None:
        assert self.average is not None
        if not (folder / AVERAGE).is_file():
            raise CheckpointError(f"'{folder}' holds no averaged weights: set train.ema_decay to 0")
        self.average.load_state(load_tensors(folder / AVERAGE))

    def _state(self, skipped: Counter[str], position: dict[str, int]) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        scaler = self.accelerator.scaler
        return {
            **position,
            "stream": self.stream.identity(),
            "skipped": dict(total_counts(skipped, self.accelerator.num_processes)),
            "processes": self.accelerator.num_processes,
            "skipped_updates": self.guard.skipped,
            "gradient_scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load(self, folder: Path) -> Position:
        """Restore model, optimizer, scaler and guard from a verified checkpoint.

        Raises:
            CheckpointError: it belongs to another model or another stream.
        """
        state = read_state(folder)
        expected, found = self.stream.identity(), state["stream"]
        changed = [name for name in expected if expected[name] != found.get(name)]
        if changed:
            differences = ", ".join(
                f"{name} was {found.get(name)}, is {expected[name]}" for name in changed
            )
            raise CheckpointError(f"cannot resume '{folder}' on another stream: {differences}")
        trained = TRAINED if (folder / TRAINED).is_file() else self.objective.weights_file
        load_weights(self.objective.model, load_tensors(folder / trained), str(folder))
        if self.average is not None:
            self._load_average(folder)
        load_optimizer_tensors(self.optimizer, self.objective, load_tensors(folder / OPTIMIZER))
        if self.accelerator.scaler is not None and state["gradient_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])
        if (folder / GUARD).is_file():
            self.guard.load_state(load_tensors(folder / GUARD))
        step = state["step"]
        self.guard.skipped, self.guard.verified = state.get("skipped_updates", 0), step
        own = folder / "rng" / f"rank_{self.accelerator.process_index}.safetensors"
        main = self.accelerator.is_main_process
        return Position(
            step,
            Counter(state["skipped"] if main else ()),
            # A process that did not exist before starts with its own seed.
            load_tensors(own) if own.is_file() else None,
            state.get("planned_steps"),
        )


def total_counts(counts: Counter[str], processes: int) -> Counter[str]:
    """Sum of the counts of all processes."""
    if processes == 1:
        return counts
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, dict(counts))
    return sum((Counter(part) for part in gathered), Counter())
