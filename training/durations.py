"""Lengths of time of a run: steps, samples, epochs or hours, converted to steps."""

from __future__ import annotations

import math
import re

UNITS = {
    "step": "steps", "steps": "steps", "sample": "samples", "samples": "samples",
    "epoch": "epochs", "epochs": "epochs",
    "s": "s", "second": "s", "seconds": "s", "min": "min", "minute": "min", "minutes": "min",
    "h": "h", "hour": "h", "hours": "h", "d": "d", "day": "d", "days": "d",
}  # fmt: skip
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
THOUSANDS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
PATTERN = re.compile(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([kMB]?)\s+([a-z]+)\s*", re.ASCII)


def parse_duration(text: str, setting: str) -> tuple[float, str]:
    """Amount and unit of words such as `3 epochs`, `1.2M samples`, `90 min` or `500 steps`.

    The unit is one of `steps`, `samples`, `epochs`, `s`, `min`, `h`, `d`.

    Raises:
        ValueError: they say nothing of the kind; the message names `setting`.
    """
    found = PATTERN.fullmatch(text)
    if found is None or found[3] not in UNITS:
        raise ValueError(
            f"{setting}: '{text}' is no duration; write for example '500 steps', '1.2M samples',"
            " '3 epochs', '90 min' or '11.5 hours'"
        )
    amount = float(found[1].replace("_", "")) * THOUSANDS[found[2]]
    return amount, UNITS[found[3]]


def seconds(text: str, setting: str) -> float:
    """A duration in time, in seconds.

    Raises:
        ValueError: it is none, or not positive.
    """
    amount, unit = parse_duration(text, setting)
    if unit not in SECONDS:
        raise ValueError(f"{setting}: '{text}' is no time; write for example '90 min' or '2 hours'")
    if amount <= 0:
        raise ValueError(f"{setting} must be positive, got '{text}'")
    return amount * SECONDS[unit]


def is_time(value: int | str, setting: str) -> bool:
    """Whether a duration is given in time; its number of steps is not known before the run."""
    return isinstance(value, str) and parse_duration(value, setting)[1] in SECONDS


def to_steps(value: int | str, setting: str, *, batch_size: int, samples: int) -> int:
    """Steps of a duration; a plain number is one of steps. Parts of a step count as one.

    Args:
        batch_size: samples per step, over all processes.
        samples: samples per epoch.

    Raises:
        ValueError: it is no duration, or one in time.
    """
    if isinstance(value, int):
        return value
    amount, unit = parse_duration(value, setting)
    if unit in SECONDS:
        raise ValueError(f"{setting}: '{value}' is a time; give it in steps, samples or epochs")
    factor = {"steps": 1.0, "samples": 1 / batch_size, "epochs": samples / batch_size}[unit]
    return math.ceil(round(amount * factor, 6))


def duration_text(time: float) -> str:
    """Seconds as text, such as `3 h 05 min`."""
    minutes, rest = divmod(round(time), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
