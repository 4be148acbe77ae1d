"""The README.md of an exported folder, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

PIPELINES = {
    "open_clip": "zero-shot-image-classification",
    "timm": "image-feature-extraction",
    "transformers": "zero-shot-image-classification",
    "sentence-transformers": "sentence-similarity",
    "onnx": "zero-shot-image-classification",
}
# What lets one in: a name and password before the host of an address, a signature behind it.
PASSWORD = re.compile(r"(?<=://)[^\s/@'\"]+@")
QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\"]+")


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval, if one was measured."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class RunFacts:
    """What is known of the training run; what is not known is left out of the card.

    Args:
        step: of the checkpoint.
        samples: that were seen up to it.
        data: what the run read, in words, such as a pattern of shards.
        command: words of the command line.
        settings: resolved settings of the run, by section.
        figures: of these weights, or those in training up to the step.
        figures_step: of the weights that were measured.
        averaged: whether the weights, and those that were measured, are a moving average.
        versions: of packages.
    """

    step: int | None = None
    samples: int | None = None
    data: str | None = None
    command: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    figures_step: int | None = None
    averaged: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Args:
        title: heading, such as the name on the hub.
        target: what the folder is for, a key of `PIPELINES`.
        licence: of the weights, as their owner has stated it; None says that nothing was stated.
        code: Python that opens the folder.
        model: facts about the model by name, in the order in which to show them.
        routers: settings of each kind of routed layer, by the blocks that have it.
        run: facts about its training.
        limits: sentences about what not to expect.
        pipeline: what the hub files it under; that of the target if None.
    """

    title: str
    target: str
    licence: str | None
    code: str
    model: Mapping[str, Any]
    routers: Mapping[str, str]
    run: RunFacts
    limits: Sequence[str] = ()
    pipeline: str | None = None


def write_card(card: Card, folder: Path) -> None:
    """Write `README.md`."""
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def card_text(card: Card) -> str:
    """The card as Markdown with a YAML header."""
    head: dict[str, Any] = {
        "library_name": card.target,
        "pipeline_tag": card.pipeline or PIPELINES[card.target],
        "tags": ["soft-moe", "softmoe-clip"],
    }
    if card.licence is not None:
        head = {"license": card.licence} | head
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {card.title}",
        f"Trained and exported with softmoe-clip {version('softmoe-clip')}.",
        f"## Use\n\n```python\n{card.code.strip()}\n```",
        "## Model\n\n" + _table(("", ""), card.model.items()),
        "### Routed layers\n\n" + _routers(card.routers),
        "## Training\n\n" + _training(card.run),
        "## Measured\n\n" + _figures(card.run),
        "## Licence\n\n" + _licence(card.licence),
    ]
    if card.limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {sentence}" for sentence in card.limits))
    return "\n\n".join(parts) + "\n"


def without_secrets(text: str) -> str:
    """The text without names, passwords and queries in its addresses: cards are published."""
    return QUERY.sub(r"\1?...", PASSWORD.sub("", text))


def _routers(routers: Mapping[str, str]) -> str:
    return (
        _table(("blocks", "layer"), routers.items()) if routers else "None: all layers are dense."
    )


def _training(run: RunFacts) -> str:
    facts: dict[str, Any] = {
        "steps": run.step,
        "samples seen": None if run.samples is None else f"{run.samples:,}",
        "data": None if run.data is None else without_secrets(run.data),
        "versions": ", ".join(f"{name} {number}" for name, number in run.versions.items()) or None,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    parts = [_table(("", ""), known.items()) if known else "Nothing is known of the run."]
    if run.command:
        parts.append(f"Command:\n\n```\n{without_secrets(shlex.join(run.command))}\n```")
    if run.settings:
        settings = without_secrets(yaml.safe_dump(dict(run.settings), sort_keys=False).rstrip())
        parts.append(
            f"<details><summary>All settings</summary>\n\n```yaml\n{settings}\n```\n\n</details>"
        )
    return "\n\n".join(parts)


def _figures(run: RunFacts) -> str:
    if not run.figures:
        return "No evaluation was recorded in the run."
    rows = [
        (
            figure.name,
            f"{figure.value:.4f}",
            "-" if figure.interval is None else "{:.4f} to {:.4f}".format(*figure.interval),
        )
        for figure in run.figures
    ]
    kind = "the moving average" if run.averaged else "the weights in training"
    of = f"Measured on {kind} (of step {run.figures_step})"
    if run.figures_step != run.step:
        of += f", not on the weights of this folder, which are of step {run.step}"
    return f"{of}:\n\n" + _table(("figure", "value", "95 % interval"), rows)


def _licence(licence: str | None) -> str:
    if licence is None:
        return "Not stated: ask whoever gave you these weights."
    return f"{licence}, as stated by who exported the weights. The code of the model is Apache-2.0."


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
