"""What `scripts.export` is given: a run, a checkpoint or a folder, and what is known of its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from encoders.export.model import DualEncoder, ExportError, ImageModel
from encoders.export.model_card import Figure, RunFacts
from encoders.hugging_face_text import TEXT_FOLDER
from encoders.variants import VARIANTS
from eval.image_tower import TIMM_FILE, open_image_tower
from eval.open_model import CONFIG_FILE, WEIGHTS_FILE, open_model
from eval.prompts import read_classnames
from eval.subject import weights_hash
from eval.tasks import figure_name
from training.checkpoint import (
    STATE,
    CheckpointError,
    load_tensors,
    load_weights,
    newest_checkpoint,
    read_state,
    verify_checkpoint,
)
from training.ema import AVERAGED
from training.run_directory import SETTINGS
from training.saving import AVERAGE, TRAINED

# open_clip's words for timm's crop modes; any other one cuts out the centre.
RESIZE = {"squash": "squash", "border": "longest"}
TIMM_WEIGHTS = "model.safetensors"
# Where `scripts.evaluate --output RUN/evaluation.json` leaves its records.
RECORDS = "evaluation.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint folder and the run that it belongs to, if it belongs to one."""

    folder: Path
    run: Path | None

    @property
    def is_dual_encoder(self) -> bool:
        return (self.folder / CONFIG_FILE).is_file()


def find_source(given: str) -> Source:
    """The checkpoint of a path: the newest complete one of a run, or the folder itself.

    Raises:
        ExportError: there is none, or its weights are no safetensors.
    """
    path = Path(given)
    if not path.is_dir():
        raise ExportError(f"'{given}' is no folder: give a run directory or a checkpoint")
    if (path / "checkpoints").is_dir():
        newest, messages = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(messages[0] if messages else f"'{given}' holds no checkpoint")
        return _check_weights(Source(newest, path))
    checkpoints = path.resolve().parent
    own = checkpoints.name == "checkpoints" and (checkpoints.parent / SETTINGS).is_file()
    if own:
        verify_checkpoint(path)
    return _check_weights(Source(path, checkpoints.parent if own else None))


def _check_weights(source: Source) -> Source:
    folder = source.folder
    if not source.is_dual_encoder and not (folder / TIMM_FILE).is_file():
        raise ExportError(
            f"'{folder}' holds neither {CONFIG_FILE} nor {TIMM_FILE}: give a run directory, one of"
            " its checkpoints, or a folder of such files"
        )
    weights = WEIGHTS_FILE if source.is_dual_encoder else TIMM_WEIGHTS
    if not (folder / weights).is_file():
        raise ExportError(
            f"'{folder}' has no {weights}: only safetensors are read, because loading"
            " other formats can run code"
        )
    return source


def open_dual_encoder(source: Source) -> DualEncoder:
    """The dual encoder of a contrastive checkpoint."""
    opened = open_model(str(source.folder))
    description = _read_json(source.folder / CONFIG_FILE)
    text = source.folder / TEXT_FOLDER / "config.json"
    return DualEncoder(
        opened.model,
        description["model_cfg"],
        {
            "mean": list(opened.mean),
            "std": list(opened.std),
            "interpolation": opened.interpolation,
            "resize_mode": opened.resize_mode,
        },
        opened.image_size,
        opened.tokenizer,
        _read_json(text) if text.is_file() else None,
    )


def open_classifier(source: Source) -> ImageModel:
    """The timm model of a classification checkpoint, with its head."""
    opened = open_image_tower(str(source.folder))
    preprocess: dict[str, Any] = {"mean": list(opened.mean), "std": list(opened.std)}
    if opened.name in VARIANTS or (source.folder / STATE).is_file():
        # As our commands train and evaluate, whatever timm does with a model of its own.
        preprocess |= {"interpolation": "bicubic", "resize_mode": "squash"}
    else:
        known = opened.model.pretrained_cfg
        preprocess |= {name: known[name] for name in ("interpolation", "crop_pct")}
        preprocess["resize_mode"] = RESIZE.get(known.get("crop_mode"), "shortest")
    arguments = {name: value for name, value in opened.arguments.items() if name != "num_classes"}
    return ImageModel(
        opened.model,
        opened.name,
        arguments,
        preprocess,
        opened.image_size,
        _classes(source, opened.model.num_classes),
    )


def choose_weights(model: Any, source: Source, which: str) -> None:
    """Load the averaged weights, or those in training, beside what a checkpoint opens with.

    Args:
        model: that was opened, whose parameters have the names of the files.
        which: "checkpoint", "average" or "training".

    Raises:
        ExportError: the run has not averaged its weights.
    """
    average, trained = source.folder / AVERAGE, source.folder / TRAINED  # of trained parameters
    if which == "checkpoint" or (which == "training" and not trained.is_file()):
        return
    if which == "training":
        load_weights(model, load_tensors(trained), str(trained))
        return
    if not average.is_file():
        raise ExportError(
            f"'{source.folder}' has no averaged weights: train with --train.ema_decay, or take"
            " --weights checkpoint"
        )
    tensors, whole = load_tensors(average), model.state_dict()
    tensors.pop("updates", None)
    typed = {name: value.to(whole[name].dtype) for name, value in tensors.items() if name in whole}
    load_weights(model, whole | tensors | typed, str(average))  # refuses those of other models


def _are_averaged(source: Source, which: str) -> bool:
    """Whether `choose_weights` leaves the moving average in the model."""
    return which == "average" or (which == "checkpoint" and (source.folder / TRAINED).is_file())


def other_weights(which: str) -> Callable[[Any, str], None] | None:
    """What puts weights into a model that was opened from a checkpoint; None leaves it alone.

    Args:
        which: as for `choose_weights`.
    """
    if which == "checkpoint":
        return None
    return lambda model, folder: choose_weights(model, Source(Path(folder), None), which)


def _classes(source: Source, count: int) -> tuple[str, ...]:
    """Names of the classes, where the file that the run took them from still has them."""
    stated = _read_json(source.folder / TIMM_FILE).get("label_names")
    if stated:
        return tuple(stated)
    file = (run_settings(source).get("data") or {}).get("classnames")
    if not file or not Path(file).is_file():
        return ()
    names = tuple(read_classnames(file))
    return names if len(names) == count else ()


def run_settings(source: Source) -> dict[str, Any]:
    """The resolved settings of the run, empty if there is none."""
    if source.run is None or not (source.run / SETTINGS).is_file():
        return {}
    return yaml.safe_load((source.run / SETTINGS).read_text(encoding="utf-8")) or {}


def run_facts(source: Source, model: nn.Module, which: str) -> RunFacts:
    """All that the run directory tells about the checkpoint and the weights taken from it.

    Args:
        model: that was opened, with these weights.
        which: they are, as for `choose_weights`.
    """
    if source.run is None:
        return RunFacts()
    settings, state = run_settings(source), read_state(source.folder)
    environment = source.run / "env.json"
    known = _read_json(environment) if environment.is_file() else {}
    step = state["step"]
    averaged = _are_averaged(source, which)
    figures, when = _recorded(source.run / RECORDS, model), step
    if not figures:
        figures, when = _logged(source.run / "eval.jsonl", step, averaged)
    return RunFacts(
        step=step,
        samples=state.get("samples"),
        data=_data(settings.get("data") or {}, state.get("stream") or {}),
        command=["python", "-m", *_module(known.get("command") or [])],
        settings=settings,
        figures=figures,
        figures_step=when,
        averaged=averaged,
        versions=known.get("packages") or {},
    )


def _module(command: list[str]) -> list[str]:
    """`train_contrastive.py` as `scripts.train_contrastive`."""
    if not command:
        return ["(unknown)"]
    first = command[0]
    return [f"scripts.{Path(first).stem}" if first.endswith(".py") else first, *command[1:]]


def _data(data: Mapping[str, Any], stream: Mapping[str, Any]) -> str | None:
    shards = data.get("shards")
    if shards is None:
        return None
    words = shards if isinstance(shards, str) else json.dumps(shards)
    count = stream.get("samples")
    return words if count is None else f"{words} ({count:,} samples)"


def _recorded(path: Path, model: nn.Module) -> list[Figure]:
    """What the evaluation command measured of these very weights, with intervals."""
    records = _read_json(path) if path.is_file() else []
    if not records:
        return []  # hashing takes seconds of a large model
    weights_sha256 = weights_hash(model)
    return [
        Figure(
            f"{record['dataset']}/{figure_name(record['task'], name)}",
            float(value),
            _interval(record, name),
        )
        for record in records
        if record.get("weights_sha256") == weights_sha256
        for name, value in record["metrics"].items()
        if value is not None
    ]


def _interval(record: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    bounds = record["ci95"].get(name)
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))


def _logged(path: Path, step: int, averaged: bool) -> tuple[list[Figure], int | None]:
    """Of the last evaluation during training up to `step` the figures of the averaged weights, or
    else of those in training, and its step."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            rows.append(row)
    for row in sorted(rows, key=lambda found: found["step"], reverse=True):
        figures = [
            Figure(name.removeprefix(AVERAGED), float(value))
            for name, value in row.items()
            if "/" in name
            and name.startswith(AVERAGED) == averaged
            and isinstance(value, int | float)
        ]
        if figures:
            return figures, row["step"]
    return [], None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"'{path}' is not valid JSON: {error}") from error
