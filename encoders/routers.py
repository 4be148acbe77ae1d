"""The routed layers by name, and the one place that builds them for a transformer block."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from encoders.fixed_routing import (
    IdentityRouting,
    SoftUniformRouting,
    UniformRouting,
    UniformSoftRouting,
)
from encoders.routed_layer import RoutedLayer
from encoders.soft_moe import SoftMoE, slots_for_capacity
from encoders.sparse_moe import ExpertsChoice, TokensChoice
from encoders.token_mixture import HierarchicalMixture, ImageMixture, TokenMixture

ROUTERS: dict[str, type[RoutedLayer]] = {
    "soft": SoftMoE,
    "tokens_choice": TokensChoice,
    "experts_choice": ExpertsChoice,
    "identity": IdentityRouting,
    "uniform": UniformRouting,
    "soft_uniform": SoftUniformRouting,
    "uniform_soft": UniformSoftRouting,
    "token_mixture": TokenMixture,
    "image_mixture": ImageMixture,
    "hierarchical_mixture": HierarchicalMixture,
}

# What a transformer block knows by itself; everything else of a constructor is an option.
COMMON = frozenset({"self", "dim", "num_experts", "hidden_dim", "dropout", "device", "dtype"})


def router_class(router: str) -> type[RoutedLayer]:
    """The layer class of that name.

    Raises:
        ValueError: there is none; the message has the nearest ones.
    """
    if router not in ROUTERS:
        raise ValueError(f"router '{router}' does not exist; {_suggest(router, ROUTERS)}")
    return ROUTERS[router]


def router_options(router: str) -> frozenset[str]:
    """Names of the options that the router's layer takes beside what a block gives every layer."""
    names: set[str] = set()
    for base in router_class(router).__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        variadic = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        names |= {parameter.name for parameter in parameters} - variadic
        if not variadic:  # a constructor with **kwargs passes them on to the next class
            break
    return frozenset(names - COMMON)


def build_routed_layer(
    router: str,
    dim: int,
    num_experts: int,
    hidden_dim: int,
    /,  # some layers have an option of their own that is called router
    *,
    tokens: int,
    dropout: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> RoutedLayer:
    """Build the layer that replaces a block's MLP.

    Args:
        router: a name in `ROUTERS`.
        dim: token width.
        num_experts: number of experts.
        hidden_dim: hidden width of an expert.
        tokens: tokens per image, from which a capacity factor is turned into slots.
        dropout: dropout inside the experts.
        device: where the parameters live.
        dtype: their type.
        **options: the layer's own arguments. `capacity_factor` becomes `slots_per_expert` for a
            layer that has slots and no capacity factor of its own.

    Raises:
        ValueError: the name or an option does not exist, one is missing or of a wrong type, or the
            layer refuses a value.
    """
    layer, accepted, given = router_class(router), router_options(router), dict(options)
    if "slots_per_expert" in accepted and "capacity_factor" in options.keys() - accepted:
        factor = options.pop("capacity_factor")
        if "slots_per_expert" in options:
            raise ValueError(
                f"slots_per_expert={options['slots_per_expert']} and capacity_factor={factor}"
                " exclude each other: give one"
            )
        with _naming(router, given):
            options["slots_per_expert"] = slots_for_capacity(tokens, num_experts, factor)
    for name in options:
        if name not in accepted:
            raise ValueError(
                f"router '{router}' takes no option '{name}'; {_suggest(name, accepted)}"
            )
    with _naming(router, given):
        return layer(
            dim=dim,
            num_experts=num_experts,
            hidden_dim=hidden_dim,
            dropout=dropout,
            device=device,
            dtype=dtype,
            **options,
        )


@contextmanager
def _naming(router: str, options: dict[str, Any]) -> Iterator[None]:
    """Options come from configuration files: one of a wrong type, or missing, is a bad value."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"router '{router}' cannot be built with {options}: {error}") from error


def _suggest(wrong: str, right: Collection[str]) -> str:
    near = difflib.get_close_matches(wrong, right, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}choose from: {', '.join(sorted(right))}"
