"""How large a model is and what one image costs, for models of any size: no weight is needed.

Everything works for models on the "meta" device, where 54 billion parameters take no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from encoders.experts import ExpertMLP
from encoders.flops import image_flops
from encoders.sparse_base import SparseMoE
from encoders.sparse_moe import TokensChoice

# Weights, gradients and the two moments of Adam, all in float32.
TRAINING_BYTES = 16


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    `parameters` of the whole model, `expert_parameters` those of all experts, `image_parameters`
    what one image uses at most (Soft MoE: all; Tokens Choice: the experts that its tokens can
    choose), `slot_parameters` what remains with one expert per routed layer, the size of a dense
    model of the same cost. `flops` are forward operations per image. `activation_bytes` are kept
    for the backward pass per image, in float32 and with `autocast` to bfloat16, with the experts
    as batched products, as on a GPU (in blocks on a CPU, they keep less); autocast also keeps
    `cast_bytes` of cast weights, whatever the batch.
    """

    parameters: int
    expert_parameters: int
    image_parameters: int
    slot_parameters: int
    flops: float
    activation_bytes: int
    autocast_activation_bytes: int
    cast_bytes: int


def measure(model: nn.Module, image_size: tuple[int, int]) -> ModelSize:
    """Sizes of `model`, which may be on any device and is not changed.

    Parameters are counted. FLOPs are those of `encoders.flops`, or counted by torch's
    `FlopCounterMode` where that has no closed form. Activation memory is measured: the tensors
    that eager torch saves for the backward pass in training, on fake CPU tensors, with fused
    attention and without checkpointing, as the difference between two batch sizes.

    Args:
        model: takes images (B, 3, H, W).
        image_size: (H, W).
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        groups = [m.group_size for m in model.modules() if isinstance(m, SparseMoE)]
        batch = math.lcm(*groups) if groups else 1
        flops = _flops(model.eval(), batch, image_size)
        model.train()
        saved = {
            (size, autocast): _saved_bytes(model, size, image_size, autocast)
            for size in (batch, 2 * batch)
            for autocast in (False, True)
        }
    finally:
        for module, training in modes:
            module.training = training
    kept = {amp: (saved[2 * batch, amp] - saved[batch, amp]) for amp in (False, True)}
    total = sum(parameter.numel() for parameter in model.parameters())
    experts, per_image, per_slot = _expert_parameters(model)
    return ModelSize(
        parameters=total,
        expert_parameters=experts,
        image_parameters=total - experts + per_image,
        slot_parameters=total - experts + per_slot,
        flops=flops,
        activation_bytes=kept[False] // batch,
        autocast_activation_bytes=kept[True] // batch,
        cast_bytes=saved[batch, True] - kept[True],
    )


def _expert_parameters(model: nn.Module) -> tuple[int, int, int]:
    """Numbers in all experts, in those that one image uses at most, and in one of each layer."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    tokens = patches + getattr(model, "num_prefix_tokens", 0)
    most = {
        layer.experts: tokens * layer.top_k
        for layer in model.modules()
        if isinstance(layer, TokensChoice)
    }
    every = used = one = 0
    for bank in model.modules():
        if isinstance(bank, ExpertMLP):
            size = sum(parameter.numel() for parameter in bank.parameters())
            each = size // bank.num_experts
            every, one = every + size, one + each
            used += each * min(bank.num_experts, most.get(bank, bank.num_experts))
    return every, used, one


def _flops(model: nn.Module, batch: int, image_size: tuple[int, int]) -> float:
    if isinstance(model, VisionTransformer):
        try:
            return sum(image_flops(model, image_size).values())
        except ValueError:  # a part without closed form
            pass
    # torch 2.11 does not count its fused attention on the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _run_fake(model, _images(batch, image_size))
    return counter.get_total_flops() / batch


def count_training_flops(
    model: nn.Module, inputs: Callable[[], tuple[Any, ...]], batch: int
) -> float | None:
    """Operations of a forward and a backward pass per sample, as `encoders.flops` counts them.

    Every matrix product costs as much again for each of its two gradients that is needed: about
    three forward passes in all where everything is trained, one where nothing is. Counted by
    torch's `FlopCounterMode` on fake tensors, in the mode that the model is in; weights may be
    anywhere, and are not touched. None where a model does what fake tensors cannot follow.

    Args:
        model: returns a tensor, or a dict of which the tensors of a batch are differentiated.
        inputs: makes the arguments of one call, of `batch` samples.
    """

    def run(forward: Callable[[], Any], _: dict[str, Tensor]) -> None:
        found = forward()
        parts = list(found.values()) if isinstance(found, dict) else [found]
        results = [part for part in parts if isinstance(part, Tensor) and part.ndim > 1]
        sums = [part.sum() for part in results if part.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()

    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _run_fake(model, inputs, run, trains_all=False)
    except Exception:  # of whatever library a tower is from: a figure is not worth a run
        return None
    return counter.get_total_flops() / batch


def _images(batch: int, image_size: tuple[int, int]) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.empty(batch, 3, *image_size),)


def _saved_bytes(model: nn.Module, batch: int, image_size: tuple[int, int], autocast: bool) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and buffers aside."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    def run(forward: Callable[[], Any], own: dict[str, Tensor]) -> None:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            result = forward()  # alive until everything is counted, so that no address repeats
        for tensor in own.values():
            saved.pop(tensor.untyped_storage()._cdata, None)
        del result

    _run_fake(model, _images(batch, image_size), run)
    return sum(saved.values())


def _run_fake(
    model: nn.Module,
    inputs: Callable[[], tuple[Any, ...]],
    run: Callable[[Callable[[], Any], dict[str, Tensor]], None] = lambda forward, _: forward(),
    trains_all: bool = True,
) -> None:
    """`run` a forward pass of `model` with fake parameters on fake inputs."""
    with FakeTensorMode():
        state = {
            name: torch.empty(value.shape, dtype=value.dtype).requires_grad_(
                isinstance(value, nn.Parameter) and (value.requires_grad or trains_all)
            )
            for name, value in [*model.named_parameters(), *model.named_buffers()]
        }
        arguments = inputs()
        run(lambda: functional_call(model, state, arguments), state)
