"""A dense vision transformer's weights become those of a routed one (sparse upcycling).

Every expert of a routed block starts as a copy of that block's dense MLP (Komatsuzaki et al., arXiv
2212.05055; Adlith/MoE-Jetpack does it for Soft MoE); the router starts fresh.

    model = timm.create_model("soft_moe_vit_small_patch16_224", num_classes=10)
    dense = timm.create_model("vit_small_patch16_224", pretrained=True).state_dict()
    print(upcycle(model, dense, allow=("cls_token", "head.*", "*.[qk]_norm.weight")))

Experts compute tanh GELU: of a dense model with exact GELU, such as timm's own, they are close
copies and not exact ones. Norms on queries and keys that the dense model lacks change the function
too; `qk_norm=False` builds a model without. Where timm normalises after pooling (`fc_norm.*`),
build with `fc_norm=True`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from encoders.experts import ExpertMLP
from encoders.routed_layer import RoutedLayer
from encoders.vision_transformer import SoftMoEVisionTransformer


@dataclass(frozen=True)
class UpcycleReport:
    """What became of every tensor: names of the model's parameters and, in `unused`, of the
    checkpoint's. `initialised` is what keeps the values that the model drew itself.
    """

    copied: list[str] = field(default_factory=list)
    copied_into_experts: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            f"{kind.replace('_', ' ')}: {', '.join(_over_blocks(names)) or 'none'}"
            for kind, names in vars(self).items()
        )


def upcycle(
    model: SoftMoEVisionTransformer,
    dense: Mapping[str, Tensor],
    *,
    expert_noise_std: float = 0.0,
    allow: Sequence[str] = (),
) -> UpcycleReport:
    """Fill `model` in place from the state dict of a dense timm VisionTransformer, ours or timm's.

    Position embeddings are resampled to the model's grid and patch kernels to its patch size, by
    timm's functions; the position of a class token that the model lacks is left out. Routers are
    drawn anew. Everything is checked before anything is written.

    Args:
        model: the routed model.
        dense: parameters by name, for example from `safetensors.torch.load_file`.
        expert_noise_std: standard deviation of normal noise on the experts' kernels, independent
            for each expert. Soft MoE needs none, its router breaks the symmetry.
        allow: shell patterns of names that may keep the model's own values, or be left unused.

    Raises:
        ValueError: the noise is negative, or tensors do not fit and no pattern allows it; the
            message lists them all.
    """
    if expert_noise_std < 0:
        raise ValueError(f"expert_noise_std must not be negative, got {expert_noise_std}")
    layers = {
        f"blocks.{index}.mlp.": block.mlp
        for index, block in enumerate(model.blocks)
        if isinstance(block.mlp, RoutedLayer)
    }
    experts = _expert_sources(layers)
    values, report, problems = _plan(model, dense, tuple(layers), experts)
    wrong = [
        f"{name}: {why}"
        for name, why in problems.items()
        if not any(fnmatchcase(name, pattern) for pattern in allow)
    ]
    if wrong:
        raise ValueError(
            "the dense checkpoint does not fit; build another model, or name in `allow` what may"
            " keep the model's values or be left out:\n" + "\n".join(_over_blocks(wrong))
        )
    with torch.no_grad():
        for layer in layers.values():
            layer.init_weights()
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
            if expert_noise_std and name in experts and name.endswith("_weight"):
                parameter.add_(torch.randn_like(parameter), alpha=expert_noise_std)
    return report


def _over_blocks(lines: Sequence[str]) -> list[str]:
    """One line for what is said of several blocks, in the form of a pattern."""
    counts = Counter(re.sub(r"\bblocks\.\d+", "blocks.*", line) for line in lines)
    return [line if count == 1 else f"{line} (x {count})" for line, count in counts.items()]


def _expert_sources(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Parameters of expert banks in these layers, by name, and the dense ones to copy."""
    return {
        f"{prefix}{bank}.{part}_{kind}": f"{prefix}{part}.{kind}"
        for prefix, layer in layers.items()
        for bank, module in layer.named_modules()
        if isinstance(module, ExpertMLP)
        for part in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }


def _plan(
    model: SoftMoEVisionTransformer,
    dense: Mapping[str, Tensor],
    routed: tuple[str, ...],
    experts: Mapping[str, str],
) -> tuple[dict[str, Tensor], UpcycleReport, dict[str, str]]:
    """What to write by parameter, the report, and why other names of either side do not fit."""
    values: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    used: set[str] = set()
    report = UpcycleReport()
    for name, parameter in model.named_parameters():
        if name.startswith(routed) and name not in experts:
            report.initialised.append(name)  # part of a router
            continue
        source = experts.get(name, name)
        if source in dense:
            value, kind = _fit(source, dense, model)
            shape = parameter.shape
            if name in experts:
                value, kind = (value.mT if value.ndim == 2 else value), "copied_into_experts"
                shape = shape[1:]
            if value.shape == shape:
                values[name] = value
                used.add(source)
                getattr(report, kind).append(name)
                continue
            found = f"has {tuple(dense[source].shape)} for {tuple(parameter.shape)}"
        else:
            found = f"has no {source}"
        problems[name] = f"the checkpoint {found}"
        report.initialised.append(name)
    for name in dense.keys() - used:
        problems.setdefault(name, "the model has no place for it")
        report.unused.append(name)
    report.unused.sort()
    return values, report, problems


def _fit(
    name: str, dense: Mapping[str, Tensor], model: SoftMoEVisionTransformer
) -> tuple[Tensor, str]:
    """One dense tensor at the model's patch size and grid, and the report's list for it."""
    value = dense[name]
    if name == "patch_embed.proj.weight":
        size = model.patch_embed.proj.weight.shape[2:]
        if value.ndim == 4 and value.shape[2:] != size:
            return resample_patch_embed(value, list(size)), "resampled"
    if name != "pos_embed":
        return value, "copied"
    # Class and register tokens stand before the patches; some models give them no position.
    tokens = sum(dense[token].shape[1] for token in ("cls_token", "reg_token") if token in dense)
    patches = value.shape[1] - tokens
    if math.isqrt(patches) ** 2 != patches:
        tokens, patches = 0, value.shape[1]
    if tokens and (model.no_embed_class or model.num_prefix_tokens != tokens):
        value, tokens = value[:, tokens:], 0
    side, grid = math.isqrt(patches), list(model.patch_embed.grid_size)
    if side * side != patches or [side, side] == grid:
        return value, "copied"
    return resample_abs_pos_embed(value, grid, [side, side], tokens), "resampled"
