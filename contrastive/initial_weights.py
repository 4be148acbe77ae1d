"""Initial weights of towers: where they come from, what of them fits, and what is said about it.

Everything a tower has must be in its source and the other way round, in the same shapes, unless the
settings allow a difference by name. Names are those of open_clip's towers: `trunk.pos_embed` and
`head.proj.weight` of an image tower, `transformer.resblocks.0.ln_1.weight` and `text_projection` of
a text tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from contrastive.config import ImageTowerConfig, TextTowerConfig
from contrastive.weight_checks import (
    check_hidden,
    check_image_description,
    check_pixels,
    check_text_description,
)
from contrastive.weight_sources import Source, image_source, text_source
from encoders.hugging_face_text import read_pretrained_text, text_model_folder
from training.checkpoint import CheckpointError

SHOWN = 4  # names in a message


@dataclass(frozen=True)
class LoadReport:
    """What came of initialising a tower.

    `matched` names were loaded, `fresh` ones stay random, `left_out` ones are of parts that the
    tower does not have by design, and `allowed` tells the differences that the settings allow.
    """

    tower: str
    source: str
    matched: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        found = f"{self.tower} tower: {len(self.matched)} tensors from {self.source} match"
        parts = [
            f"{what}: {_shorten(names)}"
            for what, names in (
                ("random", self.fresh),
                ("left out", self.left_out),
                ("allowed", self.allowed),
            )
            if names
        ]
        return "; ".join([found, *parts])


def initialise_towers(
    model: Any, image: ImageTowerConfig, text: TextTowerConfig, config: Mapping[str, Any]
) -> list[str]:
    """Load what the settings name into the towers; returns one line per tower about it.

    Args:
        model: of `contrastive.dual_encoder.build_dual_encoder`.
        config: of `contrastive.dual_encoder.model_config`, which the model was built from.

    Raises:
        CheckpointError: nothing there, weights of another model, or differences that
            `init_allow` does not name.
        ValueError: a name of the hub whose files cannot be had.
    """
    reports = {
        "image": load_image_tower(model, image, config),
        "text": load_text_tower(model, text, config),
    }
    return [
        f"{name} tower: random weights" if report is None else str(report)
        for name, report in reports.items()
    ]


def load_image_tower(
    model: Any, image: ImageTowerConfig, config: Mapping[str, Any]
) -> LoadReport | None:
    """Load `image.init_from`: the trunk, and from a dual encoder the projection too."""
    if image.init_from is None:
        return None
    source = image_source(image.init_from)
    check_image_description(source, config["vision_cfg"])
    trunk = model.visual.trunk
    check_pixels(source, trunk.pretrained_cfg)
    check_hidden(source, trunk)
    tensors, left_out = dict(source.tensors), source.left_out
    if not source.whole:
        tensors, classifier = _without_classifier(trunk, tensors)
        left_out += classifier
    return _load(model.visual, "image", source, tensors, left_out, image.init_allow)


def load_text_tower(
    model: Any, text: TextTowerConfig, config: Mapping[str, Any]
) -> LoadReport | None:
    """Load `text.init_from`, or else the weights of `text.folder`, which have no projection."""
    if text.init_from is not None:
        source = text_source(text.init_from)
        check_text_description(source, config)
        return _load(model.text, "text", source, source.tensors, (), text.init_allow)
    if text.kind != "hugging_face":
        return None
    tensors, left_out = read_pretrained_text(text_model_folder(text.folder))
    named = {f"transformer.{name}": value for name, value in tensors.items()}
    source = Source(text.folder, named, whole=False)
    return _load(model.text, "text", source, named, tuple(left_out), text.init_allow)


def _without_classifier(
    trunk: Any, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Drop all of a head that the trunk lacks."""
    named = trunk.pretrained_cfg.get("classifier") or ()  # two names with a distillation head
    names = (named,) if isinstance(named, str) else named
    # "head.fc" may stand beside a norm of either side.
    heads = tuple(f"trunk.{name.partition('.')[0]}." for name in names)
    kept = {f"trunk.{name}" for name in trunk.state_dict()}
    left_out = tuple(name for name in tensors if name not in kept and name.startswith(heads))
    return {name: value for name, value in tensors.items() if name not in left_out}, left_out


def _load(
    tower: nn.Module,
    name: str,
    source: Source,
    tensors: Mapping[str, Tensor],
    left_out: tuple[str, ...],
    allow: list[str],
) -> LoadReport:
    expected = tower.state_dict()
    fresh = () if source.whole else tuple(n for n in expected if not n.startswith(INNER[name]))
    problems = differences({n: v for n, v in expected.items() if n not in fresh}, tensors)
    allowed = _allowed(problems, allow, f"{name}.init_allow")
    refused = [problem for key, problem in problems.items() if key not in allowed]
    if refused:
        raise CheckpointError(
            f"'{source.name}' holds another {name} architecture: {_shorten(refused)}; to start with"
            f" random weights there, match these names in {name}.init_allow"
        )
    matched = {key: value for key, value in tensors.items() if key not in problems}
    tower.load_state_dict(matched, strict=False)
    shown = tuple(problems[key] for key in problems if key in allowed)
    return LoadReport(name, source.name, tuple(matched), fresh, left_out, shown)


# Where the pretrained part of a tower is, of sources that have nothing else.
INNER = {"image": "trunk.", "text": "transformer."}


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, str]:
    """What `found` lacks, has in excess or has in another shape, in words, by name."""
    problems = {name: f"missing {name}" for name in expected if name not in found}
    problems |= {name: f"unexpected {name}" for name in found if name not in expected}
    return problems | {
        name: f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    }


def _allowed(problems: Mapping[str, str], expressions: list[str], setting: str) -> set[str]:
    allowed: set[str] = set()
    for expression in expressions:
        try:
            found = {name for name in problems if re.fullmatch(expression, name)}
        except re.error as error:
            raise CheckpointError(f"{setting} '{expression}': {error}") from error
        if not found:
            names = ", ".join(list(problems)[:SHOWN]) or "everything fits"
            raise CheckpointError(
                f"{setting} '{expression}' matches no parameter that does not fit ({names})"
            )
        allowed |= found
    return allowed


def _shorten(items: tuple[str, ...] | list[str]) -> str:
    shown, more = ", ".join(items[:SHOWN]), len(items) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
