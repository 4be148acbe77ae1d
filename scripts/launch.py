"""What both training commands do around the loop: processes, seeds, run directory, resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from data_pipelines.shards import describe_skips
from data_pipelines.stream import Stream
from encoders.expert_parallel import split_experts
from scripts.cli import plain_settings, save_config
from training.checkpoint import CheckpointError, newest_checkpoint, verify_checkpoint
from training.fsdp import ShardedLayout, take_over_launcher
from training.loop import Trainer
from training.machine import available_cores, local_processes, plan_cores
from training.objective import Batch, Evaluator, Objective
from training.parallel import ExpertParallelLayout, Layout
from training.run_directory import (
    SETTINGS,
    check_run_directory,
    flat_settings,
    write_environment,
)
from training.run_log import run_log, say
from training.signals import RESUMABLE
from training.tracking import Report

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
# Optimizers that treat every number of a parameter for itself.
ELEMENTWISE = ("adamw", "lion")


class Launch:
    """One run of a configuration that has run_dir, resume, seed, train, optimizer and schedule."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        precision = config.train.precision
        if precision in ("tf32", "fp16") and not torch.cuda.is_available():
            raise ValueError(f"train.precision {precision} needs a GPU: choose fp32 or bf16")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            precision == "tf32"
        )
        precision = "no" if precision in ("fp32", "tf32") else precision
        self.fsdp = take_over_launcher() or config.train.fsdp
        self.accelerator = Accelerator(mixed_precision=precision)
        kind = self.accelerator.distributed_type
        if kind not in SUPPORTED:
            raise ValueError(
                f"accelerate was configured for {kind.value}; only plain data parallelism and"
                " FSDP2 are supported (no FSDP1 or DeepSpeed): run `accelerate config` again, or"
                " launch with --multi_gpu, or with --use_fsdp --fsdp_version 2"
            )
        # The loop divides by its own accumulation; a setting of accelerate's must not do it again.
        self.accelerator.gradient_accumulation_steps = 1
        settings, defaults = plain_settings(config), plain_settings(type(config)())
        self.changes = check_run_directory(self.run_dir, config.resume, settings, defaults)
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
        if newest is None and self.accelerator.is_main_process:
            print("no checkpoint yet, starting at step 0")
        return newest

    def stream_options(self, workers: int | None) -> dict[str, Any]:
        """Arguments of a stream for this process; also sets torch's threads."""
        accelerator, config = self.accelerator, self.config
        plan = plan_cores(
            available_cores(),
            local_processes(accelerator.num_processes),
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

    def fit(
        self,
        objective: Objective,
        stream: Stream,
        evaluators: Sequence[Evaluator],
        notes: Sequence[str] = (),
        *,
        describe: Callable[[Batch], list[str]] | None = None,
    ) -> None:
        """Prepare the run directory, train, and report what was skipped.

        The log begins with `notes`; see `Report` for `describe`.
        Nothing is written before the trainer has accepted its
        settings, nor by a finished run.
        """
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
            layout=self._layout(),
            report=Report(flat_settings(plain_settings(config)), describe),
        )
        if trainer.step < trainer.plan.steps or trainer.owes_evaluation():
            if main:  # only now, so that settings that are refused leave no folder behind
                self._prepare_folder()
            self.accelerator.wait_for_everyone()
            with run_log(self.run_dir / "train.log") if main else nullcontext():
                for note in notes if main else ():
                    say(note)
                self._train(trainer, stream)
        elif main:
            steps = trainer.plan.steps
            print(f"already at step {trainer.step} of {steps}: nothing left to train")
        if self.accelerator.num_processes > 1:
            self.accelerator.end_training()
        if trainer.stopped is not None:
            raise SystemExit(RESUMABLE)

    def _layout(self) -> Layout:
        """How parameters lie on the processes.

        Raises:
            ValueError: the settings do not go together, or do not suit the processes.
        """
        degree = self.config.train.expert_parallel
        if self.fsdp and degree != 1:
            raise ValueError(
                "train.fsdp and train.expert_parallel both divide the experts: set train.fsdp to"
                " false or train.expert_parallel to 1"
            )
        divides = self.fsdp or degree != 1
        if divides and self.config.optimizer.kind not in ELEMENTWISE:
            raise ValueError(
                f"optimizer.kind {self.config.optimizer.kind} looks at whole parameters, which"
                f" {'train.fsdp' if self.fsdp else 'train.expert_parallel'} divides: choose"
                f" {' or '.join(ELEMENTWISE)}"
            )
        if degree != 1:
            return ExpertParallelLayout(degree, split_experts, self.accelerator)
        if self.fsdp and self.accelerator.num_processes > 1:
            return ShardedLayout(self.accelerator)
        return Layout()

    def _prepare_folder(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # A start in the folder of one that failed at once has its own settings, not those.
        fresh = self.config.resume is None or not (self.run_dir / SETTINGS).exists()
        if fresh or set(self.changes) - {"resume", "run_dir"}:
            save_config(self.config, self.run_dir / SETTINGS)
        write_environment(self.run_dir / "env.json")

    def _train(self, trainer: Trainer, stream: Stream) -> None:
        """Run the loop and say on the main process what came of it."""
        main = self.accelerator.is_main_process
        if main and "train.steps" in self.changes:
            say(self.changes["train.steps"])
        cut = [
            f"warning: '{path}' ends early; its complete samples are used"
            for path in (stream.index.truncated if main else ())
        ]
        for line in cut:
            say(line)
        figures = trainer.fit()
        skipped = trainer.total_skipped()
        if not main:
            return
        if figures:
            say("  ".join(f"{name} {_short(value)}" for name, value in figures.items()))
        if skipped:
            say(describe_skips(skipped))
        for line in cut:
            say(line)
        if trainer.stopped is not None:
            say(
                f"stopped by {trainer.stopped} after step {trainer.step} of {trainer.plan.steps}:"
                f" {trainer.last_checkpoint}; --resume auto goes on"
            )
        else:
            say(f"done: {trainer.last_checkpoint}")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
