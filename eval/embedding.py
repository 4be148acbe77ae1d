"""A set is embedded once, by all processes, and kept under a key of everything it depends on.

The files are laid out as clip-retrieval writes them: `img_emb/img_emb_0.npy`, row i of which is
row i of `metadata/metadata_0.parquet`, and `text_emb/text_emb_0.npy`, whose rows are those of
`text_metadata/metadata_0.parquet`, for a picture may have several captions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.evaluation import SampleSet
from data_pipelines.evaluation_files import label_tensor
from eval.gather import process
from eval.subject import Subject

KINDS = ("image", "feature", "text")
FILES = {
    "image": "img_emb/img_emb_0.npy",
    "feature": "features/features_0.npy",
    "text": "text_emb/text_emb_0.npy",
}


@dataclass
class EmbeddedSet:
    """A set as a model sees it, in the set's order; unusable samples are left out.

    `rows` by kind: image (N, d), feature (N, f), text (M, d), float32. `labels` (N, L) int64,
    padded with -1; `owners` (M,) int64 into 0..N-1; `captions` M strings, `keys` and `numbers` of
    the N samples.
    """

    rows: dict[str, Tensor]
    labels: Tensor
    owners: Tensor
    captions: list[str]
    keys: list[str]
    numbers: list[int]
    skipped: Counter[str] = field(default_factory=Counter)


def embed(
    subject: Subject,
    samples: SampleSet,
    kinds: set[str],
    batch_size: int = 256,
    workers: int = 0,
    cache: str | None = None,
) -> EmbeddedSet:
    """Embed the set, each process its own samples, or read it from the cache.

    Args:
        kinds: of image, feature, text.
        cache: folder; None keeps nothing.

    Raises:
        ValueError: the model lacks what is asked for.
    """
    functions = {"image": subject.encode_image, "feature": subject.features}
    for kind in kinds - {"text"}:
        if functions[kind] is None:
            raise ValueError(f"model '{subject.name}' has no {kind} embedding")
    rank, _ = process()
    folder = Path(cache) / cache_key(subject, samples, kinds) if cache else None
    if folder is not None and (folder / "embedding.json").is_file():
        return read_embeddings(folder)
    found = _gather(_own_share(subject, samples, kinds, batch_size, workers))
    if folder is not None and rank == 0:
        write_embeddings(
            found,
            folder,
            {
                "model": subject.name,
                "source": subject.source,
                "weights_sha256": subject.weights_sha256,
                "precision": subject.precision,
                "preprocess": subject.preprocess,
                "set": samples.fingerprint(),
            },
        )
    return found


def cache_key(subject: Subject, samples: SampleSet, kinds: set[str]) -> str:
    """Hash of the weights, the pictures' processing, the precision and the set."""
    parts = [subject.weights_sha256, subject.precision, subject.preprocess, sorted(kinds)]
    options = [getattr(samples, n, None) for n in ("image_keys", "caption_key", "label_key")]
    options += ["upright"] * samples.exif_orientation
    text = json.dumps([*parts, samples.fingerprint(), options], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _own_share(
    subject: Subject, samples: SampleSet, kinds: set[str], batch_size: int, workers: int
) -> list[dict[str, Any]]:
    """What this process has seen: a record for each sample, with its rows."""
    rank, world = process()
    found: list[dict[str, Any]] = []
    for batch in samples.batches(batch_size, rank, world, workers):
        skipped = batch.pop("skipped")
        if skipped:
            found.append({"skipped": skipped})
        if not batch:
            continue
        images = batch["image"]
        columns = {}
        if "image" in kinds and subject.encode_image is not None:
            columns["image"] = subject.encode_image(images)
        if "feature" in kinds:
            columns["feature"] = subject.features(images)
        captions = batch.get("captions", [[]] * len(images))
        texts: list[Tensor] = []
        if "text" in kinds and subject.encode_text is not None:
            flat = [line for lines in captions for line in lines]
            parts = [flat[i : i + batch_size] for i in range(0, len(flat), batch_size)]
            encoded = torch.cat([subject.encode_text(part) for part in parts]) if parts else None
            sizes = [len(lines) for lines in captions]
            texts = list(encoded.split(sizes)) if encoded is not None else []
        for i, number in enumerate(batch["number"]):
            own = batch["labels"][i] if "labels" in batch else [batch["label"][i]]
            record = {kind: rows[i] for kind, rows in columns.items()}
            if texts:
                record["text"] = texts[i]
            found.append(
                record
                | {
                    "number": int(number),
                    "key": batch["key"][i],
                    "captions": captions[i],
                    "labels": [int(v) for v in own],
                }
            )
    return found


def _gather(records: list[dict[str, Any]]) -> EmbeddedSet:
    _, world = process()
    parts = [records]
    if world > 1:
        parts = [[] for _ in range(world)]
        torch.distributed.all_gather_object(parts, records)
    everything = [record for part in parts for record in part]
    skipped = sum((r["skipped"] for r in everything if "skipped" in r), Counter())
    samples = sorted((r for r in everything if "number" in r), key=lambda r: r["number"])
    if not samples:
        raise ValueError("the split has no usable sample: nothing can be measured")
    rows = {}
    for kind in KINDS:
        own = [record[kind] for record in samples if kind in record]
        if own:
            rows[kind] = torch.cat(own) if kind == "text" else torch.stack(own)
    counts = torch.tensor([len(record["captions"]) for record in samples])
    return EmbeddedSet(
        rows,
        label_tensor([[v for v in record["labels"] if v >= 0] for record in samples]),
        torch.repeat_interleave(torch.arange(len(samples)), counts),
        [line for record in samples for line in record["captions"]],
        [str(record["key"]) for record in samples],
        [record["number"] for record in samples],
        skipped,
    )


def write_embeddings(found: EmbeddedSet, folder: Path, provenance: dict[str, Any]) -> None:
    """Write the folder, completely or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    for kind, rows in found.rows.items():
        path = partial / FILES[kind]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows.numpy(), allow_pickle=False)
    firsts = dict(zip(reversed(found.owners.tolist()), reversed(found.captions), strict=True))
    images = {
        "image_path": found.keys,
        "caption": [firsts.get(i, "") for i in range(len(found.keys))],
        "labels": [[v for v in own if v >= 0] for own in found.labels.tolist()],
        "number": found.numbers,
    }
    tables = {
        "metadata": images,
        "text_metadata": {"caption": found.captions, "image_row": found.owners.tolist()},
    }
    for name, columns in tables.items():
        (partial / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), partial / name / "metadata_0.parquet")
    provenance |= {"skipped": dict(found.skipped)}
    (partial / "embedding.json").write_text(json.dumps(provenance, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(partial)
    else:
        os.replace(partial, folder)


def read_embeddings(folder: Path) -> EmbeddedSet:
    """What `write_embeddings` has written."""
    import pyarrow.parquet as pq

    rows = {
        kind: torch.from_numpy(np.load(folder / path, allow_pickle=False))
        for kind, path in FILES.items()
        if (folder / path).is_file()
    }
    images = pq.read_table(folder / "metadata/metadata_0.parquet").to_pydict()
    texts = pq.read_table(folder / "text_metadata/metadata_0.parquet").to_pydict()
    skipped = json.loads((folder / "embedding.json").read_text())["skipped"]
    return EmbeddedSet(
        rows,
        label_tensor(images["labels"]),
        torch.tensor(texts["image_row"], dtype=torch.int64),
        texts["caption"],
        images["image_path"],
        images["number"],
        Counter(skipped),
    )
