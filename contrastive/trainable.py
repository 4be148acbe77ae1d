"""Which parameters of a pretrained tower are trained: all, none, or some of them."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

# Names that timm, Hugging Face and open_clip give lists of blocks.
BLOCKS = re.compile(r"(?:.*\.)?(?:blocks|layers?|block|stages|resblocks)")


def parts_to_freeze(
    tower: nn.Module,
    trainable: int | list[str],
    setting: str,
    always: Collection[str] = (),
) -> tuple[nn.Module | nn.Parameter, ...]:
    """The largest modules of `tower` without a trained parameter, and other untrained parameters.

    Args:
        trainable: so many of the last blocks, with all that follows them (the final norm, for
            one); or regular expressions, one of which matches the whole name of each trained
            parameter.
        setting: what messages call `trainable`.
        always: names of parameters that are trained in any case.

    Raises:
        ValueError: the tower has no or fewer blocks, or an expression is invalid or matches
            nothing.
    """
    if isinstance(trainable, int):
        trained = _last_blocks(tower, trainable, setting)
    else:
        trained = _matching(tower, trainable, setting)
    return untrained_parts(tower, trained | set(always))


def _last_blocks(tower: nn.Module, count: int, setting: str) -> set[str]:
    """Parameters from the first one of the last `count` blocks on, in the order of the modules."""
    lists = [
        (name, list(module))
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and BLOCKS.fullmatch(name)
    ]
    if not lists:
        raise ValueError(f"{setting} {count}: this tower has no list of blocks; name parameters")
    path, blocks = min(lists, key=lambda item: item[0].count("."))  # not one inside the stem
    if not 0 < count <= len(blocks):
        raise ValueError(
            f"{setting} must be 1 to {len(blocks)}, the number of blocks, got {count}; to train"
            " nothing set frozen, to train all set null"
        )
    names = [name for name, _ in tower.named_parameters()]
    prefix = f"{path}.{len(blocks) - count}."
    first = next(place for place, name in enumerate(names) if name.startswith(prefix))
    return set(names[first:])


def _matching(tower: nn.Module, expressions: list[str], setting: str) -> set[str]:
    names = [name for name, _ in tower.named_parameters()]
    trained: set[str] = set()
    if not expressions:
        raise ValueError(f"{setting} is an empty list: to train nothing set frozen")
    for expression in expressions:
        try:
            found = {name for name in names if re.fullmatch(expression, name)}
        except re.error as error:
            raise ValueError(f"{setting} '{expression}': {error}") from error
        if not found:
            raise ValueError(
                f"{setting} '{expression}' matches no parameter: it must match a whole name, such"
                f" as '{names[0]}' or '{names[-1]}'"
            )
        trained |= found
    return trained


def untrained_parts(module: nn.Module, trained: set[str]) -> tuple[nn.Module | nn.Parameter, ...]:
    """The largest modules without a parameter of these names, and other parameters without one."""
    names = {name for name, _ in module.named_parameters()}
    if names and not names & trained:
        return (module,)
    parts: list[nn.Module | nn.Parameter] = [
        parameter
        for name, parameter in module.named_parameters(recurse=False)
        if name not in trained
    ]
    for prefix, child in module.named_children():
        start = f"{prefix}."
        own = {name.removeprefix(start) for name in trained if name.startswith(start)}
        parts += untrained_parts(child, own)
    return tuple(parts)
