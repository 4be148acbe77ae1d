"""Mutated shards through the index and the stream: no crash, no hang, every sample accounted for.

python -m benchmarks.shard_fuzz --shards 10000
"""

from __future__ import annotations

import argparse
import io
import itertools
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipelines.config import AugmentationConfig, ImageTextConfig, ReadingConfig
from data_pipelines.image_text import image_text_stream
from data_pipelines.shards import ShardError, index_shards
from data_pipelines.sidecar import SUFFIX

SAMPLES = 4


def whole_shard(generator: np.random.Generator) -> bytes:
    """A tar of four samples with pictures of three formats, in one of tar's three dialects."""
    dialect = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=int(generator.choice(dialect))) as tar:
        for number in range(SAMPLES):
            kind = str(generator.choice(["jpg", "png", "webp"]))
            pixels = generator.integers(0, 256, (9, 12, 3), np.uint8)
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, {"jpg": "JPEG"}.get(kind, kind.upper()))
            long = "n" * int(generator.choice([1, 90]))
            for ext, data in (
                (kind, picture.getvalue()),
                ("txt", b"some words"),
                ("json", b'{"caption": "some words"}'),
            ):
                entry = tarfile.TarInfo(f"{long}{number}.{ext}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip, cut, repeat, insert, zero or overwrite a few stretches, headers more often than not."""
    changed = bytearray(data)
    for _ in range(int(generator.integers(1, 5))):
        if not changed:
            break
        place = int(generator.integers(len(changed)))
        if generator.random() < 0.5:
            place = place // 512 * 512 + int(generator.integers(160))
        length = int(generator.choice([1, 8, 12, 100, 512]))
        noise = generator.integers(0, 256, length, np.uint8).tobytes()
        match int(generator.integers(7)):
            case 0:
                changed[place : place + 1] = noise[:1]
            case 1:
                del changed[place:]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                changed[place:place] = noise
            case 4:
                changed[place : place + length] = bytes(length)
            case 5:
                changed[place : place + length] = noise
            case _:
                _forge_header(changed, place, generator)
    return bytes(changed)


def _forge_header(data: bytearray, place: int, generator: np.random.Generator) -> None:
    """Give a header another size or type, and the checksum that makes it believed."""
    start = place // 512 * 512
    header = data[start : start + 512]
    if len(header) < 512:
        return
    if generator.random() < 0.6:
        sizes = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"00000000001\0", b"-1")
        value = sizes[int(generator.integers(len(sizes)))]
        header[124 : 124 + len(value)] = value
    else:
        header[156:157] = bytes([int(generator.choice(list(b"012345678xgLKS\0V")))])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + 512] = header


def try_shard(path: Path) -> str:
    """What became of a shard: `refused`, `cut` or `whole`, after its samples went through a stream.

    Raises:
        AssertionError: a sample of the index was neither seen nor skipped.
    """
    try:
        index = index_shards([str(path)])
    except ShardError:
        return "refused"
    again = index_shards([str(path)])  # from the sidecar, or once more
    assert again.fingerprint() == index.fingerprint()
    config = ImageTextConfig(
        shards=str(path),
        shuffle=False,
        max_skipped=1.0,
        augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)),
        reading=ReadingConfig(attempts=1),
    )
    try:
        stream = image_text_stream(config, image_size=8, tokenize=_tokens, seed=0, global_batch=1)
        # Skipped samples are replaced by others, so the places of one epoch see each one's fate.
        fates = [
            (batch["key"][0], bool(batch["skipped"]))
            for batch in itertools.islice(stream.batches(), len(index))
        ]
    except ShardError as error:  # no sample has a picture, or a caption, or all are unusable
        if "in a row cannot be used" in str(error) or "has a member for" in str(error):
            return "unusable"
        raise
    assert len(fates) == len(index)
    for number, (key, skipped) in enumerate(fates):
        assert skipped or key == str(index.keys[number])
    return "cut" if index.truncated else "whole"


def _tokens(texts: list[str]) -> torch.Tensor:
    return torch.zeros((len(texts), 4), dtype=torch.int64)


def fuzz(shards: int, seed: int, folder: Path) -> tuple[Counter[str], float]:
    """Outcomes of so many mutated shards, and the longest time one took, in seconds."""
    outcomes, slowest = Counter[str](), 0.0
    path = folder / "0.tar"
    for number in range(shards):
        generator = np.random.default_rng([seed, number])
        path.write_bytes(mutate(whole_shard(generator), generator))
        Path(f"{path}{SUFFIX}").unlink(missing_ok=True)
        start = time.perf_counter()
        try:
            outcomes[try_shard(path)] += 1
        except Exception as error:
            raise RuntimeError(f"shard {number} of seed {seed}: {error!r}") from error
        slowest = max(slowest, time.perf_counter() - start)
    return outcomes, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, slowest = fuzz(arguments.shards, arguments.seed, Path(folder))
    print(f"{arguments.shards} shards: {dict(outcomes)}; the slowest took {slowest:.2f} s")


if __name__ == "__main__":
    main()
