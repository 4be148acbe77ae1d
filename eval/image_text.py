"""Zero-shot classification and retrieval of a dual encoder on one set of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.evaluation import EvaluationSet
from encoders.pixels import Normalize
from eval.config import EvaluationSetConfig
from eval.gather import gather_counts, gather_variable, process
from eval.prompts import (
    class_prompts,
    read_class_prompts,
    read_classnames,
    read_templates,
)
from eval.retrieval import retrieval_metrics
from eval.zero_shot import class_vectors, zero_shot_metrics

EncodeImage = Callable[[Tensor], Tensor]
EncodeText = Callable[[list[str]], Tensor]


@dataclass
class Embeddings:
    """A set as the model sees it, in the set's order; unusable samples are left out.

    `images` (N, d) and `texts` (M, d) float32; `labels` (N,) int64, -1 without labels;
    `numbers` (N,) int64, the sample numbers; `image_of_text` (M,) int64 into 0..N-1;
    `captions` the M texts, known only without other processes; `skipped` reasons with counts.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    texts: Tensor
    image_of_text: Tensor
    captions: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


class ImageTextEvaluator:
    """Measures one evaluation set; usable by the loop and on its own.

    Args:
        config: the set and what to measure on it.
        image_size: pixels per side of the model's input.
        tokenizer: list of strings to int64 (B, L).
        mean: of the model's pixels, by channel.
        std: of the model's pixels, by channel.
        resize_mode: the model's own, which the set's configuration may override.
        interpolation: bicubic or bilinear.
        workers: loader processes that decode; with 0 this one does.

    Raises:
        ShardError, ValueError: unusable shards, names or templates; nothing to measure; or a
            resize mode or an interpolation that is not supported.
    """

    def __init__(
        self,
        config: EvaluationSetConfig,
        image_size: int,
        tokenizer: Callable[[list[str]], Tensor],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        resize_mode: str = "squash",
        interpolation: str = "bicubic",
        workers: int = 0,
    ) -> None:
        if not config.classnames and config.caption_key is None:
            raise ValueError(
                f"evaluation set '{config.shards}' measures nothing: set classnames for zero-shot"
                " classification, caption_key for retrieval, or both"
            )
        self.config, self.tokenizer, self.workers = config, tokenizer, workers
        self.name = config.name or Path(config.shards).parent.name
        self.resize_mode, self.interpolation = config.resize_mode or resize_mode, interpolation
        self.skipped: Counter[str] = Counter()
        """Reasons of the samples that the last measurement left out, over all processes."""
        self.normalize = Normalize(mean, std)
        self.prompts: list[list[str]] = []
        self.classnames: list[str] = []
        if config.classnames:
            self.classnames = read_classnames(config.classnames)
            self.prompts = set_prompts(config, self.classnames)
        elif config.class_prompts:
            raise ValueError(
                f"class_prompts '{config.class_prompts}' needs classnames, the file that orders"
                " the labels"
            )
        self.dataset = EvaluationSet(
            config.shards,
            image_size,
            image_keys=config.image_keys,
            caption_key=config.caption_key,
            label_key=config.label_key if self.prompts else None,
            num_classes=len(self.prompts),
            resize_mode=self.resize_mode,
            interpolation=interpolation,
            exif_orientation=config.exif_orientation,
        )

    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        """Metrics of an open_clip model in eval mode."""
        encode_image, encode_text = self.encoders(model)
        return self.measure(encode_image, encode_text)

    def encoders(self, model: Any) -> tuple[EncodeImage, EncodeText]:
        """Callables that take uint8 pictures (B, 3, S, S) and strings, on the model's device."""
        device = next(model.parameters()).device
        normalize = self.normalize.to(device)

        def encode_image(images: Tensor) -> Tensor:
            return model.encode_image(normalize(images.to(device)))

        def encode_text(texts: list[str]) -> Tensor:
            return model.encode_text(self.tokenizer(texts).to(device))

        return encode_image, encode_text

    @torch.inference_mode()
    def measure(
        self, encode_image: EncodeImage, encode_text: EncodeText
    ) -> dict[str, float | None]:
        """Zero-shot and retrieval figures, as far as the configuration asks for them."""
        embedded = self.embed(encode_image, encode_text)
        figures: dict[str, float | None] = {}
        if self.prompts:
            vectors = class_vectors(encode_text, self.prompts, self.config.batch_size).cpu()
            figures |= zero_shot_metrics(embedded.images, embedded.labels, vectors)
        if self.config.caption_key is not None:
            figures |= retrieval_metrics(embedded.images, embedded.texts, embedded.image_of_text)
        self.skipped = embedded.skipped
        if self.skipped:
            figures["skipped"] = float(self.skipped.total())
        return figures

    @torch.inference_mode()
    def embed(self, encode_image: EncodeImage, encode_text: EncodeText) -> Embeddings:
        """Embed this process's share of the set and gather everybody's."""
        rank, world = process()
        images, labels, numbers, owners = [], [], [], []
        captions: list[str] = []
        skipped: Counter[str] = Counter()
        for batch in self.dataset.batches(self.config.batch_size, rank, world, self.workers):
            skipped.update(batch.pop("skipped"))
            if not batch:
                continue
            images.append(encode_image(batch["image"]).float().cpu())
            labels += batch["label"]
            numbers += batch["number"]
            for number, lines in zip(batch["number"], batch["captions"], strict=True):
                captions += lines
                owners += [number] * len(lines)
        texts = [
            encode_text(captions[start : start + self.config.batch_size]).float().cpu()
            for start in range(0, len(captions), self.config.batch_size)
        ]
        all_numbers = gather_variable(torch.tensor(numbers, dtype=torch.int64))
        order = all_numbers.argsort()
        all_owners = gather_variable(torch.tensor(owners, dtype=torch.int64))
        text_order = all_owners.argsort(stable=True)
        all_numbers = all_numbers[order]
        return Embeddings(
            images=gather_variable(_rows(images))[order],
            labels=gather_variable(torch.tensor(labels, dtype=torch.int64))[order],
            numbers=all_numbers,
            texts=gather_variable(_rows(texts))[text_order] if len(all_owners) else _rows([]),
            image_of_text=torch.searchsorted(all_numbers, all_owners[text_order]),
            captions=captions if world == 1 else [],
            skipped=gather_counts(skipped),
        )


def set_prompts(config: EvaluationSetConfig, classnames: list[str]) -> list[list[str]]:
    """C lists of prompts from the templates or the prompt file of a set.

    Raises:
        ValueError: both are given, or what they hold is unusable.
    """
    templates = config.templates
    if config.class_prompts:
        if templates != EvaluationSetConfig().templates:
            raise ValueError(
                f"evaluation set '{config.shards}' has both templates and class_prompts: set one"
            )
        return read_class_prompts(config.class_prompts, classnames, config.canonicalize)
    known = ("builtin:", "open_clip:")
    if len(templates) == 1 and (templates[0].startswith(known) or Path(templates[0]).is_file()):
        templates = read_templates(templates[0])
    return class_prompts(classnames, templates, config.canonicalize)


def _rows(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, 0)
