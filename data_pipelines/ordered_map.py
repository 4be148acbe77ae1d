"""A function over many inputs, in several processes, results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

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
) -> Iterator[Result]:
    """Results of `function` for `inputs`, in their order, whatever the number of `workers`.

    torch's loader brings what this needs: a bounded number of results ahead of their use, and
    workers that end when this process does. With 0 workers everything happens here.
    """
    calls = _Calls(function, inputs)
    workers = min(workers, len(inputs))
    return iter(
        DataLoader(
            calls,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=worker_start if workers else None,
        )
    )


def _as_it_is(value: Any) -> Any:
    return value
