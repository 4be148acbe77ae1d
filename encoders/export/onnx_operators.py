"""Operators of the sparse routers that torch's ONNX exporter has no translation for.

ONNX breaks ties of TopK in favour of the lower index, which makes it a stable sort in both
directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`; needs onnxscript."""
    from onnxscript import opset18

    op: Any = opset18

    def sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # Integers as doubles, which hold them exactly: not every runtime sorts integers.
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        _, place = op.TopK(op.Cast(self, to=11), size, axis=dim, largest=int(descending), sorted=1)
        return op.GatherElements(self, place, axis=dim), place

    def searchsorted(sequence: Any, values: Any, right: bool = False, **_: Any) -> Any:
        # How many entries of a row come before each value.
        row = op.Unsqueeze(sequence, op.Constant(value_ints=[-2]))
        column = op.Unsqueeze(values, op.Constant(value_ints=[-1]))
        before = op.LessOrEqual(row, column) if right else op.Less(row, column)
        last = op.Constant(value_ints=[-1])
        return op.ReduceSum(op.Cast(before, to=7), last, keepdims=0)

    aten = torch.ops.aten
    return {aten.sort.stable: sort, aten.searchsorted.Tensor: searchsorted}
