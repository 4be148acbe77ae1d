"""A function over many inputs, in several processes, results in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipelines.loaders import iterate

Input = TypeVar("Input")
Result = TypeVar("Result")


class _Calls(Dataset[Any], Generic[Input, Result]):
    def __init__(self, function: Callable[[Input], Result], inputs: Sequence[Input]) -> None:
        self.function, self.inputs = function, inputs

    def __getitem__(self, index: int) -> Result:
        return self.function(self.inputs[index])

    def __len__(self) -> int:
        return len(self.inputs)


def ordered_map(
    function: Callable[[Input], Result],
    inputs: Sequence[Input],
    workers: int,
    worker_start: Callable[[int], None] | None = None,
    at: Callable[[int], str | None] = lambda _: None,
) -> Iterator[Result]:
    """Results of `function` for `inputs`, in their order, whatever the number of `workers`.

    torch's loader brings what this needs: a bounded number of results ahead of their use, and
    errors that come through. With 0 workers everything happens here; `worker_start` is called in
    each worker with its number, and `at` says what a process that has died was at.

    Raises:
        LoaderError: a worker has died.
    """
    calls = _Calls(function, inputs)
    workers = min(workers, len(inputs))
    loader = DataLoader(
        calls,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        # A loader draws one number; not from the generator that training uses.
        generator=torch.Generator(),
        worker_init_fn=partial(_start, worker_start),
    )
    return iterate(loader, at)


def _start(worker_start: Callable[[int], None] | None, worker: int) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if worker_start is not None:
        worker_start(worker)


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for ever for somebody to read its results."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _as_it_is(value: Any) -> Any:
    return value
