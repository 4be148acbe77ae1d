"""How long a stream takes to its first batch, started anew or at 90 % of an epoch, and its memory.

Each measurement is a process of its own: it opens the shards as training does, and reads one batch.
The peer is webdataset's own pipeline, which can only resume by reading what was seen before, here
without decoding it, so at its best.

python -m benchmarks.stream_resume
python -m benchmarks.stream_resume --samples 2000 --repeats 1   # a quick try
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

BATCH = 64
PER_SHARD = 1000
IMAGE_BYTES = {"small": 4 << 10, "large": 64 << 10}


def make_shards(folder: Path, samples: int, image_bytes: int) -> str:
    """Shards of a small picture, padded to `image_bytes` on disk, with captions; the pattern."""
    import io

    import numpy as np
    from PIL import Image
    from webdataset import TarWriter

    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    picture = buffer.getvalue() + bytes(image_bytes - len(buffer.getvalue()))
    folder.mkdir(parents=True)
    shards = -(-samples // PER_SHARD)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as writer:
            for number in range(shard * PER_SHARD, min(samples, (shard + 1) * PER_SHARD)):
                caption = f"caption {number}".encode()
                writer.write({"__key__": f"{number:09d}", "jpg": picture, "txt": caption})
        old = time.time() - 60
        os.utime(folder / f"{shard:05d}.tar", (old, old))
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def time_ours(pattern: str, start: int) -> dict[str, Any]:
    """Seconds from opening the shards to a first batch of serial number `start`."""
    import torch

    from data_pipelines.config import AugmentationConfig, ImageTextConfig
    from data_pipelines.image_text import image_text_stream

    torch.set_num_threads(1)
    config = ImageTextConfig(
        shards=pattern, augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)), workers=0
    )
    began = time.perf_counter()
    stream = image_text_stream(
        config,
        image_size=32,
        tokenize=lambda texts: torch.zeros((len(texts), 8), dtype=torch.int64),
        seed=0,
        global_batch=BATCH,
    )
    batches = stream.batches(start // BATCH)
    next(batches)
    seconds = time.perf_counter() - began
    for _ in range(30):
        next(batches)
    return {"seconds": seconds, "peak_mib": _peak_mib()}


def time_webdataset(pattern: str, start: int) -> dict[str, Any]:
    """The same of webdataset's pipeline, which skips `start` undecoded samples."""
    import itertools

    import torch
    import webdataset

    torch.set_num_threads(1)
    began = time.perf_counter()
    raw: Any = webdataset.WebDataset(pattern, shardshuffle=100, seed=0).shuffle(1000)
    rest = itertools.islice(raw, start, None)
    decoded = webdataset.pipelinefilter(lambda data: data)()(rest)
    decode = webdataset.autodecode.Decoder([webdataset.autodecode.imagehandler("torchrgb8")])
    batch = [decode(sample) for sample in itertools.islice(decoded, BATCH)]
    if len(batch) != BATCH:
        raise RuntimeError(f"webdataset gave {len(batch)} samples")
    return {"seconds": time.perf_counter() - began, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(what: str, pattern: str, start: int, repeats: int) -> dict[str, float]:
    """Medians over processes."""
    command = [sys.executable, "-m", "benchmarks.stream_resume", "--child", what, pattern]
    runs = []
    for _ in range(repeats):
        done = subprocess.run([*command, str(start)], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def run(samples: int, repeats: int, folder: Path) -> dict[str, Any]:
    """All figures of one run."""
    late = samples * 9 // 10
    small = make_shards(folder / "small", samples, IMAGE_BYTES["small"])
    fewer = max(PER_SHARD, samples // 10)  # as large on disk as the small ones, or so
    large = make_shards(folder / "large", fewer, IMAGE_BYTES["large"])
    same = make_shards(folder / "same", fewer, IMAGE_BYTES["small"])
    figures = {
        "first start, indexing": measure("ours", small, 0, 1),
        "start at 0 %": measure("ours", small, 0, repeats),
        "start at 90 %": measure("ours", small, late, repeats),
        "webdataset, start at 90 %": measure("webdataset", small, late, repeats),
    }
    for name, pattern in (("4 KiB", same), ("64 KiB", large)):
        measure("ours", pattern, 0, 1)
        figures[f"pictures of {name}"] = measure("ours", pattern, 0, repeats)
    return {
        "samples": samples,
        "batch": BATCH,
        "repeats": repeats,
        "machine": machine(),
        "figures": figures,
        "ratio to webdataset at 90 %": round(
            figures["webdataset, start at 90 %"]["seconds"] / figures["start at 90 %"]["seconds"], 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, pattern, start = arguments.child
        timed = {"ours": time_ours, "webdataset": time_webdataset}[what]
        print(json.dumps(timed(pattern, int(start))))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = run(arguments.samples, arguments.repeats, Path(folder))
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
