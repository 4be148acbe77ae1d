"""A classifier that starts from a pretrained image encoder, perhaps at another resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from training.checkpoint import CheckpointError

SHOWN = 4  # names in a message


def load_encoder(model: Any, tensors: Mapping[str, Tensor], source: str) -> str:
    """Load pretrained weights into a timm classifier, all but a head of another shape.

    Learned position embeddings are resampled to the model's grid (bicubic, as timm does); the slots
    of Soft MoE are parameters and stay as many as they were.

    Args:
        model: the classifier, whose head stays as it is where the weights have no equal one.
        tensors: by their names in the timm model.
        source: what messages call them.

    Returns:
        A line about what was loaded.

    Raises:
        CheckpointError: anything else is missing, in excess or of another shape.
    """
    if isinstance(model, VisionTransformer):
        tensors = checkpoint_filter_fn(dict(tensors), model)
    expected = model.state_dict()
    head = {name for name in {*expected, *tensors} if name.partition(".")[0] == _head(model)}
    fits = {
        name: name in tensors and name in expected and tensors[name].shape == expected[name].shape
        for name in {*expected, *tensors}
    }
    wrong = sorted(name for name, fit in fits.items() if not fit and name not in head)
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CheckpointError(
            f"'{source}' holds another architecture than the model here: {', '.join(wrong[:SHOWN])}"
            f"{more} differ; set model.name and model.arguments to its own"
        )
    whole = all(fits[name] for name in head)
    chosen = {name: tensors[name] for name in fits if fits[name] and (whole or name not in head)}
    model.load_state_dict(chosen, strict=False)
    fresh = "" if whole else ", with a fresh head"
    return f"{len(chosen)} tensors from {source}{fresh}"


def _head(model: Any) -> str:
    classifier = model.pretrained_cfg.get("classifier") or "head"
    name = classifier if isinstance(classifier, str) else classifier[0]
    return name.partition(".")[0]
