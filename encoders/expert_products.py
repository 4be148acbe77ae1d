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
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F

# gelu(z) = z * sigmoid(LINEAR * z + CUBIC * z^3) is the tanh form, as 1 + tanh(u) is
# 2 * sigmoid(2u). These steps are cheaper on a CPU than torch's own kernel for the tanh form.
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
# Hidden activations of one block: few enough for the cache, enough to keep the products large.
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

    Safe for backward passes in several threads. A copied or unpickled object starts without memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory = np.empty(0, np.uint8)
        self._in_use: weakref.ref[np.ndarray] | None = None

    def __reduce__(self) -> tuple[type[ReusedMemory], tuple[()]]:
        return ReusedMemory, ()

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised contiguous tensor; new memory as long as the previous one is in use."""
        num_bytes = tensor.numel() * tensor.element_size()
        # Between the look and the mark, no other thread may take the same memory.
        with self._lock:
            if self._in_use is not None and self._in_use() is not None:
                return torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if self._memory.nbytes != num_bytes:
                # Aligned as torch's own memory is, so that matrix products round alike in any run.
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
        # With create_graph=True, or for a batch of gradients (is_grads_batched=True).
        if torch.is_grad_enabled() or not _are_plain(grad_out):
            return *_batched_backward(inputs, grad_out, needed), None
        return *_blocked_backward(inputs, hidden, grad_out, needed, ctx.memory), None


def _batched_backward(
    inputs: list[Tensor], grad_out: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients by autograd through `batched_expert_mlp`, which can differentiate them again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: where the tokens themselves depend on the bank, as in bank(bank(x)), the gradient
        # of the original tensors would go through that path as well, and count it twice.
        views = [tensor.view_as(tensor) for tensor in inputs]
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = views
        out = batched_expert_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needed)


def _blocked_backward(
    inputs: list[Tensor],
    hidden: Tensor,
    grad_out: Tensor,
    needed: tuple[bool, ...],
    memory: tuple[ReusedMemory | None, ReusedMemory | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of the tokens and the bank, as far as they are needed."""
    x, fc1_weight, fc1_bias, fc2_weight, _ = inputs
    need_x, need_fc1, need_bias1, need_fc2, need_bias2 = needed
    grad_x = torch.empty_like(x) if need_x else None
    grad_fc1 = _gradient_like(fc1_weight, memory[0]) if need_fc1 else None
    grad_bias1 = torch.empty_like(fc1_bias) if need_bias1 else None
    grad_fc2 = _gradient_like(fc2_weight, memory[1]) if need_fc2 else None
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


def _gradient_like(weight: Tensor, memory: ReusedMemory | None) -> Tensor:
    """Uninitialised memory for the gradient of `weight`."""
    if memory is None:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    return memory.empty_like(weight)


def _are_plain(*tensors: Tensor) -> bool:
    """No subclasses, no transform of `torch.func` (vmap, grad, jvp), no tangents, and no batches of
    gradients (`is_grads_batched`), which have a vmap of their own.
    """
    return (
        # The mark by which torch.autograd.Function itself knows a transform.
        not torch._C._are_functorch_transforms_active()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and not any(is_legacy_batchedtensor(tensor) for tensor in tensors)
        and all(forward_ad.unpack_dual(tensor).tangent is None for tensor in tensors)
    )


def can_run_blocked(x: Tensor, bank: Bank) -> bool:
    """True for float32 or float64 tokens on a CPU in eager mode, outside autocast.

    Compilers, tracers, function transforms, forward-mode differentiation and tensor subclasses see
    the batched products instead, which they can take apart; half precisions would lose digits in
    the steps of the activation.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and _are_plain(x, *bank)
    )


def blocked_expert_mlp(x: Tensor, bank: Bank, memory: tuple[ReusedMemory, ReusedMemory]) -> Tensor:
    """`batched_expert_mlp` without dropout, where `can_run_blocked` is true.

    Args:
        x: (E, C, d), float32 or float64.
        bank: weights and biases.
        memory: where the gradients of the two weights go, if these are leaves.

    Returns:
        (E, C, d).
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *bank)):
        # The gradient of a computed weight, such as an adapted one, does not outlive the backward
        # pass: memory kept for it would only lie idle.
        kept = [
            one if weight.is_leaf else None for one, weight in zip(memory, bank[::2], strict=True)
        ]
        return _BlockedExperts.apply(x, *bank, kept)
    return _forward(x, bank, keep_hidden=False)[0]
