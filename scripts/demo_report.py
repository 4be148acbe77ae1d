"""Figures and pictures of the demo: a table on the terminal and one HTML page."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from data_pipelines.evaluation import EvaluationSet
from encoders.auxiliary_losses import routed_layers
from encoders.routing_report import choose_slots, draw_slot_maps
from encoders.routing_statistics import collect_routing, collect_soft_routing, soft_only
from eval.config import EvaluationSetConfig
from eval.embedding import EmbeddedSet, embed
from eval.evaluation_sets import plan_set
from eval.open_model import OpenedModel, open_model
from eval.report import (
    Curve,
    ImageQuery,
    Picture,
    Report,
    Table,
    TextQuery,
    read_jsonl,
    smooth,
    write_report,
)
from eval.retrieval import RetrievalRanks, ranks_from_similarity, recall_from_ranks
from eval.statistics import chance_recall
from eval.subject import Caller, from_opened
from eval.tables import short, text_table
from eval.yardstick import pixel_class_scores, pixel_nearest_neighbour, word_bridge
from scripts.demo import read_records

SIZE = 64
RECALLS = (1, 5, 10)
ARROWS = {"text_retrieval": "image → text", "image_retrieval": "text → image"}


class Result(NamedTuple):
    """A task, and the shares that the model, what trains nothing, and chance get right; None where
    that was not measured."""

    task: str
    model: float | None
    baseline: float | None
    chance: float


@dataclass(frozen=True)
class PictureSet:
    """All pictures of one split: images uint8 (N, 3, 64, 64), labels int64 (N,), the captions
    and, in one string, the name and keywords of each."""

    images: Tensor
    labels: Tensor
    captions: list[list[str]]
    words: list[str]


def build_report(folder: Path, data: Path, seconds: dict[str, float]) -> Path:
    """Print the table and write `report.html`; needs the runs and `evaluation.json` in `folder`."""
    sets = {name: load_set(data / name) for name in ("train", "test", "test-unseen")}
    results = measured_results(read_records(folder / "evaluation.json"), sets)
    table = results_table(results)
    print("\n" + text_table(table.header, table.rows))
    opened = open_model(str(folder / "contrastive"))
    config = EvaluationSetConfig(
        shards=str(data / "test" / "*.tar"), classnames="", caption_key="txt"
    )
    subject = from_opened("demo", opened, Caller(torch.device("cpu"), None), "fp32")
    planned = plan_set(config, subject)
    embedded = embed(planned.subject, planned.test, {"image", "text"})
    minutes = sum(seconds.values()) / 60
    report = Report(
        title="Soft MoE CLIP on emoji",
        summary=[
            "An image encoder with Soft MoE layers and a small text tower, trained on five drawing"
            " styles and measured on a sixth that no training step has seen.",
            verdict(*results[:2]),
            f"Pretraining, contrastive training and evaluation took {minutes:.1f} minutes here.",
        ],
        tables=[table],
        curves=curves(folder),
        text_queries=text_queries(embedded, sets["test"], 8, 5),
        image_queries=image_queries(embedded, sets["test"], 8, 3),
        pictures=slot_pictures(opened, sets["test"]),
        facts=facts(folder, seconds),
    )
    path = folder / "report.html"
    write_report(report, path)
    return path


def load_set(folder: Path) -> PictureSet:
    """Read a split that `data_pipelines.emoji.prepare` wrote."""
    names = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    dataset = EvaluationSet(
        str(folder / "*.tar"),
        SIZE,
        image_keys=["webp"],
        caption_key="txt",
        label_key="cls",
        classnames=names,
    )
    samples = [dataset[number] for number in range(len(dataset))]
    return PictureSet(
        torch.stack([sample["image"] for sample in samples]),
        torch.tensor([sample["label"] for sample in samples]),
        [sample["captions"] for sample in samples],
        [_words(dataset, number) for number in range(len(dataset))],
    )


def _words(dataset: EvaluationSet, number: int) -> str:
    record = json.loads(dataset.reader.read(number, "json") or b"{}")
    return " ".join([record["name"], *record["keywords"]])


def measured_results(
    records: dict[tuple[str, str], dict[str, float | None]], sets: dict[str, PictureSet]
) -> list[Result]:
    """The test figures beside chance and beside baselines that train nothing: top-1 and top-5 of
    seen concepts, then the others."""
    train, test, unseen = sets["train"], sets["test"], sets["test-unseen"]
    classes = int(train.labels.max()) + 1
    pixels = pixel_nearest_neighbour(train.images, train.labels, test.images, test.labels)
    bridge = word_bridge(
        train.images,
        train.words,
        unseen.images,
        unseen.labels,
        _words_by_label(unseen),
    )
    seen_scores = records["test", "zeroshot_classification"]
    unseen_scores = records["test-unseen", "zeroshot_classification"]
    choices = len(unseen.labels.unique())
    results = [
        Result(f"seen concepts, top-{k} of {classes}", seen_scores[f"acc{k}"], pixels[f"acc{k}"],
             k / classes)
        for k in (1, 5)
    ] + [
        Result(f"unseen concepts, top-{k} of {choices}", unseen_scores[f"acc{k}"],
             bridge if k == 1 else None, k / choices)
        for k in (1, 5)
    ]  # fmt: skip
    found = records["test", "zeroshot_retrieval"]
    baseline = pixel_retrieval(train, test, classes)
    counts = [len(lines) for lines in test.captions]
    for prefix, arrow in ARROWS.items():
        texts = prefix == "text_retrieval"
        answers = counts if texts else [1] * sum(counts)
        pool = sum(counts) if texts else len(counts)
        for k in RECALLS:
            name = f"{prefix}_recall@{k}"
            chance = chance_recall(answers, pool, k)
            results.append(
                Result(f"{arrow}, recall@{k} of {pool}", found[name], baseline[name], chance)
            )
    return results


def results_table(results: Sequence[Result]) -> Table:
    """The figures as they are shown."""
    return Table(
        "Test style (fluent-3d), never seen in training",
        ["task", "model", "no training", "chance"],
        [[r.task, short(r.model), short(r.baseline), f"{r.chance:.4f}"] for r in results],
        note="No training: the nearest training picture by 16x16 pixel averages, and for unseen"
        " concepts the words of the ten nearest (word bridge).",
    )


def verdict(first: Result, five: Result) -> str:
    """Top-1 and top-5 of seen concepts in words."""
    return (
        "Of the concepts that training has seen in other styles, it names"
        f" {_percent(first.model)} at its first try and {_percent(five.model)} within five. The"
        " nearest training picture by pixels, which takes no training at all, gets"
        f" {_percent(first.baseline)} and {_percent(five.baseline)}; guessing,"
        f" {_percent(first.chance)}."
    )


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.1%}"


def _words_by_label(pictures: PictureSet) -> list[str]:
    words = dict(zip(pictures.labels.tolist(), pictures.words, strict=True))
    return [words[label] for label in sorted(words)]


def pixel_retrieval(train: PictureSet, test: PictureSet, classes: int) -> dict[str, float]:
    """Retrieval by pixels: a caption is as near to a picture as the training pictures of the
    caption's concept are."""
    scores = pixel_class_scores(train.images, train.labels, test.images, classes)
    owners = torch.tensor(
        [image for image, lines in enumerate(test.captions) for _ in lines], dtype=torch.int64
    )
    similarity = scores[:, test.labels[owners]]
    relevant = owners[None, :] == torch.arange(len(test.images))[:, None]
    ranks = RetrievalRanks(
        ranks_from_similarity(similarity, relevant),
        ranks_from_similarity(similarity.T, relevant.T),
    )
    return recall_from_ranks(ranks, RECALLS)


def curves(folder: Path) -> list[Curve]:
    """Loss of both stages, and validation figures over the samples seen."""
    charts = []
    for name, title in (("pretrain", "Pretraining"), ("contrastive", "Contrastive training")):
        path = folder / name / "metrics.jsonl"
        if not path.exists():  # the long preset trains from scratch
            continue
        rows = [row for row in read_jsonl(path) if row["loss"] is not None]
        raw = [(float(row["step"]), float(row["loss"])) for row in rows]
        half_life = max(1.0, raw[-1][0] / 50)
        series = {"loss": raw, "smoothed": smooth(raw, half_life)}
        charts.append(Curve(f"{title}: loss", "step", "loss", series))
    rows = read_jsonl(folder / "contrastive" / "eval.jsonl")
    shown = {
        "zero-shot top-1": "val/acc1",
        "zero-shot top-5": "val/acc5",
        "image → text recall@1": "val/text_retrieval_recall@1",
        "text → image recall@10": "val/image_retrieval_recall@10",
    }
    series = {
        label: [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
        for label, key in shown.items()
    }
    series = {label: points for label, points in series.items() if points}
    charts.append(Curve("Validation style (fluent-flat)", "step", "share", series))
    return charts


def _spread(count: int, total: int) -> list[int]:
    """Evenly spaced indices: a fixed choice that nobody has picked."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def text_queries(
    embedded: EmbeddedSet, pictures: PictureSet, count: int, answers: int
) -> list[TextQuery]:
    """The best pictures for the first captions of evenly spaced test pictures."""
    images = torch.nn.functional.normalize(embedded.rows["image"], dim=1)
    texts = torch.nn.functional.normalize(embedded.rows["text"], dim=1)
    first = {int(owner): text for text, owner in reversed(list(enumerate(embedded.owners)))}
    queries = []
    for owner in _spread(count, len(images)):
        scores, best = (images @ texts[first[owner]]).topk(answers)
        queries.append(
            TextQuery(
                embedded.captions[first[owner]],
                [_picture(pictures, int(i)) for i in best],
                scores.tolist(),
                [int(i) == owner for i in best],
            )
        )
    return queries


def image_queries(
    embedded: EmbeddedSet, pictures: PictureSet, count: int, answers: int
) -> list[ImageQuery]:
    """The best captions for evenly spaced test pictures (others than those of the captions)."""
    images = torch.nn.functional.normalize(embedded.rows["image"], dim=1)
    texts = torch.nn.functional.normalize(embedded.rows["text"], dim=1)
    queries = []
    for place in _spread(2 * count, len(images))[1::2]:
        scores, best = (texts @ images[place]).topk(answers)
        queries.append(
            ImageQuery(
                _picture(pictures, place),
                [embedded.captions[int(i)] for i in best],
                scores.tolist(),
                [int(embedded.owners[int(i)]) == place for i in best],
            )
        )
    return queries


def _picture(pictures: PictureSet, number: int) -> Any:
    return pictures.images[number].permute(1, 2, 0).numpy()


def slot_pictures(
    opened: OpenedModel, pictures: PictureSet, rows: int = 5, columns: int = 6
) -> list[Picture]:
    """What some slots of the last layer with slots look at, over test pictures; other routers have
    none to show."""
    size = [opened.image_size, opened.image_size]
    images = pictures.images[_spread(rows, len(pictures.images))]
    inputs = resize(images, size, antialias=True)
    trunk = opened.model.visual.trunk
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (opened.mean, opened.std))
    many = resize(pictures.images[_spread(64, len(pictures.images))], size, antialias=True)
    routing = collect_routing(trunk, (many / 255 - mean) / std) if routed_layers(trunk) else {}
    found = soft_only(routing)
    if not found:
        return []
    layer, weights = list(found.items())[-1]
    chosen = choose_slots(weights.dispatch, min(columns, weights.dispatch.shape[2]))
    shown = collect_soft_routing(trunk, (inputs / 255 - mean) / std)[layer]
    figure = draw_slot_maps(images, shown.dispatch, chosen)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    down, across = trunk.patch_embed.grid_size
    return [
        Picture(
            f"What slots look at ({layer})",
            buffer.getvalue(),
            alt=f"Heat maps of {len(chosen)} slots over {rows} pictures",
            note=f"The model sees a picture as {down} x {across} patches. Shown are dispatch"
            " weights of the last Soft MoE layer, in multiples of a uniform weight, of slots that"
            " are concentrated and differ from one another.",
        )
    ]


def facts(folder: Path, seconds: dict[str, float]) -> dict[str, str]:
    """What it takes to repeat the run."""
    contrastive = json.loads((folder / "contrastive" / "env.json").read_text(encoding="utf-8"))
    speed = read_jsonl(folder / "contrastive" / "metrics.jsonl")[-1]["samples_per_second"]
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "open_clip_torch")},
        "contrastive command": " ".join(contrastive["command"]),
        "contrastive speed": f"{speed:.0f} images/s",
        **{f"time for {name}": f"{value / 60:.1f} min" for name, value in seconds.items()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names: Sequence[str] = [
        line.partition(":")[2].strip() for line in lines if "model name" in line
    ]
    return names[0] if names else platform.machine()
