"""Lay out the embedded emoji pictures as plain webdataset shards.

    python -m data_pipelines.emoji.prepare --out data/emoji

| split | styles | concepts |
|---|---|---|
| train | noto, noto-v1, twemoji, emojione, fxemoji | 1,471 seen |
| val, test | fluent-flat, fluent-3d | the same 1,471, in a style training never shows |
| val-unseen, test-unseen | fluent-flat, fluent-3d | 150 that training shows in no style |

15 more concepts are in no split: siblings of the 150 that would give them away.

Each split is a folder with `<style>.tar`, `classnames.txt` (line i names concept label i),
`class_prompts.json` (caption lines and keywords of every concept, by name) and `subcategories.txt`
(line i names subcategory label i, the same list in every split). A sample is

- `.webp`: 64x64 RGB on white;
- `.txt`: captions, one per line, the plain name first;
- `.cls`: the concept label, a decimal integer;
- `.json`: the record of the picture (concept, char, name, keywords, category, subcategory, vendor,
  licence) with `label` and `subcategory_label` added.

The same package gives the same bytes on every machine. `manifest.json` is written last and holds
the checksum of every file, so an interrupted or damaged output is noticed and written again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).resolve().parent
MANIFEST = "manifest.json"

TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "emojione", "fxemoji")
SEEN_SPLITS: dict[str, tuple[str, ...]] = {
    "train": TRAIN_STYLES,
    "val": ("fluent-flat",),
    "test": ("fluent-3d",),
}
UNSEEN_SPLITS: dict[str, tuple[str, ...]] = {
    "val-unseen": ("fluent-flat",),
    "test-unseen": ("fluent-3d",),
}
STYLES = (*TRAIN_STYLES, "fluent-flat", "fluent-3d")

# The licences ask that their notices travel with every copy of the pictures.
NOTICES = (
    "ATTRIBUTION.md",
    "LICENSES/Apache-2.0.txt",
    "LICENSES/MIT.txt",
    "LICENSES/Unicode-3.0.txt",
)

Summary = dict[str, dict[str, int]]


class Picture(NamedTuple):
    """One embedded sample: its key, encoded picture, caption lines and record."""

    key: str
    webp: bytes
    captions: bytes
    record: dict[str, Any]


def prepare(out: Path) -> Summary:
    """Write every split below `out`, or nothing when the same content is already there.

    Args:
        out: folder to write to, created when missing. Files that are not ours are left alone.

    Returns:
        For each split `{"pictures": count, "concepts": number of labels to choose from}`.

    Raises:
        ValueError: an embedded file is missing or damaged.
        OSError: `out` cannot be written.
    """
    source = _source_digest()
    summary = _summary_if_complete(out, source)
    if summary is not None:
        return summary
    files, summary = _layout()
    for name, data in files.items():
        _write_atomic(out / name, data)
    manifest = {
        "source": source,
        "splits": summary,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    _write_atomic(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return summary


def _source_digest() -> str:
    """Check the embedded archives and return one digest of all that decides the output."""
    names = [f"{style}.tar.gz" for style in STYLES]
    names += ["stats.json", "unseen_concepts.json", *NOTICES, Path(__file__).name]
    try:
        digests = {name: _sha256(SOURCE / name) for name in names}
        stats = json.loads((SOURCE / "stats.json").read_bytes())["styles"]
    except OSError as error:
        raise ValueError(
            f"the embedded emoji data is incomplete ({error}): restore {SOURCE} from the repository"
        ) from error
    for style in STYLES:
        if digests[f"{style}.tar.gz"] != stats[style]["sha256"]:
            raise ValueError(
                f"{SOURCE / style}.tar.gz does not match stats.json: restore it from the repository"
            )
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _summary_if_complete(out: Path, source: str) -> Summary | None:
    """Return the recorded summary if `out` holds exactly what `source` gives, else None."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
        if manifest["source"] != source:
            return None
        if any(_sha256(out / name) != digest for name, digest in manifest["files"].items()):
            return None
        return manifest["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or unreadable: write it again


def _layout() -> tuple[dict[str, bytes], Summary]:
    """Return the content of every output file by relative path, and the summary."""
    pictures = {style: _read_style(style) for style in STYLES}
    everything = [picture for style in STYLES for picture in pictures[style]]
    # noto draws every concept in the order of the Unicode list, so labels follow that order.
    names = {p.record["concept"]: p.record["name"] for p in everything}
    # Words of a concept are the same in every style, so they are also known where a split lacks its
    # picture.
    words = {p.record["concept"]: _words(p) for p in everything}
    subcategories = {s: i for i, s in enumerate(dict.fromkeys(_subcategory(p) for p in everything))}

    choice = json.loads((SOURCE / "unseen_concepts.json").read_bytes())
    held_out = set(choice["hold_out_of_training"])
    seen = [concept for concept in names if concept not in held_out]
    unseen = [entry["concept"] for entry in choice["unseen"]]

    files: dict[str, bytes] = {}
    summary: Summary = {}
    for splits, concepts in ((SEEN_SPLITS, seen), (UNSEEN_SPLITS, unseen)):
        labels = {concept: i for i, concept in enumerate(concepts)}
        for split, styles in splits.items():
            count = 0
            for style in styles:
                kept = [p for p in pictures[style] if p.record["concept"] in labels]
                files[f"{split}/{style}.tar"] = _shard(kept, labels, subcategories)
                count += len(kept)
            files[f"{split}/classnames.txt"] = _lines([names[c] for c in concepts])
            prompts = {names[c]: words[c] for c in concepts}
            files[f"{split}/class_prompts.json"] = _json(prompts)
            files[f"{split}/subcategories.txt"] = _lines(list(subcategories))
            summary[split] = {"pictures": count, "concepts": len(concepts)}
    files |= {name: (SOURCE / name).read_bytes() for name in NOTICES}
    return files, summary


def _read_style(style: str) -> list[Picture]:
    """Read one embedded archive, in its order."""
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(SOURCE / f"{style}.tar.gz") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                key, extension = member.name.rsplit(".", 1)
                members.setdefault(key, {})[extension] = content.read()
    return [
        Picture(key, parts["webp"], parts["txt"], json.loads(parts["json"]))
        for key, parts in members.items()
    ]


def _shard(
    pictures: Sequence[Picture], labels: Mapping[str, int], subcategories: Mapping[str, int]
) -> bytes:
    """Return a tar with the four members of every picture, without dates or owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            label = labels[picture.record["concept"]]
            record = picture.record | {
                "label": label,
                "subcategory_label": subcategories[_subcategory(picture)],
            }
            members = {
                "webp": picture.webp,
                "txt": picture.captions,
                "cls": str(label).encode(),
                "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{picture.key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _subcategory(picture: Picture) -> str:
    return picture.record["subcategory"]


def _words(picture: Picture) -> list[str]:
    """Distinct caption lines and keywords: what the word bridge of `eval.yardstick` reads too."""
    keywords = picture.record["keywords"]
    return list(dict.fromkeys([*picture.captions.decode().splitlines(), *keywords]))


def _lines(texts: Sequence[str]) -> bytes:
    return ("\n".join(texts) + "\n").encode()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.emoji.prepare",
        description="Lay out the embedded emoji pictures as webdataset shards.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args(arguments).out
    try:
        summary = prepare(out)
    except OSError as error:
        print(f"error: cannot write to {out}: {error}; choose another --out", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, counts in summary.items():
        print(f"{split:<12}{counts['pictures']:>6} pictures{counts['concepts']:>6} concepts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
