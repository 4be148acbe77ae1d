"""How parameters lie on the processes of a run: whole on each, or divided among them.

A layout puts the objective on its device, wraps it for the processes, finishes gradients that the
wrapper does not average, and makes whole tensors for checkpoints and evaluations. Checkpoints hold
whole tensors whatever the layout, so that a run continues under another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from training.objective import Objective

Prepared = tuple[nn.Module, Any]


class Layout:
    """Every process holds every parameter; gradients are averaged by DistributedDataParallel."""

    trained: Sequence[nn.Parameter] = ()
    fused_skips = True
    """Whether fused optimizer kernels can be told on the device to leave an update out."""
    description = ""
    """What the start-up log says about it."""

    def size(self, parameter: nn.Parameter) -> int:
        """Numbers of the whole parameter."""
        return parameter.numel()

    def own_size(self, parameter: nn.Parameter) -> int:
        """Numbers of the parameter that this process holds."""
        return parameter.numel()

    def place(self, objective: Objective, device: torch.device) -> None:
        """Move the objective to the device, unless `prepare` moves what is left of it."""
        objective.to(device)

    def prepare(
        self, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> Prepared:
        """Objective and optimizer as the loop uses them; both hold whole tensors before.

        Raises:
            ValueError: the objective cannot be laid out so.
        """
        self.remember(objective)
        return accelerator.prepare(objective, optimizer)

    def remember(self, objective: Objective) -> None:
        """Keep what is trained: walking through the modules in every step would take time."""
        self.trained = [p for p in objective.parameters() if p.requires_grad]

    def divide(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Whole tensors of the shapes of a prepared model's parameters, laid out as these are.

        Args:
            tensors: by the names of the model's parameters.
        """
        return tensors

    def clip(self, accelerator: Accelerator, limit: float) -> Tensor:
        """Finish the gradients of a step, and clip them; the global norm before, 0-D."""
        if accelerator.scaler is not None:
            accelerator.unscale_gradients()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if math.isfinite(limit):
            nn.utils.clip_grads_with_norm_(self.trained, limit, norm)
        return norm

    def whole(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors for a checkpoint; every process calls this, with the same names.

        Args:
            tensors: by the name of a parameter or buffer of the objective, of the model alone, or
                `<name>::<key>` for the optimizer's state.
            keep: whether this process, the first of all or none, wants them; others get none. What
                was divided is brought to the CPU one by one.
        """
        return dict(tensors) if keep else {}

    @contextmanager
    def whole_weights(self, objective: Objective) -> Iterator[None]:
        """Inside, every process can call the model alone, as often as it likes."""
        yield


class ExpertParallelLayout(Layout):
    """Experts are divided within groups of consecutive processes, all else is whole everywhere.

    Processes form a grid (copies, degree). What is whole is averaged over all processes by
    DistributedDataParallel; a divided parameter is averaged over the copies of its part alone.

    Args:
        degree: processes that share one copy of the experts; next to each other, so that they are
            on one machine where a machine has so many.
        split: cuts the experts of the model for a process group and returns the parameters' names,
            such as `encoders.expert_parallel.split_experts`.

    Raises:
        ValueError: the processes cannot be divided so.
    """

    def __init__(
        self,
        degree: int,
        split: Callable[[nn.Module, distributed.ProcessGroup], list[str]],
        accelerator: Accelerator,
    ) -> None:
        processes = accelerator.num_processes
        if degree < 1 or processes % degree:
            raise ValueError(
                f"train.expert_parallel {degree} must divide the number of processes, {processes}"
            )
        if accelerator.scaler is not None:
            raise ValueError(
                "train.expert_parallel cannot scale gradients for fp16: choose bf16 or fp32"
            )
        self.degree, self.split = degree, split
        mesh = init_device_mesh(
            accelerator.device.type, (processes // degree, degree), mesh_dim_names=("copy", "part")
        )
        self.copies, self.parts = mesh.get_group("copy"), mesh.get_group("part")
        self.description = f", experts divided among {degree} processes each"
        self._divided: dict[str, nn.Parameter] = {}

    def size(self, parameter: nn.Parameter) -> int:
        divided = any(parameter is one for one in self._divided.values())
        return parameter.numel() * (self.degree if divided else 1)

    def place(self, objective: Objective, device: torch.device) -> None:
        """Nothing yet: whole experts might not fit on the device."""

    def prepare(
        self, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> Prepared:
        try:
            names = self.split(objective, self.parts)
        except ValueError as error:
            raise ValueError(f"train.expert_parallel {self.degree}: {error}") from error
        parameters = dict(objective.named_parameters())
        self._divided = {name: parameters[name] for name in names}
        for parameter in self._divided.values():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = self._own_part(value)
        objective.to(accelerator.device)
        move_state(optimizer)
        self.remember(objective)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, names)
        return accelerator.prepare(objective, optimizer)

    def divide(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        places = dict(model.named_parameters())
        names = {name.removeprefix("model.") for name in self._divided}
        return {
            name: (self._own_part(value) if name in names else value).to(places[name].device)
            for name, value in tensors.items()
        }

    def _own_part(self, value: Tensor) -> Tensor:
        return value.chunk(self.degree)[self.parts.rank()].clone()

    def clip(self, accelerator: Accelerator, limit: float) -> Tensor:
        divided = [p.grad for p in self._divided.values() if p.grad is not None]
        average(divided, self.copies, self.copies.size() * self.degree)
        own = {id(gradient) for gradient in divided}
        gradients = [p.grad for p in self.trained if p.grad is not None]
        whole = [gradient for gradient in gradients if id(gradient) not in own]
        return clip_divided(divided, whole, self.parts, limit)

    def whole(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        names = {name.removeprefix(prefix) for name in self._divided for prefix in ("", "model.")}
        divided = {n for n, v in tensors.items() if v.ndim and n.partition("::")[0] in names}
        found = {n: v for n, v in tensors.items() if keep and n not in divided}
        for name in sorted(divided) if self.copies.rank() == 0 else ():  # one copy is enough
            value = gather_parts(tensors[name], self.parts)
            if keep:
                found[name] = value.cpu()
        return found

    @contextmanager
    def whole_weights(self, objective: Objective) -> Iterator[None]:
        """Every process holds all experts meanwhile: their memory must be there."""
        parts = {name: parameter.data for name, parameter in self._divided.items()}
        for parameter in self._divided.values():
            parameter.data = gather_parts(parameter.data, self.parts)
        try:
            yield
        finally:
            for name, parameter in self._divided.items():
                parameter.data = parts[name]


def average(gradients: list[Tensor], group: distributed.ProcessGroup, count: int) -> None:
    """Add up each gradient over the group and divide it by `count`, in place."""
    if group.size() > 1:
        pending = [distributed.all_reduce(g, group=group, async_op=True) for g in gradients]
        for work in pending:
            work.wait()
    if gradients:
        torch._foreach_div_(gradients, count)


def clip_divided(
    divided: list[Tensor], whole: list[Tensor], group: distributed.ProcessGroup, limit: float
) -> Tensor:
    """Clip gradients by their global norm, every number of which counts once.

    Args:
        divided: this process's parts of gradients that are divided within `group`.
        whole: gradients that are the same on all processes.
        limit: largest norm; infinity leaves gradients as they are.

    Returns:
        The norm before, 0-D.
    """
    squares = _sum_of_squares(divided, (divided or whole)[0])
    distributed.all_reduce(squares, group=group)
    norm = (squares + _sum_of_squares(whole, squares)).sqrt()
    if math.isfinite(limit):
        # The form of torch.nn.utils.clip_grad_norm_, which waits for no device either.
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(divided + whole, factor)
    return norm


def _sum_of_squares(tensors: list[Tensor], like: Tensor) -> Tensor:
    if not tensors:
        return like.new_zeros(())
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def gather_parts(part: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """Parts (n / G, ...) of all processes of the group, in order: (n, ...)."""
    part = part.detach().contiguous()
    whole = part.new_empty(len(part) * group.size(), *part.shape[1:])
    distributed.all_gather_into_tensor(whole, part, group=group)
    return whole


def move_state(optimizer: torch.optim.Optimizer) -> None:
    """Bring loaded state to the devices of its parameters; step counters where AdamW keeps them."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.ndim or parameter.is_cuda):
                state[key] = value.to(parameter.device)
