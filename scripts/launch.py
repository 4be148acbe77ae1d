"""What both training commands do around the loop: processes, seeds, run directory, resume."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from data_pipelines.shards import describe_skips
from data_pipelines.stream import Stream
from scripts.cli import save_config
from training.checkpoint import CheckpointError, newest_checkpoint, verify_checkpoint
from training.loop import Trainer
from training.machine import available_cores, plan_cores
from training.objective import Evaluator, Objective
from training.run_directory import check_run_directory, write_environment


class Launch:
    """One run of a configuration that has run_dir, resume, seed, train, optimizer and schedule."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
        if precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("train.precision fp16 needs a GPU: choose fp32 or bf16")
        self.accelerator = Accelerator(mixed_precision=precision)
        check_run_directory(self.run_dir, config.resume)
        self.resume = self._find_checkpoint()
        self.accelerator.wait_for_everyone()

    def _find_checkpoint(self) -> Path | None:
        resume = self.config.resume
        if resume is None:
            return None
        if resume != "auto":
            verify_checkpoint(Path(resume))
            return Path(resume)
        newest, messages = newest_checkpoint(self.run_dir / "checkpoints")
        for message in messages if self.accelerator.is_main_process else ():
            warnings.warn(f"passed over: {message}", stacklevel=2)
        if newest is None and messages:
            raise CheckpointError(f"no checkpoint of '{self.run_dir}' is complete")
        return newest

    def stream_options(self, workers: int | None) -> dict[str, Any]:
        """Arguments of a stream for this process; also sets torch's threads."""
        accelerator, config = self.accelerator, self.config
        plan = plan_cores(
            available_cores(),
            accelerator.num_processes,
            device_is_cpu=accelerator.device.type == "cpu",
            threads=config.train.threads,
            workers=workers,
        )
        torch.set_num_threads(plan.threads)
        return {
            "seed": config.seed,
            "global_batch": config.train.batch_size,
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "workers": plan.workers,
        }

    def seed_models(self) -> None:
        """Make the initial weights a function of the seed, alike on every process."""
        set_seed(self.config.seed)

    def fit(self, objective: Objective, stream: Stream, evaluators: Sequence[Evaluator]) -> None:
        """Prepare the run directory, train, and report what was skipped."""
        config, main = self.config, self.accelerator.is_main_process
        set_seed(config.seed, device_specific=True)  # dropout and mixup differ between processes
        trainer = Trainer(
            objective,
            stream,
            evaluators,
            config.train,
            config.optimizer,
            config.schedule,
            self.accelerator,
            self.run_dir,
            self.resume,
        )
        if main:  # only now, so that settings that are refused leave no folder behind
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if self.resume is None or not (self.run_dir / "config.yaml").exists():
                save_config(config, self.run_dir / "config.yaml")
            write_environment(self.run_dir / "env.json")
            for path in stream.index.truncated:
                tqdm.write(f"warning: '{path}' ends early; its complete samples are used")
        self.accelerator.wait_for_everyone()
        figures = trainer.fit()
        skipped = trainer.total_skipped()
        if main:
            if figures:
                tqdm.write("  ".join(f"{name} {_short(value)}" for name, value in figures.items()))
            if skipped:
                tqdm.write(describe_skips(skipped))
            tqdm.write(f"done: {trainer.last_checkpoint}")
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
