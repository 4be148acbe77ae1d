"""Settings of evaluation sets: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EvaluationSetConfig:
    """One set of pictures; what it names is measured.

    With `classnames`: zero-shot classification of `label_key` among them. With `caption_key`:
    retrieval in both directions.
    """

    name: str = ""
    """Prefix of its figures; empty takes the folder's name."""
    shards: str = ""
    """Shard pattern, as for training."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    classnames: str = ""
    """File with one class name per line, in label order."""
    label_key: str = "cls"
    """Member that holds the label, or `json:field`."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Prompt templates with one placeholder, or one name of a file with a template per line."""
    class_prompts: str = ""
    """JSON file {class name: [prompt, ...]} with each class's own prompts, in place of templates
    (CuPL's layout)."""
    canonicalize: bool = False
    """Lower-case prompts and strip punctuation, as big_vision does."""
    caption_key: str | None = None
    """Member with one caption per line, or `json:field`; null measures no retrieval."""
    batch_size: int = 256
    resize_mode: str | None = None
    """squash stretches to the square; shortest scales the shorter side and crops the centre; null
    is what the model was trained with."""
