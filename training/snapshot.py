"""Copies of tensors for a thread that writes them while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

from torch import Tensor

Files = dict[str, dict[str, Tensor]]


class Snapshot:
    """Tensors by file as they are now, copied to the CPU: some at once, most a little later.

    A forward and a backward pass leave weights and the optimizer's state as they are. So a thread
    can copy those beside the next step, and only its update has to `wait`. (On a GPU the thread's
    copies queue in the stream of the training: their order is right, but they do not overlap.)

    Args:
        sources: the tensors of the training, by file and name.
        whole: what is to be written of them; what is another tensor is a copy already.
        later: whether nothing but an update changes a tensor, given file and name.
    """

    def __init__(self, sources: Files, whole: Files, later: Callable[[str, str], bool]) -> None:
        self.files: Files = {file: dict(tensors) for file, tensors in whole.items()}
        self._later: list[tuple[str, str]] = []
        self._done = Event()
        for file, tensors in self.files.items():
            for name, value in tensors.items():
                if value is not sources[file][name]:
                    continue
                if later(file, name):
                    self._later.append((file, name))
                else:
                    tensors[name] = value.detach().to("cpu", copy=True)

    def finish(self) -> None:
        """Copy the rest; for the thread."""
        try:
            for file, name in self._later:
                self.files[file][name] = self.files[file][name].detach().to("cpu", copy=True)
        finally:
            self._done.set()

    def wait(self) -> None:
        """Return when everything has been copied, or could not be."""
        self._done.wait()
