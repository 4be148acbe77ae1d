"""What is due after a step: an evaluation, a checkpoint, or both, and how a stop ends them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from training.checkpoint import CheckpointWriter
from training.evaluation import Figures
from training.saving import Saver
from training.signals import Interrupted


class Milestones:
    """Evaluates and saves, so that neither a failure nor a stop in an evaluation loses the step.

    The checkpoint is written before the evaluation and gets its name after it. So an evaluation
    that fails does not lose the step, not even where only one process fails and nothing can be
    gathered any more; and one that is killed is repeated.

    Args:
        evaluate: runs all evaluators; raises `Interrupted` when a stop ends it.
        enter: told what begins, see `training.processes.PHASES`.

    Attributes:
        last_checkpoint: on the main process, the newest that has its name or is about to get it.
        interrupted: whether a stop has ended an evaluation.
    """

    def __init__(
        self,
        saver: Saver,
        evaluate: Callable[[], Figures],
        enter: Callable[[str], None],
        last_checkpoint: Path | None,
    ) -> None:
        self.saver, self.evaluate, self.enter = saver, evaluate, enter
        self.last_checkpoint, self.interrupted = last_checkpoint, False
        self._pending: tuple[CheckpointWriter, Mapping[str, int]] | None = None
        self._publishing = threading.Lock()

    def reach(
        self, position: Mapping[str, int], skipped: Counter[str], *, evaluates: bool, saves: bool
    ) -> Figures:
        """Do what is due after the step of `position`, on all processes; returns the figures.

        Raises:
            NonFiniteError: the weights have been updated with values that are not finite.
            SaveError: the checkpoint, or the one before, cannot be written.
        """
        saves = saves or (evaluates and bool(self.saver.keep.best))
        figures: Figures = {}
        # Several processes cannot leave an evaluation together, so a stop in it needs a checkpoint
        # that is written already.
        if saves or (evaluates and self.saver.accelerator.num_processes > 1):
            self.enter("saving")
            self._pending = self.saver.write(skipped, **position), position
        try:
            if evaluates:
                self.enter("evaluating")
                self.saver.settle()  # an average may take the place of the weights
                figures = self.evaluate()
        except Interrupted:
            self.interrupted = True
        finally:
            self.enter("saving")
            self._end(saves, figures)
        if saves:
            self.saver.accelerator.wait_for_everyone()
        return figures

    def _end(self, saves: bool, figures: Figures) -> bool:
        """Name the checkpoint that has been written, or discard it; whether there was one."""
        with self._publishing:
            if self._pending is None:
                return False
            writer, position = self._pending
            self._pending = None
            if saves:
                self.last_checkpoint = self.saver.publish(writer, position, figures)
            else:
                self.saver.discard(writer)
            return True

    def rescue(self) -> str:
        """What the watch does on the main process for a main thread that cannot leave an
        evaluation: publish the checkpoint that was written before it.

        Returns:
            Words about it; none if the main thread has just left the evaluation by itself.
        """
        if not self._end(True, {}):
            return ""
        self.saver.finish()
        return f"checkpoint {self.last_checkpoint}"
