"""A folder that transformers opens, with this package or, from the code in it, without."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPProcessor

import encoders.transformers_clip as model_code
from encoders.export.model import DualEncoder, ExportError, save_weights
from encoders.export.tokenizer import export_tokenizer

PACKAGE = Path(model_code.__file__).parent
MODEL_MODULE = Path(model_code.__file__).stem
OWN_IMPORT = re.compile(rf"^(\s*)from {PACKAGE.name}\.(\w+) import ", re.MULTILINE)
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def write_transformers(encoder: DualEncoder, folder: Path) -> None:
    """Write config, weights, processor and the code of the model.

    Args:
        encoder: what to write.
        folder: exists, and is empty.

    Raises:
        ExportError: pictures are resized in a way that no processor of transformers has.
    """
    kind = "SoftMoESiglip" if encoder.sigmoid else "SoftMoEClip"
    config = getattr(model_code, f"{kind}Config")(
        model_cfg=portable_config(encoder), text_model=encoder.text_model
    )
    config.architectures = [f"{kind}Model"]
    config.dtype = "float32"
    names = ("AutoModel", "AutoModelForZeroShotImageClassification")
    config.auto_map = {"AutoConfig": f"{MODEL_MODULE}.{kind}Config"} | dict.fromkeys(
        names, f"{MODEL_MODULE}.{kind}Model"
    )
    CLIPProcessor(image_processor(encoder), export_tokenizer(encoder)).save_pretrained(folder)
    config.save_pretrained(folder)
    save_weights(encoder.model, folder / "model.safetensors")
    for name in code_closure(MODEL_MODULE):
        (folder / f"{name}.py").write_text(portable_code(name), encoding="utf-8")


def portable_config(encoder: DualEncoder) -> dict[str, Any]:
    """`model_cfg` without the places that the text model came from."""
    config = dict(encoder.config)
    if encoder.text_model is not None:
        own = {"hf_model_name": "", "hf_tokenizer_name": "", "hf_model_pretrained": False}
        config["text_cfg"] = config["text_cfg"] | own
    return config


def image_processor(encoder: DualEncoder) -> CLIPImageProcessor:
    """What makes pixels (B, 3, S, S) of pictures, resized with antialias as in our evaluation.

    Raises:
        ExportError: it cannot resize as the model wants it.
    """
    size, settings = encoder.image_size, encoder.preprocess
    mode = settings["resize_mode"]
    if mode not in ("squash", "shortest") or settings["interpolation"] not in RESAMPLING:
        raise ExportError(
            f"no processor of transformers resizes by {mode} with {settings['interpolation']}"
            " interpolation: choose --to open_clip"
        )
    square = {"height": size, "width": size}
    return CLIPImageProcessor(
        size=square if mode == "squash" else {"shortest_edge": size},
        do_center_crop=mode == "shortest",
        crop_size=square,
        resample=RESAMPLING[settings["interpolation"]],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def code_closure(module: str) -> list[str]:
    """Names of the modules of `encoders` that the named one needs, with itself."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [match[2] for match in OWN_IMPORT.finditer(_source(name))]
    return sorted(found)


def portable_code(module: str) -> str:
    """The source of a module of `encoders` that imports its neighbours in the same folder."""
    origin = (
        f"# {PACKAGE.name}/{module}.py of softmoe-clip {version('softmoe-clip')}, Apache-2.0.\n"
    )
    return origin + OWN_IMPORT.sub(r"\1from .\2 import ", _source(module))


def _source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
