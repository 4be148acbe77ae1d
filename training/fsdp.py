"""Fully sharded data parallelism: every parameter is divided among all processes (torch's FSDP2).

Accelerate leaves its own FSDP2 support out on CPUs, where it could be tested, and cannot leave out
parameters of no axes, which cannot be divided; so `fully_shard` is applied here, and Accelerate
does what it does for any data-parallel run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.objective import Objective
from training.parallel import Layout, Prepared, average, clip_divided, move_state

# What modules call the names of their parameters that must not be rounded.
FLOAT32 = "float32_parameters"
# What Accelerate calls features that it would add to FSDP2.
UNSUPPORTED = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")


class ShardedLayout(Layout):
    """Parameters, gradients and optimizer state are divided along their first axis.

    A block's parameters are gathered when it runs and forgotten after it; what is outside of blocks
    is gathered for the whole step. Under bf16 they are gathered as bf16, and gradients are averaged
    as float32. Parameters of no axes, such as a logit scale, and those that a module lists in
    `float32_parameters`, such as its router's, are whole on all processes.

    Raises:
        ValueError: gradients are to be scaled for fp16.
    """

    fused_skips = False  # kernels take no mixture of divided parameters and a whole flag
    description = ", all parameters divided"

    def __init__(self, accelerator: Accelerator) -> None:
        if accelerator.scaler is not None:
            raise ValueError("train.fsdp cannot scale gradients for fp16: choose bf16 or fp32")
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.group = self.mesh.get_group()
        self._whole: list[nn.Parameter] = []

    def own_size(self, parameter: nn.Parameter) -> int:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return local.numel()

    def place(self, objective: Objective, device: torch.device) -> None:
        """Nothing yet: the whole objective might not fit on the device."""

    def prepare(
        self, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
    ) -> Prepared:
        before = dict(objective.named_parameters())
        self._whole = whole_parameters(objective)
        bf16 = accelerator.mixed_precision == "bf16"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None
        shard(objective, self.mesh, set(self._whole), policy or MixedPrecisionPolicy())
        _move_rest(objective, accelerator.device)
        after = dict(objective.named_parameters())
        swapped: dict[Tensor, nn.Parameter] = {before[name]: after[name] for name in before}
        _swap(optimizer, swapped)
        self.remember(objective)
        # Autocast would keep the weights that it has converted until the end of the pass.
        accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        # In the mode for evaluations, Accelerate adds mixed precision and no other wrapper.
        wrapped = accelerator.prepare_model(objective, evaluation_mode=True)
        return wrapped, accelerator.prepare(optimizer)

    def divide(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        places = dict(model.named_parameters())
        return {
            name: _divide(value.to(places[name].device), places[name])
            for name, value in tensors.items()
        }

    def clip(self, accelerator: Accelerator, limit: float) -> Tensor:
        whole = [p.grad for p in self._whole if p.grad is not None]
        average(whole, self.group, self.group.size())
        gradients = [p.grad for p in self.trained if p.grad is not None]
        parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        return clip_divided(parts, whole, self.group, limit)

    def whole(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        found = {}
        for name, value in tensors.items():
            if isinstance(value, DTensor):
                value = value.full_tensor()
                if keep:
                    value = value.cpu()
            if keep:
                found[name] = value
        return found

    @contextmanager
    def whole_weights(self, objective: Objective) -> Iterator[None]:
        """Every process holds all parameters meanwhile: their memory must be there."""
        units = [module for module in objective.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit is not objective, recurse=False)
                unit.reshard()


def whole_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those that cannot be divided, or must not be rounded."""
    found = {parameter: None for parameter in module.parameters() if parameter.ndim == 0}
    for child in module.modules():
        found |= {child.get_parameter(name): None for name in getattr(child, FLOAT32, ())}
    return list(found)


def shard(
    objective: nn.Module,
    mesh: DeviceMesh,
    whole: set[nn.Parameter],
    policy: MixedPrecisionPolicy,
) -> None:
    """Divide the parameters of a module in place: its blocks one by one, then what is left.

    Args:
        whole: parameters that stay as they are.
        policy: types that parameters are gathered and gradients averaged in.
    """
    for block in blocks(objective):
        fully_shard(block, mesh=mesh, ignored_params=whole, mp_policy=policy)
    fully_shard(objective, mesh=mesh, ignored_params=whole, mp_policy=policy)


def _move_rest(module: nn.Module, device: torch.device) -> None:
    """Move what is not divided; `to` would meet parameters that it must not touch."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = buffer.to(device)
        for parameter in child.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The members of all lists and sequences of composite modules of one kind, such as the blocks
    of a transformer, that are not inside one another."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len(members) > 1 and all(isinstance(one, type(members[0])) for one in members)
        if alike and any(members[0].children()):
            found += members
        else:
            found += blocks(child)
    return found


def _swap(optimizer: torch.optim.Optimizer, swapped: Mapping[Tensor, nn.Parameter]) -> None:
    """Give an optimizer divided parameters for whole ones, and divide its state likewise.

    Whole parameters get groups of their own, because fused kernels take no mixture.
    """
    groups = []
    for group in optimizer.param_groups:
        new = [swapped[parameter] for parameter in group["params"]]
        for kind in (True, False):
            chosen = [parameter for parameter in new if isinstance(parameter, DTensor) == kind]
            if chosen:
                groups.append({**group, "params": chosen})
    optimizer.param_groups[:] = groups
    for old, state in list(optimizer.state.items()):
        new = swapped[old]
        if new is not old:
            del optimizer.state[old]
            optimizer.state[new] = {key: _divide(value, new) for key, value in state.items()}
    move_state(optimizer)


def _divide(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or not value.ndim:
        return value
    # Without a source rank: every process has the whole tensor and keeps its part.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def take_over_launcher(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was asked for FSDP2, which then is left to this module.

    Removes Accelerate's switch, so that it prepares a plain data-parallel run. FSDP1 stays with
    Accelerate.

    Raises:
        ValueError: Accelerate was asked for something of FSDP2 that this module does not do.
    """
    asked = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or environment.get("FSDP_VERSION", "1") != "2":
        return False
    for name in UNSUPPORTED:
        if environment.get(name, "false").lower() == "true":
            raise ValueError(
                f"accelerate was configured with {name.lower()}, which is not supported: set it to"
                " false"
            )
    del environment["ACCELERATE_USE_FSDP"]
    return True
