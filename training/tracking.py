"""What a run tells about itself: rows of figures, trackers, the first batches, a summary."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from torch import Tensor

from training.config import TrainConfig
from training.durations import duration_text
from training.objective import Batch, Metrics
from training.progress import Progress
from training.run_directory import MetricsWriter
from training.run_log import LOGGER, say
from training.sample_sheet import draw_sheet

PROJECT = "softmoe-clip"
SHEETS = 2  # first batches that are drawn
# Dense half-precision TFLOP/s by the makers' data sheets, by the names that CUDA gives.
PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H200": 989.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0,
}  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"train.trackers: {name} is not installed: pip install {name}")


def peak_tflops(train: TrainConfig, device: torch.device) -> float:
    """What a device can do at most in the precision of a run; 0 where it is not known."""
    if train.peak_tflops or device.type != "cuda" or train.precision not in ("bf16", "fp16"):
        return train.peak_tflops
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device), 0.0)


@dataclass(frozen=True)
class Report:
    """What a run can tell about itself.

    Attributes:
        settings: by dotted name, for trackers.
        describe: captions of the rows of a batch, for the pictures of the first batches.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    describe: Callable[[Batch], list[str]] | None = None


class Tracking:
    """Writes what the main process reports; the others only take part in the means.

    Args:
        resumed_step: where the run goes on; later rows of its files are dropped.
        flops: of a training step, for one sample; None unless they and the peak are known.
    """

    def __init__(
        self,
        run_dir: Path,
        train: TrainConfig,
        accelerator: Accelerator,
        progress: Progress,
        report: Report,
        *,
        resumed_step: int,
        flops: float | None,
    ) -> None:
        self.run_dir, self.train, self.accelerator = run_dir, train, accelerator
        self.progress, self.report, self.flops = progress, report, flops
        self._start, self._first, self._last_row = time.perf_counter(), resumed_step, {}
        self._sheets = SHEETS if resumed_step == 0 and train.sample_sheets else 0
        self.writer: MetricsWriter | None = None
        if accelerator.is_main_process:
            self.writer = MetricsWriter(
                run_dir, resumed_step=resumed_step, tensorboard=train.tensorboard
            )
        if train.trackers:
            accelerator.log_with = filter_trackers(list(train.trackers), str(run_dir))
            accelerator.init_trackers(PROJECT, dict(report.settings), self._tracker_options())

    def row(
        self,
        position: Mapping[str, int],
        loss: Tensor,
        norm: Tensor,
        metrics: Metrics,
        rates: Mapping[str, float],
        counts: Mapping[str, Any],
    ) -> None:
        """Write a row of metrics: means and counts over all processes.

        Args:
            rates: learning rates by name.
            counts: left out while they are zero.
        """
        names = sorted(metrics)
        stacked = torch.stack([loss.float(), *(metrics[name].float() for name in names)])
        stacked = self.accelerator.reduce(stacked, reduction="mean")
        if self.writer is None:
            return
        values = dict(zip(["loss", *names], stacked.tolist(), strict=True))
        speed = self.progress.speed()
        self._last_row = {
            "samples": position["samples"],
            **values,
            "grad_norm": float(norm),
            **rates,
            **speed,
            **self._machine(speed["samples_per_second"]),
            **{name: count for name, count in counts.items() if count},
        }
        self._write("metrics", position["step"], self._last_row)
        self.progress.show(values["loss"], speed)

    def evaluation(self, position: Mapping[str, int], figures: Mapping[str, float | None]) -> None:
        """Write a row of an evaluation."""
        if self.writer is not None and figures:
            values = {"samples": position["samples"], **figures}
            self._write("eval", position["step"], values)
            LOGGER.info("evaluation at step %d: %s", position["step"], dict(figures))

    def _write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        assert self.writer is not None
        self.writer.write(name, step, values)
        numbers = {f"{name}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if self.train.trackers:
            self.accelerator.log(numbers, step=step)

    def _machine(self, samples_per_second: float) -> dict[str, float]:
        """Memory in use at most, and the share of the device's arithmetic that the model uses."""
        device = self.accelerator.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = psutil.Process().memory_info().rss
        found = {"memory_gb": round(memory / 1e9, 3)}
        if self.flops is None:
            return found
        tflops = 1e-12 * self.flops * samples_per_second / self.accelerator.num_processes
        found["tflops"] = round(tflops, 4)
        return found | {"mfu": round(tflops / peak_tflops(self.train, device), 4)}

    def draw(self, batch: Batch, step: int) -> None:
        """Draw the first batches of a run, as they reach the model, into `samples/`, and for
        trackers that take pictures."""
        images = batch.get("image")
        if self.writer is None or self._sheets == 0 or not isinstance(images, Tensor):
            return
        self._sheets -= 1
        captions = list(batch.get("key", [""] * len(images)))
        if self.report.describe is not None:
            captions = self.report.describe(batch)
        path = self.run_dir / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = draw_sheet(images, captions)
        sheet.save(path)
        self.writer.write_picture("samples", step, sheet)
        for tracker in self.accelerator.trackers if self.train.trackers else ():
            if hasattr(tracker, "log_images"):  # not all can take pictures
                tracker.log_images({"samples": [sheet]}, step=step)

    def summary(self, step: int, skipped: Counter[str]) -> None:
        """Say what the run has done since it was started, on the main process."""
        if self.writer is None:
            return
        elapsed, steps = time.perf_counter() - self._start, step - self._first
        samples = steps * self.train.batch_size
        words = f"summary: steps {self._first + 1} to {step}, {samples} samples in"
        words += f" {duration_text(elapsed)} ({samples / elapsed:.0f} a second, evaluations and"
        words += (
            f" checkpoints included; {self.progress.total_wait / elapsed:.0%} waiting for data)"
        )
        if "loss" in self._last_row:
            words += f"; last loss {self._last_row['loss']:.4g}"
        if skipped:
            words += f"; {skipped.total()} samples skipped by this process"
        say(words if steps else f"summary: no step was done in {duration_text(elapsed)}")

    def close(self) -> None:
        for tracker in self.accelerator.trackers if self.train.trackers else ():
            tracker.finish()
        if self.writer is not None:
            self.writer.close()

    def _tracker_options(self) -> dict[str, Any]:
        """Options by tracker that let a resumed run append to its own records."""
        if self.writer is None:
            return {}
        file = self.run_dir / "tracker_id.txt"
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        run_id, name = file.read_text(encoding="utf-8").strip(), self.run_dir.name
        return {
            "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(self.run_dir)},
            "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
        }
