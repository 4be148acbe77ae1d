"""What a run saves of itself, and how it gets it back."""

from __future__ import annotations

import errno
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from training.background import Background
from training.checkpoint import (
    OPTIMIZER,
    STATE,
    CheckpointError,
    CheckpointWriter,
    list_checkpoints,
    load_optimizer_tensors,
    load_tensors,
    load_weights,
    optimizer_tensors,
    random_state,
    read_manifest,
    read_state,
)
from training.ema import WeightAverage
from training.finite import FiniteGuard
from training.objective import Objective, TrainingStream
from training.parallel import Layout
from training.retention import Retention
from training.snapshot import Snapshot

GUARD = "guard.safetensors"
AVERAGE = "average.safetensors"
TRAINED = "training_weights.safetensors"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


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
        keep: Retention,
        *,
        in_background: bool = False,
        average: WeightAverage | None = None,
        exports_average: bool = False,
    ) -> None:
        self.folder, self.objective, self.optimizer = folder, objective, optimizer
        self.stream, self.accelerator, self.guard = stream, accelerator, guard
        self.layout, self.keep = layout, keep
        self._in_background, self._background = in_background, Background(in_background)
        self._snapshot: Snapshot | None = None
        self._parameters = {name for name, _ in objective.model.named_parameters()}
        self._started, self.earlier_seconds = time.monotonic(), 0.0
        self.average, self.exports_average = average, exports_average
        self.last_step: int | None = None

    def write(self, skipped: Counter[str], **position: int) -> CheckpointWriter:
        """Write everything but the name of a checkpoint, in the background if so configured.

        Args:
            position: `step` and whatever else says how far the run has come.

        Raises:
            SaveError: this checkpoint or the one before cannot be written.
        """
        accelerator, step = self.accelerator, position["step"]
        self.guard.verify(step)
        self.finish()
        writer = CheckpointWriter(self.folder, step)
        state = self._state(skipped, position)
        sources = self._tensor_files()
        main = accelerator.is_main_process
        files = {name: self.layout.whole(tensors, main) for name, tensors in sources.items()}
        if main:
            self._try(writer, partial(self._begin, writer, files))
            if self._in_background:
                self._snapshot = Snapshot(sources, files, self._only_updates_change)
                self._background.do(self._snapshot.finish)
                files = self._snapshot.files
            self._background.do(partial(self._try, writer, partial(_fill, writer, files, state,
                                        self.objective.config_files())))  # fmt: skip
        accelerator.wait_for_everyone()
        own = f"rng/rank_{accelerator.process_index}.safetensors"
        self._try(writer, partial(writer.add_tensors, own, random_state()))
        accelerator.wait_for_everyone()
        return writer

    def settle(self) -> None:
        """Wait until weights and optimizer state may change; called before every update."""
        if self._snapshot is not None:
            self._snapshot.wait()
            self._snapshot = None

    def _tensor_files(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by file, as the training has them."""
        files = self._weights()
        files[OPTIMIZER] = optimizer_tensors(self.optimizer, self.objective)
        if self.guard.leaves_out:
            files[GUARD] = self.guard.state()
        return files

    def _only_updates_change(self, file: str, name: str) -> bool:
        return file in (OPTIMIZER, AVERAGE) or (file != GUARD and name in self._parameters)

    def _begin(self, writer: CheckpointWriter, files: dict[str, dict[str, Tensor]]) -> None:
        writer.begin()
        needed = sum(v.numel() * v.element_size() for file in files.values() for v in file.values())
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free"
            )

    def _try(self, writer: CheckpointWriter, task: Callable[[], Any]) -> None:
        """Do it, or say which checkpoint is lost and which is there."""
        try:
            task()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(writer.partial, ignore_errors=True)
            there = list_checkpoints(self.folder) if self.folder.is_dir() else []
            newest = f"the newest is '{there[-1]}'" if there else "there is none yet"
            raise SaveError(
                f"the checkpoint '{writer.final}' cannot be written: {error}; those before it are"
                f" unharmed, {newest}: make room or mend the folder, then --resume auto"
            ) from error

    def publish(
        self,
        writer: CheckpointWriter,
        position: Mapping[str, int],
        figures: dict[str, float | None],
    ) -> Path | None:
        """Give it its name and remove what is no longer kept; its path on the main process.

        Args:
            figures: of the evaluation of this step, if there was one.
        """
        self.last_step = position["step"]
        if not self.accelerator.is_main_process:
            return None
        seconds = self.earlier_seconds + time.monotonic() - self._started
        facts = {
            **position,
            "world": self.accelerator.num_processes,
            "stream": self.stream.identity(),
            "figures": figures,
            "clock": {"saved_at": round(time.time(), 3), "wall_seconds": round(seconds, 3)},
        }
        del facts["step"]
        self._background.do(partial(self._try, writer, partial(self._seal, writer, facts)))
        return writer.final

    def _seal(self, writer: CheckpointWriter, facts: dict[str, Any]) -> None:
        assert self.last_step is not None
        path = writer.publish(int(writer.final.name.removeprefix("step_")), facts)
        self.keep.prune(self.folder, path)

    def discard(self, writer: CheckpointWriter) -> None:
        """Remove what was written, of a checkpoint that gets no name."""
        if self.accelerator.is_main_process:
            self._background.do(partial(shutil.rmtree, writer.partial, ignore_errors=True))

    def check(self) -> None:
        """Raise SaveError if a checkpoint could not be written in the background."""
        self._background.check()

    def finish(self) -> None:
        """Wait for what is written in the background; raises as `check` does."""
        self._background.finish()
        self._snapshot = None  # whose copies have been written

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Files of weights: what other libraries open, and what training goes on with."""
        present, name = self.objective.model.state_dict(), self.objective.weights_file
        if self.average is None:
            return {name: present}
        averaged = {AVERAGE: self.average.state()}
        if not self.exports_average:
            return {name: present} | averaged
        return {name: self.average.state_dict(), TRAINED: present} | averaged

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
            "optimizer": type(self.optimizer).__name__,
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
        kind = type(self.optimizer).__name__
        if state.get("optimizer", kind) != kind:
            raise CheckpointError(
                f"cannot resume '{folder}': its optimizer is {state['optimizer']}, this run's"
                f" {kind}; set optimizer.kind to match, or start a new run from its weights"
            )
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
        self.earlier_seconds = read_manifest(folder).get("clock", {}).get("wall_seconds", 0.0)
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


def _fill(
    writer: CheckpointWriter,
    files: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    more: dict[str, dict[str, Any]],
) -> None:
    """Write the files of tensors, the state, and further JSON files by name."""
    for name, tensors in files.items():
        writer.add_tensors(name, tensors)
    for name, content in {STATE: state, **more}.items():
        writer.add_json(name, content)


def total_counts(counts: Counter[str], processes: int) -> Counter[str]:
    """Sum of the counts of all processes."""
    if processes == 1:
        return counts
    gathered: list[Any] = [None] * processes
    torch.distributed.all_gather_object(gathered, dict(counts))
    return sum((Counter(part) for part in gathered), Counter())
