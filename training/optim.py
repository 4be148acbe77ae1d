"""Optimizers, and which parameter gets which learning rate and decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.config import OptimizerConfig, ParameterRule

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices that torch has a fused AdamW for


class Treatment(NamedTuple):
    """What the parameters of one group have in common."""

    weight_decay: float
    lr_factor: float
    is_matrix: bool = True


def build_optimizer(
    module: nn.Module,
    no_decay: set[str],
    config: OptimizerConfig,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `module`, grouped by their treatment.

    Tensors with fewer than two axes and the parameters named in `no_decay` are not decayed unless
    a rule gives them a decay. Rules that freeze do so here.

    Args:
        module: the objective; rules see the names of its model.
        device: where the parameters will be, if not where they are.

    Raises:
        ValueError: a name in `no_decay` is no parameter, nothing is trainable, or rules or
            learning-rate factors are unusable.
    """
    parameters = dict(module.named_parameters())
    unknown = sorted(no_decay - set(parameters))
    if unknown:
        raise ValueError(f"no weight decay was asked for unknown parameters: {unknown[:5]}")
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if config.rules and config.lr_factors:
        raise ValueError("optimizer: give rules or lr_factors, not both; a rule's lr is a factor")
    rules = match_rules(list(trainable), config.rules, module) if config.rules else {}
    for name, rule in rules.items():
        if rule.freeze:
            trainable.pop(name).requires_grad_(False)
    if not trainable:
        raise ValueError("nothing to train: every parameter is frozen")
    plain = {name for name, p in trainable.items() if p.ndim < 2 or name in no_decay}
    factors = learning_rate_factors(list(trainable), config.lr_factors)
    embeddings = {p for m in module.modules() if isinstance(m, nn.Embedding) for p in [m.weight]}
    groups: dict[Treatment, list[Tensor]] = {}
    for name, parameter in trainable.items():
        rule, decay = rules.get(name), 0.0 if name in plain else config.weight_decay
        if rule is not None and rule.weight_decay is not None:
            decay = rule.weight_decay
        is_matrix = parameter.ndim == 2 and name not in plain and parameter not in embeddings
        treatment = Treatment(
            decay,
            factors[name] if rule is None else rule.lr,
            is_matrix if config.kind == "muon" else True,
        )
        groups.setdefault(treatment, []).append(parameter)
    device = device or next(iter(trainable.values())).device
    return _create(dict(sorted(groups.items(), reverse=True)), config, device)


def _create(
    groups: dict[Treatment, list[Tensor]], config: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    described: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": kind.weight_decay, "lr_factor": kind.lr_factor}
        for kind, parameters in groups.items()
    ]
    betas = (config.beta1, config.beta2)
    match config.kind:
        case "adamw":
            fused = device.type in FUSED
            return torch.optim.AdamW(described, config.lr, betas, config.eps, fused=fused)
        case "adafactor":
            return torch.optim.Adafactor(described, config.lr)
        case "lion":
            from timm.optim import Lion

            return Lion(described, config.lr, betas)
        case "muon":
            from timm.optim import Muon

            for group, kind in zip(described, groups, strict=True):
                group["use_fallback"] = not kind.is_matrix
            return Muon(described, config.lr, betas=betas)


def match_rules(
    names: list[str], rules: list[ParameterRule], objective: nn.Module | None = None
) -> dict[str, ParameterRule]:
    """Rule of each parameter; rules see names without the objective's prefix.

    Args:
        objective: knows what `group` of a rule means, if it has `parameter_groups`.

    Raises:
        ValueError: a parameter without a rule, a rule without a parameter, or one that is invalid.
    """
    for rule in rules:
        if rule.lr < 0 or (rule.weight_decay or 0) < 0:
            raise ValueError(f"optimizer.rules '{_words(rule)}': lr and weight_decay not negative")
        if bool(rule.match) == bool(rule.group):
            raise ValueError(f"optimizer.rules '{_words(rule)}': give each a match or a group")
    known = getattr(objective, "parameter_groups", dict)()
    fits = [_test_of(rule, known) for rule in rules]
    found: dict[str, ParameterRule] = {}
    used: set[int] = set()
    for name in names:
        for number, fit in enumerate(fits):
            if fit(name.removeprefix("model.")):
                found[name] = rules[number]
                used.add(number)
                break
    uncovered = [name.removeprefix("model.") for name in names if name not in found]
    if uncovered:
        raise ValueError(
            f"optimizer.rules cover {len(found)} of {len(names)} trained parameters, but not"
            f" {', '.join(uncovered[:3])}: add a rule for them, such as a last {{match: '.*'}}"
        )
    unused = [_words(rule) for number, rule in enumerate(rules) if number not in used]
    if unused:
        raise ValueError(
            f"optimizer.rules match no trained parameter that an earlier rule leaves: {unused}"
        )
    return found


def _test_of(rule: ParameterRule, groups: Mapping[str, set[str]]) -> Callable[[str], bool]:
    """Whether a rule is for a parameter of a name."""
    if rule.group:
        return groups.get(rule.group, set()).__contains__
    pattern = _compiled(rule.match, "optimizer.rules")
    return lambda name: pattern.fullmatch(name) is not None


def _words(rule: ParameterRule) -> str:
    return f"group {rule.group}" if rule.group and not rule.match else rule.match


def learning_rate_factors(names: list[str], rules: dict[str, float]) -> dict[str, float]:
    """Factor of each parameter; names are those of the model, without the objective's prefix.

    Raises:
        ValueError: an expression that is invalid or matches nothing, or a factor below 0.
    """
    patterns = {expression: _compiled(expression, "optimizer.lr_factors") for expression in rules}
    factors, unused = dict.fromkeys(names, 1.0), set(rules)
    for expression, factor in rules.items():
        if factor < 0:
            raise ValueError(f"optimizer.lr_factors '{expression}' must not be negative")
    for name in names:
        for expression, pattern in patterns.items():
            if pattern.fullmatch(name.removeprefix("model.")):
                factors[name] = rules[expression]
                unused.discard(expression)
                break
    if unused:
        raise ValueError(f"optimizer.lr_factors match no trained parameter: {sorted(unused)}")
    return factors


def _compiled(expression: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{setting} '{expression}': {error}") from error
