"""Expert parallelism: each process of a group holds an equal run of every bank's experts.

Every process keeps its own images, and its own copy of all that is no expert. A bank gets one block
of rows for each of all experts, as ever; two equal, static all-to-alls carry the blocks to the
processes that own the experts and the outputs back. Shapes follow from the configuration, so no
counts are exchanged and nothing waits for the device.

The backward pass of an exchange is the exchange the other way round: an expert's gradient is the
*sum* over the losses of its group's processes, where data parallelism takes the *mean* over all.
`training.expert_parallel` divides.

Shape legend: E experts, G processes of the group, C rows per expert of one process, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrize

from encoders.experts import ExpertMLP


class _Exchange(torch.autograd.Function):
    """Block i of the first axis goes to process i of the group; its own inverse."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(blocks, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return _all_to_all(gradients[0], ctx.group), None


def _all_to_all(blocks: Tensor, group: distributed.ProcessGroup) -> Tensor:
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    distributed.all_to_all_single(received, blocks, group=group)
    return received


class ExpertExchange:
    """The hooks of one bank. A bank that holds all its experts, as for an evaluation, needs none.

    A copy of a split bank, which `copy.deepcopy` makes, exchanges in the same group.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertExchange:
        return self

    def to_owners(self, bank: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        """Rows of this process for all experts, (E, C, d), to all rows of its own experts,
        (E / G, G * C, d)."""
        rows = arguments[0]
        own, size = len(bank.get_parameter("fc1_weight")), self.group.size()
        if own == len(rows):
            return (rows,)
        if own * size != len(rows):
            raise ValueError(
                f"x of shape {tuple(rows.shape)} must have one block of rows for each of"
                f" {own * size} experts"
            )
        received = _Exchange.apply(rows, self.group).unflatten(0, (size, own))  # by sender
        return (received.transpose(0, 1).flatten(1, 2),)

    def to_senders(
        self, bank: nn.Module, arguments: tuple[Any, ...], outputs: Tensor
    ) -> Tensor | None:
        """The way back: (E / G, G * C, d) to (E, C, d)."""
        size = self.group.size()
        if len(outputs) == bank.num_experts:
            return None
        blocks = outputs.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)
        return _Exchange.apply(blocks, self.group)


def split_experts(model: nn.Module, group: distributed.ProcessGroup) -> list[str]:
    """Keep this process's run of every bank's experts, and give the banks their exchange.

    Parameters stay the same objects, with the first axis cut to E / G: process i of the group keeps
    experts i * E / G to (i + 1) * E / G. Every process must call the model as often as the others
    of its group, with as many images.

    Args:
        model: holds whole banks, with the same values on all processes.
        group: the processes among which they are divided.

    Returns:
        The names of the parameters that were cut.

    Raises:
        ValueError: no bank, one with adapters, or one that cannot be divided.
    """
    banks = {name: bank for name, bank in model.named_modules() if isinstance(bank, ExpertMLP)}
    if not banks:
        raise ValueError("there are no experts to divide, the model has no routed layers")
    for name, bank in banks.items():
        if parametrize.is_parametrized(bank):
            raise ValueError(f"'{name}' has adapters: merge them before experts are divided")
        if bank.num_experts % group.size():
            raise ValueError(
                f"'{name}' has {bank.num_experts} experts, which cannot be divided among"
                f" {group.size()} processes"
            )
    cut = []
    for prefix, bank in banks.items():
        for name, parameter in bank.named_parameters():
            own = parameter.detach().chunk(group.size())[group.rank()]
            parameter.data = own.clone()  # a view would keep the whole bank in memory
            cut.append(f"{prefix}.{name}")
        exchange = ExpertExchange(group)
        bank.register_forward_pre_hook(exchange.to_owners)
        bank.register_forward_hook(exchange.to_senders)
    return cut
