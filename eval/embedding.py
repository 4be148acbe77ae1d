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
from eval.gather import everybodys, process
from eval.subject import Subject

LAYOUT = 2  # of the files, changes with them
RECORD = "embedding.json"
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
    padded with -1; `owners` (M,) int64 into 0..N-1; `captions` M strings; `keys`, `numbers` and
    `hashes` (SHA-256 of the encoded pictures) of the N samples.
    """

    rows: dict[str, Tensor]
    labels: Tensor
    owners: Tensor
    captions: list[str]
    keys: list[str]
    numbers: list[int]
    hashes: list[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def content(self, captions: bool) -> str:
        """Hash of the pictures with their captions or else their labels, as they were measured."""
        truth = [self.owners.tolist(), self.captions] if captions else self.labels.tolist()
        return hashlib.sha256(json.dumps([self.hashes, truth]).encode()).hexdigest()


@dataclass
class _Share:
    """What one process has seen of a set: a list entry for each of its samples."""

    numbers: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    rows: dict[str, list[Tensor]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
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
        cache: folder; None keeps nothing, and so does a set whose version cannot be known.

    Raises:
        ValueError: the model lacks what is asked for.
    """
    functions = {"image": subject.encode_image, "feature": subject.features}
    for kind in kinds - {"text"}:
        if functions[kind] is None:
            raise ValueError(f"model '{subject.name}' has no {kind} embedding")
    folder = None if cache is None else _cache_folder(Path(cache), subject, samples, kinds)
    if folder is not None and all(everybodys((folder / RECORD).is_file())):
        return read_embeddings(folder)
    found = _merge(everybodys(_own_share(subject, samples, kinds, batch_size, workers)))
    if folder is not None and process()[0] == 0:
        write_embeddings(
            found,
            folder,
            {
                "model": subject.name,
                "source": subject.source,
                "weights_sha256": subject.identity.weights_sha256,
                "precision": subject.precision,
                "preprocess": subject.preprocess,
                "set": samples.fingerprint(),
            },
        )
    return found


def _cache_folder(
    cache: Path, subject: Subject, samples: SampleSet, kinds: set[str]
) -> Path | None:
    """Where the first process finds these embeddings or puts them; the others learn it from it."""
    key = cache_key(subject, samples, kinds) if process()[0] == 0 else ""
    key = everybodys(key)[0]
    return cache / key if key else None


def cache_key(subject: Subject, samples: SampleSet, kinds: set[str]) -> str:
    """Hash of the model, the pictures' processing, the precision and every byte of the set; empty
    where the set does not tell its version."""
    version = samples.version()
    if not version:
        return ""
    settings = [subject.precision, subject.preprocess, sorted(kinds)]
    parts = [LAYOUT, subject.identity.fingerprint, version, *settings]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _own_share(
    subject: Subject, samples: SampleSet, kinds: set[str], batch_size: int, workers: int
) -> _Share:
    rank, world = process()
    share = _Share()
    for batch in samples.batches(batch_size, rank, world, workers):
        share.skipped.update(batch.pop("skipped"))
        if not batch:
            continue
        images = batch["image"]
        captions = batch.get("captions", [[]] * len(images))
        share.numbers += batch["number"]
        share.keys += map(str, batch["key"])
        share.hashes += batch["sha256"]
        share.captions += captions
        share.labels += batch["labels"] if "labels" in batch else [[v] for v in batch["label"]]
        if "image" in kinds and subject.encode_image is not None:
            share.rows["image"].append(subject.encode_image(images))
        if "feature" in kinds:
            share.rows["feature"].append(subject.features(images))
        if "text" in kinds and subject.encode_text is not None:
            lines = [line for own in captions for line in own]
            for start in range(0, len(lines), batch_size):
                share.rows["text"].append(subject.encode_text(lines[start : start + batch_size]))
    # One tensor for each kind: a row alone would be sent with all of its batch.
    share.rows = {kind: [torch.cat(parts)] for kind, parts in share.rows.items() if parts}
    return share


def _merge(shares: list[_Share]) -> EmbeddedSet:
    """All processes' shares in the set's order."""
    numbers = torch.tensor([n for share in shares for n in share.numbers], dtype=torch.int64)
    if not len(numbers):
        raise ValueError("the split has no usable sample: nothing can be measured")
    order = numbers.argsort()
    captions = [own for share in shares for own in share.captions]
    counts = torch.tensor([len(own) for own in captions])
    owners = torch.repeat_interleave(order.argsort(), counts)  # places in the set's order
    text_order = owners.argsort(stable=True)
    rows = {}
    for kind in KINDS:
        parts = [part for share in shares for part in share.rows.get(kind, [])]
        if parts:
            rows[kind] = torch.cat(parts)[text_order if kind == "text" else order]

    def sort(columns: list[list[Any]]) -> list[Any]:
        everything = [value for column in columns for value in column]
        return [everything[place] for place in order.tolist()]

    labels = sort([share.labels for share in shares])
    return EmbeddedSet(
        rows,
        label_tensor([[v for v in own if v >= 0] for own in labels]),
        owners[text_order],
        [line for own in sort([captions]) for line in own],
        sort([share.keys for share in shares]),
        numbers[order].tolist(),
        sort([share.hashes for share in shares]),
        sum((share.skipped for share in shares), Counter()),
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
    partial.mkdir(parents=True, exist_ok=True)
    firsts = dict(zip(reversed(found.owners.tolist()), reversed(found.captions), strict=True))
    images = {
        "image_path": found.keys,
        "caption": [firsts.get(i, "") for i in range(len(found.keys))],
        "labels": [[v for v in own if v >= 0] for own in found.labels.tolist()],
        "number": found.numbers,
        "sha256": found.hashes,
    }
    tables = {
        "metadata": images,
        "text_metadata": {"caption": found.captions, "image_row": found.owners.tolist()},
    }
    for name, columns in tables.items():
        (partial / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), partial / name / "metadata_0.parquet")
    provenance |= {"skipped": dict(found.skipped)}
    (partial / RECORD).write_text(json.dumps(provenance, indent=1), encoding="utf-8")
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
    skipped = json.loads((folder / RECORD).read_text())["skipped"]
    return EmbeddedSet(
        rows,
        label_tensor(images["labels"]),
        torch.tensor(texts["image_row"], dtype=torch.int64),
        texts["caption"],
        images["image_path"],
        images["number"],
        images["sha256"],
        Counter(skipped),
    )
