"""The model card of an export: what the model is, how to open it, and what is known of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from encoders.export.model import DualEncoder, ImageModel
from encoders.export.model_card import Card, RunFacts
from encoders.routed_layer import RoutedLayer
from encoders.variants import VARIANTS

IMPORT = "import encoders  # of softmoe-clip: registers the image towers with timm\n"
HUB_IMPORT = "from huggingface_hub import snapshot_download\n"
OPEN_CLIP = """{imports}import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("{schema}{name}")
tokenizer = open_clip.get_tokenizer("{schema}{name}")
"""
TIMM = """{imports}import timm

model = timm.create_model("{schema}{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""
TRANSFORMERS = """from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{name}", trust_remote_code=True)
print(classify("picture.png", candidate_labels=["a cat", "a dog"]))
"""
SENTENCE_TRANSFORMERS = """from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)
similarity = model.similarity(model.encode([Image.open("picture.png")]), model.encode(["a cat"]))
"""
ONNX = """import json

import numpy as np
import onnxruntime
{imports}from transformers import AutoTokenizer

folder = {folder}
config = json.load(open(f"{{folder}}/onnx_config.json"))
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = np.full((1, config["context_length"]), config["pad_id"], dtype=np.int64)
tokens = tokenizer("a cat", truncation=True)["input_ids"]
ids[0, : len(tokens)] = tokens
(text,) = onnxruntime.InferenceSession(f"{{folder}}/text.onnx").run(None, {{"input_ids": ids}})
"""
CODE = {
    "open_clip": OPEN_CLIP,
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "onnx": ONNX,
}
WEIGHTS = {
    "average": {"weights": "moving average"},
    "training": {"weights": "those in training, not their moving average"},
}
OWN_CODE = (
    "trust_remote_code runs the Python files of this folder; they need torch, timm, open_clip_torch"
    " and transformers. Where softmoe-clip is installed, `import encoders.transformers_clip` opens"
    " the folder without them."
)
CENTRE = (
    "Where a picture is an odd number of pixels longer than the square that is cut out of it, the"
    " processor of this folder cuts half a pixel before the centre, open_clip sometimes behind it."
)


def describe(
    model: DualEncoder | ImageModel,
    run: RunFacts,
    target: str,
    out: str,
    licence: str | None,
    hub_name: str | None,
    weights: str = "checkpoint",
) -> Card:
    """The card of `model`, exported for `target` to `out` and, perhaps, to the hub."""
    name = hub_name or out
    image = model.model if isinstance(model, ImageModel) else model.model.visual.trunk
    imports = IMPORT if _timm_name(model) in VARIANTS else ""
    folder = f'"{name}"'
    if target == "onnx":
        imports = "" if hub_name is None else HUB_IMPORT
        folder = folder if hub_name is None else f"snapshot_download({folder})"
    code = CODE[target].format(
        imports=imports, name=name, folder=folder,
        schema="local-dir:" if hub_name is None else "hf-hub:",
    )  # fmt: skip
    classifier = isinstance(model, ImageModel) and model.model.num_classes > 0
    return Card(
        title=hub_name or Path(out).name,
        target=target,
        licence=licence,
        code=code,
        model=_facts(model) | WEIGHTS.get(weights, {}),
        routers=_routers(model.model if isinstance(model, DualEncoder) else image),
        run=run,
        limits=_limits(model, target, hub_name),
        pipeline="image-classification" if classifier else None,
    )


def _timm_name(model: DualEncoder | ImageModel) -> str:
    if isinstance(model, ImageModel):
        return model.name
    return model.config["vision_cfg"]["timm_model_name"]


def _facts(model: DualEncoder | ImageModel) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in model.model.parameters())
    pixels = model.preprocess
    facts: dict[str, Any] = {
        "image tower": _timm_name(model),
        "parameters": f"{count:,}",
        "pictures": f"{model.image_size} x {model.image_size}, {pixels['resize_mode']},"
        f" {pixels['interpolation']}, mean {pixels['mean']}, deviation {pixels['std']}",
    }
    if isinstance(model, ImageModel):
        facts["classes"] = model.model.num_classes or "none: features only"
        return facts
    text = model.config["text_cfg"]
    kind = "bag of words" if "bag_of_words" in text else "open_clip transformer"
    if model.text_model is not None:
        kind = model.text_model.get("model_type", "Hugging Face model")
    scores = "sigmoid" if model.sigmoid else "softmax"
    return facts | {
        "text tower": f"{kind}, {model.context_length} tokens",
        "embedding": model.config["embed_dim"],
        "loss": f"{'SigLIP' if model.sigmoid else 'CLIP'}; scores by {scores}",
    }


def _routers(module: Any) -> dict[str, str]:
    """Kind and settings of the routed layers, alike ones together, by the names of their blocks."""
    layers: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        if isinstance(part, RoutedLayer):
            settings = part.extra_repr() or f"num_experts={part.num_experts}"
            layers.setdefault(f"{type(part).__name__}({settings})", []).append(name)
    return {", ".join(names): kind for kind, names in layers.items()}


def _limits(model: DualEncoder | ImageModel, target: str, hub_name: str | None) -> list[str]:
    limits = []
    if target in ("transformers", "sentence-transformers"):
        limits.append(OWN_CODE)
        if model.preprocess["resize_mode"] == "shortest":
            limits.append(CENTRE)
    if target == "open_clip" and isinstance(model, DualEncoder) and model.text_model is not None:
        where = "that name on the hub" if hub_name else "the place this folder was written to"
        limits.append(
            f"open_clip reads the config of the text tower from {where}. Elsewhere, pass"
            ' `text_cfg=... | {"hf_model_name": FOLDER + "/text"}` to `create_model`.'
        )
    limits.append("No other measurement than those above was made by the exporter.")
    return limits
