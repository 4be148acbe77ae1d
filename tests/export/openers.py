"""Open exports with the real libraries, and tell how far they are from what they have to give.

A program: `with_package.py` and `without_package.py` run it in fresh processes.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any


def no_network(*_: Any, **__: Any) -> None:
    raise RuntimeError("an export has asked for the network")


def leave(root: str) -> None:
    """Forget the repository, which an editable install puts on the path, and the network."""
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(root)]
    for owner, names in ((socket.socket, ("connect", "connect_ex")), (socket, ("getaddrinfo",))):
        for name in names:
            setattr(owner, name, no_network)


class Expected:
    """What the exports of one model have to give."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image
        from safetensors.torch import load_file

        self.tensors = load_file(folder / "source" / "expected")
        self.texts = json.loads((folder.parent / "texts.json").read_text())
        files = sorted(folder.parent.glob("picture*.png"))
        self.pictures = [Image.open(path).convert("RGB") for path in files]

    def far(self, found: Any, name: str) -> float:
        expected = self.tensors[name]
        assert found.shape == expected.shape, (found.shape, expected.shape)
        return (found - expected).abs().max().item()


def from_open_clip(folder: Path, expected: Expected) -> dict[str, Any]:
    import open_clip
    import torch

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokens = open_clip.get_tokenizer(name)(expected.texts)
    pixels = torch.stack([preprocess(picture) for picture in expected.pictures])
    with torch.no_grad():
        return {
            "image": expected.far(model.encode_image(expected.tensors["pixels"]), "image"),
            "text": expected.far(model.encode_text(tokens), "text"),
            "tokens": expected.far(tokens, "tokens"),
            "pixels": expected.far(pixels, "pillow"),
            "settings": open_clip.get_model_preprocess_cfg(model),
        }


def from_timm(folder: Path, expected: Expected) -> dict[str, Any]:
    import timm
    import torch
    from transformers import AutoImageProcessor, AutoModel

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = torch.stack([transform(picture) for picture in expected.pictures])
    wrapped = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    given = expected.tensors["pixels"]
    with torch.no_grad():
        return {
            "pooled": expected.far(model(given), "pooled"),
            "wrapped": expected.far(wrapped(pixel_values=given).pooler_output, "pooled"),
            "pixels": expected.far(pixels, "pillow"),
            "wrapped_pixels": expected.far(
                processor(expected.pictures, return_tensors="pt")["pixel_values"], "pillow"
            ),
        }


def from_transformers(folder: Path, expected: Expected, **options: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModel, AutoProcessor, pipeline

    processor = AutoProcessor.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    model.eval()
    pixels = processor.image_processor(expected.pictures, return_tensors="pt")["pixel_values"]
    unit = torch.nn.functional.normalize
    found: dict[str, Any] = {"differences": {k: list(v) for k, v in report.items() if v}}
    with torch.no_grad():
        found["pixels"] = expected.far(pixels, "pixels")
        features = model.get_image_features(pixel_values=expected.tensors["pixels"]).pooler_output
        found["image"] = expected.far(features, "image")
        for cut in (False, True):  # longer texts are cut by the model, or by the tokenizer
            padding = "max_length" if cut else True
            inputs = processor.tokenizer(
                expected.texts, return_tensors="pt", padding=padding, truncation=cut
            )
            text = model.get_text_features(**inputs).pooler_output
            found[f"text_{cut}"] = expected.far(text, "text")
        output = model(pixel_values=expected.tensors["pixels"], **inputs)
        image, text = (unit(expected.tensors[side], dim=-1) for side in ("image", "text"))
        logits = expected.tensors["scale"] * image @ text.T + expected.tensors.get("bias", 0)
        found["logits"] = (output.logits_per_image - logits).abs().max().item()
        labels = expected.texts[:4]
        classify: Any = pipeline("zero-shot-image-classification", model=str(folder), **options)
        alone = processor.tokenizer(expected.texts[0], return_tensors="pt")
        short = model.get_text_features(**alone).pooler_output[0]
        found["short"] = (short - expected.tensors["text"][0]).abs().max().item()
        answers = classify(expected.pictures[0], candidate_labels=labels, hypothesis_template="{}")
        row = logits[0, : len(labels)]
        scores = row.sigmoid() if "bias" in expected.tensors else row.softmax(-1)
        told = {answer["label"]: answer["score"] for answer in answers}
        found["scores"] = max(
            abs(told[label] - score) for label, score in zip(labels, scores.tolist(), strict=True)
        )
    return found


def from_sentence_transformers(folder: Path, expected: Expected, **options: Any) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), **options)
    unit = torch.nn.functional.normalize
    found = {}
    for side, inputs in (("image", expected.pictures), ("text", expected.texts)):
        vectors = torch.from_numpy(model.encode(inputs))
        found[side] = (vectors - unit(expected.tensors[side], dim=-1)).abs().max().item()
    return found | {"width": model.get_embedding_dimension()}


def from_onnx(folder: Path, expected: Expected) -> dict[str, Any]:
    import numpy as np
    import onnxruntime
    import torch
    from transformers import AutoTokenizer

    config = json.loads((folder / "onnx_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.full((len(expected.texts), config["context_length"]), config["pad_id"], dtype=np.int64)
    for row, text in zip(ids, expected.texts, strict=True):
        tokens = tokenizer(text, truncation=True)["input_ids"]
        row[: len(tokens)] = tokens
    given = {
        "image": ("pixel_values", expected.tensors["pixels"].numpy()),
        "text": ("input_ids", ids),
    }
    unit = torch.nn.functional.normalize
    found = {}
    for side, (name, inputs) in given.items():
        session = onnxruntime.InferenceSession(folder / f"{side}.onnx")
        (vectors,) = session.run(None, {name: inputs})
        far = torch.from_numpy(vectors) - unit(expected.tensors[side], dim=-1)
        found[side] = far.abs().max().item()
    return found


def from_timm_classifier(folder: Path, tensors: dict[str, Any]) -> float:
    import timm
    import torch
    from transformers import AutoModelForImageClassification

    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        answers = opened(tensors["pixels"]), wrapped(pixel_values=tensors["pixels"]).logits
    return max((answer - tensors["logits"]).abs().max().item() for answer in answers)


def run_card(folder: Path) -> list[str]:
    """Names that the code on a model card leaves; it looks for picture.png where it is run."""
    shutil.copy(folder.parents[1] / "picture0.png", "picture.png")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(folder), "exec"), found)
    return sorted(name for name in found if not name.startswith("_"))


def tell(report: dict[str, Any]) -> None:
    print("\n" + json.dumps(report, default=str))  # a library may have left a line open
