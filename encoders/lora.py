"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on expert banks and linear layers.

A chosen kernel W is frozen and used as W + alpha / r * (a product of rank r), one product per
expert for a bank. One factor starts at zero, so that a fresh adapter changes no output bit.

    lora = add_lora(model, rank=8, train=("head.*",))
    ...  # train: only the adapters and the head have gradients
    lora.save("adapter.safetensors")
    lora.merge()  # plain weights under their plain names; lora.unmerge() restores every bit

`load_lora(model, "adapter.safetensors")` puts a saved adapter on a model with the same base
weights. An adapted kernel is summed up anew in each forward pass and kept for the backward pass:
training saves gradients and optimizer state, not activations. PEFT can address the banks too
(`target_parameters`), but renames every adapted module in checkpoints, breaks the graph that
torch.compile sees, and its `unmerge` subtracts, which does not restore the weights exactly.

Shape legend: E experts, r rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from encoders.experts import ExpertMLP

EXPERTS = ("*.experts.*fc?_weight",)
# The names of timm and of open_clip, whose text tower keeps q, k and v in `in_proj_weight`, a
# parameter of the attention itself that no linear layer owns.
ATTENTION = ("*.attn.qkv.weight", "*.attn.proj.weight", "*.attn.out_proj.weight")
DENSE_MLPS = ("*.mlp.fc?.weight", "*.mlp.c_fc.weight", "*.mlp.c_proj.weight")
EVERYWHERE = EXPERTS + ATTENTION + DENSE_MLPS
SETTINGS = "lora"
FACTORS = ("down", "up")


class LowRank(nn.Module):
    """Parametrization W to W + scale * product, in the kernel's dtype even under autocast.

    `down` reads the inputs and starts random, `up` writes the outputs and starts at zero. Both lie
    like the kernel: of a bank (E, in, out) they are (E, in, r) and (E, r, out), of a linear kernel
    (out, in) they are (r, in) and (out, r).
    """

    def __init__(self, kernel: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale, self.is_bank = scale, kernel.ndim == 3
        down, up = factor_shapes(kernel.shape, rank)
        place = {"device": kernel.device, "dtype": kernel.dtype}
        inputs = kernel.shape[-2 if self.is_bank else -1]
        bound = 1 / math.sqrt(inputs)  # as the paper's code: Kaiming uniform with a = sqrt(5)
        self.down = nn.Parameter(torch.empty(down, **place).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(up, **place))

    def forward(self, kernel: Tensor) -> Tensor:
        with torch.autocast(kernel.device.type, enabled=False):
            if self.is_bank:
                return torch.baddbmm(kernel, self.down, self.up, alpha=self.scale)
            return torch.addmm(kernel, self.up, self.down, alpha=self.scale)


def factor_shapes(kernel: torch.Size, rank: int) -> tuple[torch.Size, torch.Size]:
    """Shapes of `down` and `up` for the kernel of a bank or of a linear layer; see `LowRank`."""
    left = torch.Size((*kernel[:-1], rank))
    right = torch.Size((*kernel[:-2], rank, kernel[-1]))
    return (left, right) if len(kernel) == 3 else (right, left)


class Place(NamedTuple):
    """Where an adapter sits: the module, the name of its kernel, and the adapter."""

    module: Any
    kernel: str
    adapter: LowRank


class Lora:
    """The adapters of one model, by the names of the kernels; see `add_lora` and `load_lora`."""

    def __init__(
        self,
        places: dict[str, Place],
        trained: dict[str, Tensor],
        rank: int,
        alpha: float,
    ) -> None:
        self.places, self.trained = places, trained
        self.rank, self.alpha = rank, alpha
        self._base: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """What was trained: `<kernel>.down`, `<kernel>.up`, and other parameters by their name."""
        tensors = {name: parameter.detach() for name, parameter in self.trained.items()}
        for name, place in self.places.items():
            for factor in FACTORS:
                tensors[f"{name}.{factor}"] = getattr(place.adapter, factor).detach()
        return tensors

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take the values that `state_dict` returned.

        Raises:
            ValueError: other names or shapes, or the adapters are merged.
        """
        if self._base:
            raise ValueError("the adapters are merged: unmerge them before loading others")
        own = self.state_dict()
        _check_shapes({name: value.shape for name, value in own.items()}, tensors)
        for name, value in own.items():
            value.copy_(tensors[name])

    def save(self, path: str | Path) -> None:
        """Write `state_dict` with rank and alpha as a safetensors file, without base weights."""
        tensors = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        settings = json.dumps({"rank": self.rank, "alpha": self.alpha})
        save_file(tensors, path, metadata={"format": "pt", SETTINGS: settings})

    def merge(self) -> None:
        """Put the adapted kernels in the place of the base ones, under their plain names.

        Outputs stay equal to the bit. The base kernels stay in memory for `unmerge`.
        """
        if self._base:
            return
        for name, (module, kernel, _) in self.places.items():
            self._base[name] = module.parametrizations[kernel].original.detach()
            parametrize.remove_parametrizations(module, kernel, leave_parametrized=True)

    def unmerge(self) -> None:
        """Undo `merge`: the very base kernels, with the same adapters on top.

        Both follow the model where it was moved or cast in between.

        Raises:
            ValueError: a kernel has another adapter by now.
        """
        for name in self._base:
            module, kernel, _ = self.places[name]
            if parametrize.is_parametrized(module, kernel):
                raise ValueError(f"'{name}' has another adapter by now: merge that one first")
        for name, base in self._base.items():
            module, kernel, adapter = self.places[name]
            merged = getattr(module, kernel)
            place = {"device": merged.device, "dtype": merged.dtype}
            with torch.no_grad():
                merged.set_(base.to(**place))
            adapter.to(**place)
            parametrize.register_parametrization(module, kernel, adapter)
        self._base = {}


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    train: Sequence[str] = (),
) -> Lora:
    """Freeze `model` and put fresh adapters on some of its kernels.

    Args:
        model: any module; an objective or an optimizer must be built after this.
        rank: r.
        alpha: numerator of the scale alpha / r; the rank, hence scale 1, when None.
        targets: shell patterns of kernels; None takes those of all experts, attention projections
            and dense MLPs (`EXPERTS`, `ATTENTION`, `DENSE_MLPS`). The experts of blocks 10 and 11
            are "blocks.1[01].mlp.experts.fc?_weight". A fused qkv kernel gets one product.
        train: shell patterns of parameters that are trained as they are, such as "head.*", or
            "*.mlp.phi" and "*.mlp.scale" for the routers, which are frozen otherwise.

    Raises:
        ValueError: the model has adapters already, a pattern matches nothing, a target is no
            kernel of an expert bank or linear layer, or the rank does not fit.
    """
    parameters = dict(model.named_parameters())
    kernels, whole = _select(model, rank, targets, train)
    alpha = float(rank if alpha is None else alpha)
    model.requires_grad_(False)
    places = {}
    for name in kernels:
        owner, _, kernel = name.rpartition(".")
        module, adapter = model.get_submodule(owner), LowRank(parameters[name], rank, alpha / rank)
        parametrize.register_parametrization(module, kernel, adapter)
        places[name] = Place(module, kernel, adapter)
    trained = {name: parameters[name].requires_grad_(True) for name in whole}
    return Lora(places, trained, rank, alpha)


def load_lora(model: nn.Module, path: str | Path) -> Lora:
    """Put the adapter that `Lora.save` wrote on a model with the same base weights.

    Raises:
        ValueError: the file is missing or no adapter, or it is one of another model, which then
            stays as it was.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = (file.metadata() or {}).get(SETTINGS)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' cannot be read as an adapter: {error}") from error
    if settings is None:
        raise ValueError(f"'{path}' is no adapter: `Lora.save` writes one")
    kernels = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    factors = {f"{kernel}.{factor}" for kernel in kernels for factor in FACTORS}
    whole = [name for name in tensors if name not in factors]
    rank, alpha = (json.loads(settings)[name] for name in ("rank", "alpha"))
    _select(model, rank, kernels, whole)
    parameters = dict(model.named_parameters())
    shapes = {name: parameters[name].shape for name in whole}
    for name in kernels:
        pairs = zip(FACTORS, factor_shapes(parameters[name].shape, rank), strict=True)
        shapes |= {f"{name}.{factor}": shape for factor, shape in pairs}
    _check_shapes(shapes, tensors)  # while the model can still be left alone
    lora = add_lora(model, rank, alpha=alpha, targets=kernels, train=whole)
    lora.load_state_dict(tensors)
    return lora


def _select(
    model: nn.Module, rank: int, targets: Sequence[str] | None, train: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Names of the kernels to adapt and of the parameters to train whole, or ValueError."""
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("the model has adapters already: merge them before adding others")
    names = [name for name, _ in model.named_parameters()]
    whole = _matching(names, train)
    if targets is None:
        targets = [p for p in EVERYWHERE if any(fnmatchcase(name, p) for name in names)]
    kernels = [name for name in _matching(names, targets) if name not in whole]
    if not kernels:
        raise ValueError(f"targets: the model has none of {', '.join(targets or EVERYWHERE)}")
    for name in kernels:
        _check_kernel(model, name, rank)
    return kernels, whole


def _check_shapes(own: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    wrong = sorted(own.keys() ^ tensors.keys()) or sorted(
        name for name in own if own[name] != tensors[name].shape
    )
    if wrong:
        raise ValueError(f"the adapter is of another model; it differs in {', '.join(wrong)}")


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match any pattern; every pattern must match one."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"'{pattern}' matches no parameter of the model")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_kernel(model: nn.Module, name: str, rank: int) -> None:
    owner, _, kernel = name.rpartition(".")
    module, shape = model.get_submodule(owner), model.get_parameter(name).shape
    fits = isinstance(module, ExpertMLP) and kernel.endswith("_weight")
    if not fits and not (isinstance(module, nn.Linear) and kernel == "weight"):
        raise ValueError(
            f"targets: '{name}' {tuple(shape)} is no kernel of an expert bank or linear layer;"
            " name it in `train` instead"
        )
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank={rank}: choose 1 to {min(shape[-2:])}, for '{name}'")
