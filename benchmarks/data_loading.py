"""Images per second of decoding, transforms and streams, against open_clip's PIL transforms.

    python -m benchmarks.data_loading PHOTOS [--rounds 7] [--quick]

PHOTOS is a folder of JPEG photographs, the larger the better. They are measured in sets:

* `512 px`: all of them, encoded again with 512 pixels on the longer side, quality 90.
* `2 MP`: those of at least two megapixels, encoded again with two.
* `1-4 MP baseline` and `1-4 MP progressive`: those of one to four megapixels as they are. A
  progressive JPEG takes three times as long to decode as a baseline one, with any decoder.

Cases, all to 224 pixels on one thread: open_clip's `image_transform` for evaluation and for
training on pictures that Pillow opens, normalisation included; ours, which leaves normalisation to
the device; the inception recipe and scaled decoding; and streams over a shard of the same pictures
with no loader process, batching included, against the bare functions that they call.

The cases of a group (transforms; streams and what they call) take turns on chunks of pictures, so
that a slow second of the machine hits all of them, and the clock is the process's CPU time, which
other programs disturb least: images per second per core. Figures are medians over rounds; a ratio
is the median of the ratios within each round. Photographs repeat from round to round. The result is
kept in `benchmarks/results/data_loading_cpu.json`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import PIL
import torch
import torchvision
from open_clip.transform import image_transform
from PIL import Image
from webdataset import TarWriter

from benchmarks.machine import RESULTS, machine
from data_pipelines.classification import classification_stream
from data_pipelines.config import (
    AugmentationConfig,
    ClassificationConfig,
    ImageTextConfig,
    StreamConfig,
)
from data_pipelines.decode import decode_rgb
from data_pipelines.image_text import image_text_stream
from data_pipelines.stream import Stream
from data_pipelines.training_pictures import TrainingPictures
from data_pipelines.transforms import eval_transform

SIZE = 224
CHUNK = 32  # pictures in a turn, and the streams' batch
BARE = "bare training"


@dataclass(frozen=True)
class Case:
    """A way to load a chunk of encoded pictures, and the case its rate is divided by."""

    label: str
    load: Callable[[list[bytes]], object]
    against: str | None = None


def photo_sets(folder: Path, limit: int | None = None) -> dict[str, list[bytes]]:
    """Encoded pictures by the name of their set; `limit` caps the photographs that are read.

    Raises:
        ValueError: no JPEG file in the folder.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise ValueError(f"no .jpg files in '{folder}': name a folder of photographs")
    if limit is not None:  # from everywhere in the list, whose neighbours are alike
        paths = paths[:: max(1, len(paths) // limit)][:limit]
    sets: dict[str, list[bytes]] = {}
    for path in paths:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            kind = "progressive" if image.info.get("progressive") else "baseline"
            shares = {"512 px": 512 / max(image.size), "2 MP": (2e6 / pixels) ** 0.5}
            if 1e6 <= pixels < 4.2e6:
                sets.setdefault(f"1-4 MP {kind}", []).append(data)
            image = image.convert("RGB")
            for name, share in shares.items():
                if share <= 1:
                    sets.setdefault(name, []).append(_encode(image, share))
    order = ("512 px", "2 MP", "1-4 MP baseline", "1-4 MP progressive")
    return {name: sets[name] for name in order if name in sets}


def _encode(image: Image.Image, share: float) -> bytes:
    size = (round(image.width * share), round(image.height * share))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def transform_cases() -> list[Case]:
    """Decoding and transforms alone."""
    theirs: dict[str, Any] = {
        "evaluation": image_transform(SIZE, False),
        "training": image_transform(SIZE, True),
    }
    evaluation = eval_transform(SIZE, "shortest")
    scaled = StreamConfig(scaled_decoding=True)

    def training(config: StreamConfig, recipe: Any) -> Callable[[bytes], object]:
        return TrainingPictures(config, AugmentationConfig(recipe=recipe), SIZE)

    return [
        *(
            Case(f"open_clip {name}", _each(lambda data, f=f: f(Image.open(io.BytesIO(data)))))
            for name, f in theirs.items()
        ),
        Case("evaluation", _each(lambda d: evaluation(decode_rgb(d))), "open_clip evaluation"),
        Case("training", _each(training(StreamConfig(), "clip")), "open_clip training"),
        Case("training, scaled", _each(training(scaled, "clip")), "open_clip training"),
        Case("inception", _each(training(StreamConfig(), "inception"))),
    ]


def _each(load: Callable[[bytes], object]) -> Callable[[list[bytes]], object]:
    return lambda chunk: [load(data) for data in chunk]


def stream_cases(pictures: list[bytes], folder: Path) -> list[Case]:
    """Streams over one shard of the pictures, in its order: a chunk is the next batch."""
    shard = str(folder / "shard.tar")
    with TarWriter(shard, encoder=False) as writer:
        for number, data in enumerate(pictures):
            label, caption = str(number).encode(), f"photograph number {number}".encode()
            members = {"jpg": data, "cls": label, "txt": caption}
            writer.write({"__key__": f"{number:06d}"} | members)
    options = {"image_size": SIZE, "seed": 0, "global_batch": CHUNK}
    labelled = classification_stream(
        ClassificationConfig(shards=shard, shuffle=False), num_classes=len(pictures), **options
    )
    bare = TrainingPictures(StreamConfig(), AugmentationConfig(), SIZE)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    captioned = image_text_stream(
        ImageTextConfig(shards=shard, shuffle=False), tokenize=tokenizer, **options
    )
    return [
        Case(BARE, _each(bare)),
        Case("labelled stream", _next_batch(labelled), BARE),
        Case("captioned stream", _next_batch(captioned), BARE),
    ]


def _next_batch(stream: Stream) -> Callable[[list[bytes]], object]:
    batches: Iterator[dict[str, Any]] = stream.batches()
    return lambda chunk: next(batches)


def measure(
    cases: list[Case],
    pictures: list[bytes],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Images per second of each case in each round."""
    chunks = [pictures[i : i + CHUNK] for i in range(0, len(pictures) - CHUNK + 1, CHUNK)]
    rates: dict[str, list[float]] = {case.label: [] for case in cases}
    for number in range(rounds + 1):
        seconds = dict.fromkeys(rates, 0.0)
        for turn, chunk in enumerate(chunks):
            # Another case begins each time, so that none always follows the same one.
            first = (number + turn) % len(cases)
            for case in cases[first:] + cases[:first]:
                start = clock()
                case.load(chunk)
                seconds[case.label] += clock() - start
        if number:  # the first round grows the heap and fills the caches
            for label, total in seconds.items():
                rates[label].append(CHUNK * len(chunks) / total)
    return rates


def summarise(cases: list[Case], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median rates, and the ratios to the case that each is held against."""
    rows = []
    for case in cases:
        own = rates[case.label]
        row: dict[str, Any] = {"case": case.label, "images_per_s": round(statistics.median(own), 1)}
        if case.against is not None:
            pairs = zip(own, rates[case.against], strict=True)
            ratios = [mine / other for mine, other in pairs]
            row |= {"against": case.against, "ratio": round(statistics.median(ratios), 3)}
            row["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            if case.against == BARE:
                extra = [
                    1e6 / mine - 1e6 / other for mine, other in zip(own, rates[BARE], strict=True)
                ]
                row["extra_us"] = round(statistics.median(extra), 1)
        rows.append(row)
    return rows


def scaling_error(pictures: list[bytes]) -> dict[str, float]:
    """How far pixels of 255 that were decoded smaller lie from those decoded whole."""
    whole, scaled = (
        TrainingPictures(
            StreamConfig(scaled_decoding=option), AugmentationConfig(recipe="resize"), SIZE
        )
        for option in (False, True)
    )
    errors = torch.cat(
        [(whole(data).int() - scaled(data).int()).abs().flatten() for data in pictures]
    )
    return {
        "mean": round(errors.float().mean().item(), 3),
        "share_over_8": round((errors > 8).float().mean().item(), 5),
        "max": int(errors.max()),
    }


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        line = f"  {row['case']:24} {row['images_per_s']:8.1f} images/s"
        if "against" in row:
            low, high = row["ratio_range"]
            line += f"   {row['ratio']:.2f} ({low:.2f} to {high:.2f}) of {row['against']}"
        if "extra_us" in row:
            line += f", {row['extra_us']:.0f} us more a picture"
        print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each case")
    parser.add_argument("--quick", action="store_true", help="16 photos, 3 rounds, no file")
    options = parser.parse_args(argv)
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        sets = photo_sets(options.photos, 16 if options.quick else None)
    except ValueError as error:
        parser.error(str(error))
    versions = {
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": version("simplejpeg"),
        "open_clip": open_clip.__version__,
    }
    report: dict[str, Any] = {"machine": machine() | versions, "rounds": rounds, "sets": []}
    for name, pictures in sets.items():
        pictures = list(
            itertools.islice(itertools.cycle(pictures), -(-len(pictures) // CHUNK) * CHUNK)
        )
        mean = sum(map(len, pictures)) / len(pictures) / 1024
        print(f"{name}: {len(pictures)} pictures of {mean:.0f} KiB on average")
        with tempfile.TemporaryDirectory() as folder:
            # In two groups: a stream runs alone in training, not between open_clip's transforms,
            # which push its code out of the processor's caches.
            rows: list[dict[str, Any]] = []
            for cases in (transform_cases(), stream_cases(pictures, Path(folder))):
                rows += summarise(cases, measure(cases, pictures, rounds))
        show(rows)
        error = scaling_error(pictures)
        print(f"  error of scaled decoding, of 255: {error}")
        described = {"set": name, "pictures": len(pictures), "mean_kib": round(mean, 1)}
        report["sets"].append(described | {"scaling_error": error, "rows": rows})
    if not options.quick:
        path = RESULTS / "data_loading_cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
