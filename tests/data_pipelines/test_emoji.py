"""The embedded emoji data: its splits, its sidecars, and how it is written."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipelines.emoji import prepare as emoji

PICTURES = {"train": 5818, "val": 1421, "test": 1434, "val-unseen": 150, "test-unseen": 150}
CONCEPTS = {"train": 1471, "val": 1471, "test": 1471, "val-unseen": 150, "test-unseen": 150}
SHARDS_SHA256 = "ca8d3af50efba4819fa1e1ea7097c26cefa3e672c00ba006c867fbb8876045ec"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji")
    assert emoji.prepare(out) == {
        split: {"pictures": PICTURES[split], "concepts": CONCEPTS[split]} for split in PICTURES
    }
    return out


@pytest.fixture(scope="module")
def samples(prepared: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """Split -> key -> extension -> bytes; fails on a key that two samples share."""
    found: dict[str, dict[str, dict[str, bytes]]] = {}
    members: Counter[str] = Counter()
    for split in PICTURES:
        group = found.setdefault(split, {})
        for shard in sorted((prepared / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    key, extension = member.name.rsplit(".", 1)
                    assert key.startswith(shard.stem + "-")
                    group.setdefault(key, {})[extension] = content.read()
                    members[member.name] += 1
    assert set(members.values()) == {1}
    return found


def records(group: dict[str, dict[str, bytes]]) -> list[dict[str, Any]]:
    return [json.loads(parts["json"]) for parts in group.values()]


def contents(out: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in snapshot(out).items()}


def snapshot(out: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(out).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_counts_and_members(samples: dict[str, dict[str, dict[str, bytes]]]) -> None:
    assert {split: len(group) for split, group in samples.items()} == PICTURES
    for group in samples.values():
        assert {tuple(parts) for parts in group.values()} == {("webp", "txt", "cls", "json")}
    styles = {s: {r["vendor"] for r in records(group)} for s, group in samples.items()}
    assert styles["train"] == {"noto", "noto-v1", "twemoji", "emojione", "fxemoji"}
    assert styles["val"] == styles["val-unseen"] == {"fluent-flat"}
    assert styles["test"] == styles["test-unseen"] == {"fluent-3d"}


def test_no_held_out_concept_is_seen(samples: dict[str, dict[str, dict[str, bytes]]]) -> None:
    choice = json.loads((emoji.SOURCE / "unseen_concepts.json").read_bytes())
    unseen = {entry["concept"] for entry in choice["unseen"]}
    concepts = {s: {r["concept"] for r in records(group)} for s, group in samples.items()}
    assert len(choice["hold_out_of_training"]) == 165
    for split in ("train", "val", "test"):
        assert not concepts[split] & set(choice["hold_out_of_training"])
    assert concepts["val-unseen"] == concepts["test-unseen"] == unseen
    assert len(concepts["train"]) == CONCEPTS["train"]
    assert concepts["val"] | concepts["test"] <= concepts["train"]


def test_labels_name_the_right_lines(
    prepared: Path, samples: dict[str, dict[str, dict[str, bytes]]]
) -> None:
    for split, group in samples.items():
        names = (prepared / split / "classnames.txt").read_text(encoding="utf-8").splitlines()
        kinds = (prepared / split / "subcategories.txt").read_text(encoding="utf-8").splitlines()
        assert len(names) == len(set(names)) == CONCEPTS[split]
        assert len(kinds) == len(set(kinds)) == 95
        for parts in group.values():
            record = json.loads(parts["json"])
            assert names[int(parts["cls"])] == names[record["label"]] == record["name"]
            assert kinds[record["subcategory_label"]] == record["subcategory"]
            assert parts["txt"].decode().splitlines()[0] == record["name"]


def test_class_prompts_are_captions_and_keywords(
    prepared: Path, samples: dict[str, dict[str, dict[str, bytes]]]
) -> None:
    for split, group in samples.items():
        names = (prepared / split / "classnames.txt").read_text(encoding="utf-8").splitlines()
        prompts = json.loads((prepared / split / "class_prompts.json").read_bytes())
        assert list(prompts) == names
        for parts in group.values():
            lines = parts["txt"].decode().splitlines()
            keywords = json.loads(parts["json"])["keywords"]
            expected = list(dict.fromkeys([*lines, *keywords]))
            assert prompts[names[int(parts["cls"])]] == expected
        # Concepts that this split has no picture of have theirs, too.
        assert all(texts[0] == name for name, texts in prompts.items())


def test_pictures_decode(samples: dict[str, dict[str, dict[str, bytes]]]) -> None:
    for group in samples.values():
        for parts in list(group.values())[::97]:
            with Image.open(io.BytesIO(parts["webp"])) as picture:
                assert (picture.format, picture.size) == ("WEBP", (64, 64))
                picture.load()


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let `prepare` read a copy of the embedded folder with the first 12 pictures per style."""
    source = tmp_path / "source"
    (source / "LICENSES").mkdir(parents=True)
    for name in (*emoji.NOTICES, "stats.json", "unseen_concepts.json", "prepare.py"):
        (source / name).write_bytes((emoji.SOURCE / name).read_bytes())
    stats = json.loads((source / "stats.json").read_bytes())
    concepts: set[str] = set()
    for style in emoji.STYLES:
        path = source / f"{style}.tar.gz"
        with (
            tarfile.open(emoji.SOURCE / path.name, "r|gz") as full,
            tarfile.open(path, "w:gz", compresslevel=1) as small,
        ):
            for member in itertools.islice(full, 3 * 12):
                small.addfile(member, full.extractfile(member))
                concepts.add(member.name.split(".")[0].removeprefix(f"{style}-"))
        stats["styles"][style]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (source / "stats.json").write_text(json.dumps(stats))
    choice = json.loads((source / "unseen_concepts.json").read_bytes())
    choice["unseen"] = [entry for entry in choice["unseen"] if entry["concept"] in concepts]
    (source / "unseen_concepts.json").write_text(json.dumps(choice))
    monkeypatch.setattr(emoji, "SOURCE", source)
    return source


def test_second_call_skips(prepared: Path) -> None:
    before = snapshot(prepared)
    start = time.process_time()
    summary = emoji.prepare(prepared)
    assert time.process_time() - start < 1  # 0.1 s; writing anew takes 2.4 s
    assert snapshot(prepared) == before
    assert {split: counts["pictures"] for split, counts in summary.items()} == PICTURES


def test_shards_have_the_same_bytes_everywhere(prepared: Path) -> None:
    shards = {path: path.read_bytes() for path in sorted(prepared.rglob("*.tar"))}
    digest = hashlib.sha256()
    for path, data in shards.items():
        digest.update(path.relative_to(prepared).as_posix().encode() + data)
    assert digest.hexdigest() == SHARDS_SHA256


@pytest.mark.usefixtures("small_source")
def test_damage_is_repaired(tmp_path: Path) -> None:
    out = tmp_path / "out"
    emoji.prepare(out)
    good = contents(out)
    assert len(good) == 29
    for name in ("train/noto.tar", "test/classnames.txt", "LICENSES/MIT.txt", emoji.MANIFEST):
        path = out / name
        path.write_bytes(b"?" + good[name][1:])
        emoji.prepare(out)
        assert contents(out) == good, name
        path.unlink()
        emoji.prepare(out)
        assert contents(out) == good, name


@pytest.mark.usefixtures("small_source")
def test_interrupted_run_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, whole, part = os.replace, tmp_path / "whole", tmp_path / "part"
    emoji.prepare(whole)

    def stop_at_test(source: Path, target: Path) -> None:
        if target.parent.name == "test":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_test)
        with pytest.raises(KeyboardInterrupt):
            emoji.prepare(part)
    done = contents(part)
    assert "train/noto.tar" in done
    assert done.items() < contents(whole).items()  # no part file, no manifest
    emoji.prepare(part)
    assert contents(part) == contents(whole)


def test_new_source_is_written_anew(small_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    emoji.prepare(out)
    with (small_source / "ATTRIBUTION.md").open("a", encoding="utf-8") as file:
        file.write("One more maker.\n")
    emoji.prepare(out)
    assert (out / "ATTRIBUTION.md").read_text(encoding="utf-8").endswith("One more maker.\n")


def test_damaged_archive_is_refused(small_source: Path, tmp_path: Path) -> None:
    archive = small_source / "noto.tar.gz"
    archive.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"noto\.tar\.gz does not match stats\.json: restore"):
        emoji.prepare(tmp_path / "out")
    archive.unlink()
    with pytest.raises(ValueError, match=r"incomplete .*noto\.tar\.gz.* restore"):
        emoji.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipelines.emoji.prepare", "--out"]
    root = emoji.SOURCE.parents[1]
    done = subprocess.run([*command, prepared], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [re.findall(r"\S+", line)[:2] for line in done.stdout.splitlines()] == [
        [split, str(count)] for split, count in PICTURES.items()
    ]
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    failed = subprocess.run([*command, blocked], cwd=root, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert re.fullmatch(rf"error: cannot write to {re.escape(str(blocked))}: .*\n", failed.stderr)


def test_the_command_needs_no_torch() -> None:
    code = "import sys, data_pipelines.emoji.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=emoji.SOURCE.parents[1]).returncode == 0


def test_attribution_names_every_licence(
    prepared: Path, samples: dict[str, dict[str, dict[str, bytes]]]
) -> None:
    text = (prepared / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == (emoji.SOURCE / "ATTRIBUTION.md").read_text(encoding="utf-8")
    licence = {r["vendor"]: r["licence"] for group in samples.values() for r in records(group)}
    assert set(licence) == set(emoji.STYLES)
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("|")}
    for style, name in licence.items():
        assert f"| {name} " in rows[style]
        # CC-BY asks for its text or a link to it; the other licences for their text.
        in_folder = (prepared / "LICENSES" / f"{name}.txt").exists()
        assert in_folder or "https://creativecommons.org/licenses/by/4.0/" in text


def test_embedded_data_stays_small() -> None:
    files = [p for p in emoji.SOURCE.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
