"""Settings of evaluation sets: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvaluationSetConfig:
    """One set of pictures; what it names is measured.

    `tasks` says what; without it, `classnames` asks for zero-shot classification of `label_key`
    among them and `caption_key` for retrieval in both directions. Of a model without a text tower
    few_shot and knn are measured, where there is a training split.
    """

    name: str = ""
    """Prefix of its figures; empty takes the folder's name."""
    shards: str = ""
    """Shard pattern, as for training."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    classnames: str = ""
    """File with one class name per line, in label order; `builtin:cifar10` and so on; or
    `open_clip:imagenet`."""
    label_key: str = "cls"
    """Member that holds the label, a number or one of `classnames`, or `json:field`."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Prompt templates with one placeholder, or one name of a file with a template per line,
    `builtin:cifar10` and so on, `open_clip:80` or `open_clip:7`."""
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
    exif_orientation: bool = False
    """Turn photographs upright as their EXIF data say, where training did; open_clip and big_vision
    do not."""
    tasks: list[str] = field(default_factory=list)
    """zero_shot_classification, retrieval, few_shot, linear_probe, knn."""
    data: str = ""
    """In place of shards: a folder in CLIP_benchmark's layout (`test/*.tar`, `classnames.txt`,
    `zeroshot_classification_templates.txt`), an image folder with one subfolder per class, a
    dataset of Hugging Face `datasets`, or a Karpathy file (`dataset_coco.json`)."""
    images: str = ""
    """Folder of the pictures that a Karpathy file names."""
    split: str = "test"
    train_split: str = "train"
    """Split that probes learn from; a folder beside `split`, or a split of `datasets`."""
    train_shards: str = ""
    """Shards that probes learn from, where `shards` is given."""
    label_kind: Literal["single", "any", "multi"] = "single"
    """single; any of several labels is right (ImageNet-ReaL); or multi-label average precision."""
    recall_ks: list[int] = field(default_factory=lambda: [1, 5, 10])
