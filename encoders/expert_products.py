"""How a bank of expert MLPs is computed: batched over the bank or, on a CPU, in blocks.

A batched product over the whole bank leaves two things on the table that a CPU pays for. Hidden
activations of all experts do not fit in the cache, and every backward pass asks the system for new
memory for two weight gradients of the size of the bank, whose pages are then mapped one by one.
In blocks, a few experts at a time go through both products, and gradient memory is used again once
its gradient has been released (`optimizer.zero_grad()`). Autograd sees one function that keeps only
the hidden pre-activations and computes the activations again, element by element.

Shape legend: E experts, C rows per expert, d width, h hidden width.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# gelu(z) = z * sigmoid(LINEAR * z + CUBIC * z^3) is the tanh form, as 1 + tanh(u) is
# 2 * sigmoid(2u). torch's CPU kernel for the tanh form takes two to three times as long.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
# Hidden activations of one block; the fastest of 1 to 16 MiB and "all" with 1 MiB of L2 cache.
BLOCK_BYTES = 4 << 20
ALIGNMENT = 64

# First layer: weight (E, d, h), bias (E, h); second layer: weight (E, h, d), bias (E, d).
Bank = tuple[Tensor, Tensor, Tensor, Tensor]


def batched_expert_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """One two-layer MLP with tanh-approximated GELU per expert: (E, C, d) to (E, C, d)."""
    hidden = F.gelu(torch.baddbmm(fc1_bias.unsqueeze(1), x, fc1_weight), approximate="tanh")
    hidden = F.dropout(hidden, dropout)
    return torch.baddbmm(fc2_bias.unsqueeze(1), hidden, fc2_weight)


class ReusedMemory:
    """Memory for one gradient, kept between steps so that its pages stay mapped.

    A copied or unpickled object starts without memory.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._in_use: weakref.ref[np.ndarray] | None = None

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[()]]:
        return ReusedMemory, ()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor; new memory as long as the previous one is in use."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._in_use is not None and self._in_use() is not None:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if self._memory.nbytes != num_bytes:
            # Aligned as torch's own memory is, so that matrix products round alike in every run.
            memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            self._memory = memory[start : start + num_bytes]
        # The tensor's storage owns this view, so the view lives exactly as long as the storage.
        view = self._memory[:]
        self._in_use = weakref.ref(view)
        return torch.from_numpy(view).view(tensor.dtype).view(tensor.shape)


def _blocks(rows: Tensor, hidden_dim: int) -> tuple[int, Iterator[slice]]:
    """Experts per block, and the blocks."""
    experts, rows_per_expert, _ = rows.shape
    expert_bytes = max(1, rows_per_expert * hidden_dim * rows.element_size())
    size = min(experts, max(1, BLOCK_BYTES // expert_bytes))
    return size, (slice(i, min(i + size, experts)) for i in range(0, experts, size))


def _gate(hidden: Tensor, out: Tensor) -> Tensor:
    """The factor between a pre-activation and its GELU."""
    torch.addcmul(hidden.new_tensor(LINEAR), hidden, hidden, value=CUBIC, out=out)
    return out.mul_(hidden).sigmoid_()


def _slope(hidden: Tensor, gate: Tensor, gelu: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """Derivative of GELU: gate + gelu * (1 - gate) * (LINEAR + 3 * CUBIC * hidden^2)."""
    torch.addcmul(hidden.new_tensor(LINEAR), hidden, hidden, value=3 * CUBIC, out=scratch)
    # The vanishing factor first: the other may be too large for a product with gelu.
    return torch.addcmul(gelu, gelu, gate, value=-1, out=out).mul_(scratch).add_(gate)


def _forward(x: Tensor, bank: Bank, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    """Outputs (E, C, d), and the pre-activations (E, C, h) when they are kept."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = bank
    experts, rows, _ = x.shape
    hidden_dim = fc1_weight.shape[2]
    size, blocks = _blocks(x, hidden_dim)
    # A view of (B, E, d) tokens keeps its strides, so that neither side of the bank is copied.
    out = torch.empty_like(x)
    kept = x.new_empty(experts if keep_hidden else size, rows, hidden_dim)
    scratch = x.new_empty(size, rows, hidden_dim)
    for block in blocks:
        length = block.stop - block.start
        hidden = kept[block] if keep_hidden else kept[:length]
        torch.baddbmm(fc1_bias[block].unsqueeze(1), x[block], fc1_weight[block], out=hidden)
        gelu = _gate(hidden, scratch[:length]).mul_(hidden)
        torch.baddbmm(fc2_bias[block].unsqueeze(1), gelu, fc2_weight[block], out=out[block])
    return out, kept


class _BlockedExperts(torch.autograd.Function):
    """Both layers of all experts, with the first derivative in blocks and further ones batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, ctx.memory = rest
        bank = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        out, hidden = _forward(x, bank, keep_hidden=True)
        ctx.save_for_backward(x, *bank, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        *inputs, hidden = ctx.saved_tensors
        (grad_out,) = grad_outputs
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            x, *bank = inputs
            wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
            out = batched_expert_mlp(x, *bank)
            found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
            return *(next(found) if need else None for need in needed), None
        return *_blocked_backward(inputs, hidden, grad_out, needed, ctx.memory), None


def _blocked_backward(
    inputs: list[Tensor],
    hidden: Tensor,
    grad_out: Tensor,
    needed: tuple[bool, ...],
    memory: tuple[ReusedMemory, ReusedMemory],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tokens and the bank, as far as they are needed."""
    x, fc1_weight, fc1_bias, fc2_weight, _ = inputs
    need_x, need_fc1, need_bias1, need_fc2, need_bias2 = needed
    grad_x = torch.empty_like(x) if need_x else None
    grad_fc1 = memory[0].empty_like(fc1_weight) if need_fc1 else None
    grad_bias1 = torch.empty_like(fc1_bias) if need_bias1 else None
    grad_fc2 = memory[1].empty_like(fc2_weight) if need_fc2 else None
    size, blocks = _blocks(x, hidden.shape[2])
    scratch = hidden.new_empty(4, size, *hidden.shape[1:])
    for block in blocks:
        gate, gelu, slope, grad_hidden = scratch[:, : block.stop - block.start]
        torch.mul(_gate(hidden[block], gate), hidden[block], out=gelu)
        if grad_fc2 is not None:
            torch.bmm(gelu.mT, grad_out[block], out=grad_fc2[block])
        _slope(hidden[block], gate, gelu, out=slope, scratch=grad_hidden)
        torch.bmm(grad_out[block], fc2_weight[block].mT, out=grad_hidden)
        grad_hidden.mul_(slope)
        if grad_bias1 is not None:
            torch.sum(grad_hidden, 1, out=grad_bias1[block])
        if grad_fc1 is not None:
            torch.bmm(x[block].mT, grad_hidden, out=grad_fc1[block])
        if grad_x is not None:
            torch.bmm(grad_hidden, fc1_weight[block].mT, out=grad_x[block])
    return grad_x, grad_fc1, grad_bias1, grad_fc2, grad_out.sum(1) if need_bias2 else None


def can_run_blocked(x: Tensor) -> bool:
    """True for float32 or float64 tokens on a CPU in eager mode, outside autocast.

    Compilers, tracers and tensor subclasses see the batched products instead, which they can take
    apart; half precisions would lose digits in the steps of the activation.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and type(x) in (Tensor, torch.nn.Parameter)
    )


def blocked_expert_mlp(x: Tensor, bank: Bank, memory: tuple[ReusedMemory, ReusedMemory]) -> Tensor:
    """`batched_expert_mlp` without dropout, where `can_run_blocked` is true.

    Args:
        x: (E, C, d), float32 or float64.
        bank: weights and biases.
        memory: where the gradients of the two weights go.

    Returns:
        (E, C, d).
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *bank)):
        return _BlockedExperts.apply(x, *bank, memory)
    return _forward(x, bank, keep_hidden=False)[0]
