"""Temperatures of a softmax router: fixed, learned, or lowered as training goes on.

Every kind divides router logits by T. What T is made of (a parameter, the step of a schedule) is
saved with the model, so that a resumed run and an evaluation use the T of the saved step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

TemperatureSettings = float | Literal["learned"] | Mapping[str, float]


class Temperature(nn.Module):
    """Base of the temperatures: logits of any shape to logits / T, in the dtype of the logits."""

    @abstractmethod
    def value(self) -> Tensor:
        """T as a 0-D float32 tensor."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.value().to(logits.dtype)

    def reset_parameters(self) -> None:
        """Go back to the initial temperature."""


class FixedTemperature(Temperature):
    """T is a constant.

    Raises:
        ValueError: the constant is not positive.
    """

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = _positive("temperature", constant)

    def value(self) -> Tensor:
        return torch.tensor(self.constant)

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.constant

    def extra_repr(self) -> str:
        return f"{self.constant:g}"


class LearnedTemperature(Temperature):
    """T = exp(t) with a trained 0-D parameter t, 0 at the start; t must not be decayed."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.zeros((), device=device))

    def value(self) -> Tensor:
        return self.log_value.float().exp()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.log_value)


class ScheduledTemperature(Temperature):
    """T_k = max(minimum, start * decay ** (k / every)) at training step k: soft first, then harder.

    `step` (int64, 0-D) is a buffer of the model's state; `set_training_step` sets it. Steps are
    those of the run at hand: one that starts from another run's weights starts soft again.

    Args:
        start: T at step 0.
        minimum: T never falls below it.
        decay: factor per `every` steps, in (0, 1].
        every: steps per factor.

    Raises:
        ValueError: a setting is out of its range.
    """

    step: Tensor

    def __init__(
        self,
        start: float,
        minimum: float,
        decay: float = 0.99,
        every: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.start = _positive("temperature start", start)
        self.minimum = _positive("temperature minimum", minimum)
        self.every = _positive("temperature every", every)
        if not 0 < decay <= 1:
            raise ValueError(f"temperature decay must be in (0, 1], got {decay}")
        self.decay = decay
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))

    def value(self) -> Tensor:
        return (self.start * self.decay ** (self.step / self.every)).clamp(min=self.minimum)

    def reset_parameters(self) -> None:
        self.step.zero_()

    def extra_repr(self) -> str:
        return (
            f"start={self.start:g}, minimum={self.minimum:g}, decay={self.decay:g},"
            f" every={self.every:g}"
        )


def build_temperature(
    settings: TemperatureSettings, device: torch.device | str | None = None
) -> Temperature:
    """A temperature from plain settings, as they stand in a model's configuration.

    Args:
        settings: a number (fixed), "learned", or the arguments of `ScheduledTemperature` by name,
            such as `{"start": 1.0, "minimum": 0.1, "decay": 0.99, "every": 100}`.

    Raises:
        ValueError: none of these, or a value out of its range.
    """
    if isinstance(settings, Mapping):
        names, needed = {"start", "minimum", "decay", "every"}, {"start", "minimum"}
        if not needed <= set(settings) <= names:
            raise ValueError(
                f"temperature {dict(settings)} is no schedule: give start and minimum, and"
                " optionally decay and every"
            )
        return ScheduledTemperature(**settings, device=device)
    if settings == "learned":
        return LearnedTemperature(device)
    if isinstance(settings, str):
        raise ValueError(
            f"temperature {settings!r}: give a number, 'learned', or a schedule such as"
            " {'start': 1.0, 'minimum': 0.1}"
        )
    return FixedTemperature(settings)


def changing_temperatures(model: nn.Module) -> dict[str, Temperature]:
    """The temperatures in `model` that change in training, by name; to be found once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LearnedTemperature | ScheduledTemperature)
    }


def set_training_step(temperatures: Mapping[str, Temperature], step: int) -> None:
    """Tell scheduled ones of `temperatures` the step that comes next, counted from 0.

    Those in eval mode are left alone: a frozen tower keeps the temperature it was trained to.
    """
    for module in temperatures.values():
        if isinstance(module, ScheduledTemperature) and module.training:
            module.step.fill_(step)


def temperature_metrics(temperatures: Mapping[str, Temperature]) -> dict[str, Tensor]:
    """The values of `temperatures`, detached, to log by the name of their module."""
    return {f"temperature/{name}": module.value().detach() for name, module in temperatures.items()}


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
