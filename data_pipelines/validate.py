"""Finding what is wrong with shards: with the files, with single samples, and among samples."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.captions import (
    MAX_BYTES,
    captions_of,
    integer_of,
    member_of,
    members_of,
    parse_field,
)
from data_pipelines.classification import ClassNumbers, read_lines
from data_pipelines.decode import DecodeError, decode_rgb
from data_pipelines.findings import KINDS, Finding, Validation
from data_pipelines.inspect_headers import inspect_shard
from data_pipelines.near_duplicates import brightness_steps, repeats, repeats_of_hashes
from data_pipelines.ordered_map import ordered_map
from data_pipelines.pack_pictures import HugeImageError, read_header
from data_pipelines.shard_reader import Bytes
from data_pipelines.shard_survey import (
    Fields,
    find_fields,
    find_shards,
    printable,
    read_picture,
    survey,
)
from data_pipelines.shards import (
    FieldError,
    ShardError,
    ShardIndex,
    ShardReader,
    index_shards,
)
from data_pipelines.sources import ReadError
from data_pipelines.tool_config import ValidateConfig


def validate(config: ValidateConfig, workers: int) -> Validation:
    """Look at every shard and sample.

    Raises:
        ShardError: no shard matches, or the settings do not suit the shards.
        ValueError: a setting out of range.
    """
    check_config(config)
    numbers = ClassNumbers(read_lines(config.classnames) if config.classnames else ())
    paths = find_shards(config.shards)
    findings: list[Finding] = []
    usable: list[str] = []
    with tempfile.TemporaryDirectory(prefix="shard-indexes-") as folder:
        inspected = ordered_map(partial(inspect_shard, folder=folder), paths, workers)
        with tqdm(total=len(paths), unit="shard", desc="headers", disable=None) as bar:
            for path, (fit, found) in zip(paths, inspected, strict=True):
                findings += found
                usable += [path] * fit
                bar.update()
        if not usable:
            return Validation(paths, None, _wanted(findings, config))
        index = index_shards(usable, folder=folder)
    fields = find_fields(index, config)
    if fields.captions is None and fields.labels is None:
        raise ShardError(
            "no sample has a txt or cls member: set --caption_key (such as json:caption) or"
            f" --label_key; the shards hold: {', '.join(sorted(index.members))}"
        )
    checker = SampleChecker(index, fields, config, numbers)
    digests, hashes = [], list[int | None]()
    with tqdm(total=len(index), unit="sample", desc="samples", disable=None) as bar:
        for count, looked in survey(checker.check, index, range(len(index)), workers):
            findings += looked.findings
            digests.append(looked.digests)
            hashes += looked.hashes
            bar.update(count)
    findings += _duplicates(index, np.concatenate(digests), hashes, config)
    return Validation(paths, index, _wanted(findings, config))


def check_config(config: ValidateConfig) -> None:
    """Raise ValueError for settings out of range."""
    for kind in config.ignore:
        if kind not in KINDS:
            choices = ", ".join(KINDS)
            raise ValueError(f"ignore: there is no problem '{kind}'; choose from {choices}")
    if config.near_duplicates is not None and not 0 <= config.near_duplicates <= 7:
        raise ValueError(f"near_duplicates must be 0 to 7, got {config.near_duplicates}")
    for name in ("min_side", "max_pixels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _wanted(findings: Iterable[Finding], config: ValidateConfig) -> list[Finding]:
    return [finding for finding in findings if finding.kind not in config.ignore]


class Looked(NamedTuple):
    """What a chunk of samples shows: problems, digests of the pictures (n, 2) uint64, zero where
    there is none, and their brightness steps, null where they are not wanted or not there."""

    findings: list[Finding]
    digests: np.ndarray
    hashes: list[int | None]


class SampleChecker:
    """Looks at samples one by one, in any process."""

    def __init__(
        self, index: ShardIndex, fields: Fields, config: ValidateConfig, numbers: ClassNumbers
    ) -> None:
        self.reader, self.fields, self.config = ShardReader(index), fields, config
        self.numbers = numbers

    def check(self, samples: Sequence[int]) -> Looked:
        """Look at `samples`."""
        findings: list[Finding] = []
        digests = np.zeros((len(samples), 2), np.uint64)
        hashes = list[int | None]()
        for row, sample in enumerate(samples):
            key = str(self.reader.index.keys[sample])
            problems = self._text_problems(sample)
            if not is_safe(key):
                problems.append(("unsafe_name", ""))
            data, found = self._picture(sample)
            problems += found
            steps = None
            if data is not None:
                digests[row] = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint64)
                steps, found = self._pixel_problems(data)
                problems += found
            hashes.append(steps)
            shard = self.reader.shard_of(sample)
            findings += [Finding(kind, shard, key, why, int(sample)) for kind, why in problems]
        return Looked(findings, digests, hashes)

    def _picture(self, sample: int) -> tuple[Bytes | None, list[tuple[str, str]]]:
        try:
            data = read_picture(self.reader, sample, self.fields.images)
        except FieldError as error:
            kind = "unreadable" if isinstance(error, ReadError) else "huge_image"
            return None, [(kind, str(error))]
        return data, [] if data is not None else [("missing_member", "no picture")]

    def _pixel_problems(self, data: Bytes) -> tuple[int | None, list[tuple[str, str]]]:
        """Brightness steps of a picture where they are wanted, and what is wrong with it."""
        config = self.config
        try:
            header = read_header(data)
            size = f"{header.width} x {header.height}"
            if header.width * header.height > config.max_pixels:
                return None, [("huge_image", size)]
            pixels = decode_rgb(data, config.max_pixels)
        except HugeImageError as error:
            return None, [("huge_image", str(error))]
        except DecodeError:
            return None, [("broken_image", f"{len(data)} bytes")]
        tiny = min(header.width, header.height) < config.min_side
        steps = None
        if config.near_duplicates is not None:
            steps = brightness_steps(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        return steps, [("tiny_image", size)] if tiny else []

    def _text_problems(self, sample: int) -> list[tuple[str, str]]:
        fields, problems = self.fields, list[tuple[str, str]]()
        if fields.captions is not None:
            problems += self._caption_problems(sample, fields.captions)
        if fields.labels is not None:
            try:
                data = self.reader.read(sample, member_of(fields.labels), MAX_BYTES)
                if data is None:
                    problems.append(("missing_member", f"no {member_of(fields.labels)}"))
                else:
                    integer_of(self.numbers.number(parse_field(fields.labels, data)))
            except FieldError as error:
                problems.append(("broken_label", str(error)))
        return problems

    def _caption_problems(self, sample: int, key: str) -> list[tuple[str, str]]:
        """Of the fields joined in `key`, one with a caption is enough."""
        problems: list[tuple[str, str]] = []
        for part, member in zip(key.split("::"), members_of(key), strict=True):
            try:
                data = self.reader.read(sample, member, MAX_BYTES)
                if data is None:
                    problems.append(("missing_member", f"no {member}"))
                    continue
                value = parse_field(part, data)
            except FieldError as error:
                problems.append(("broken_caption", str(error)))
                continue
            try:
                captions_of(value)
            except FieldError:
                problems.append(("empty_caption", ""))
                continue
            try:
                data.decode()
            except UnicodeDecodeError:
                return [("broken_caption", "no UTF-8")]
            return []
        return problems[:1]


def is_safe(name: str) -> bool:
    """Whether unpacking a member of this name stays inside the folder, on any system."""
    parts = name.replace("\\", "/").split("/")
    rooted = name.startswith(("/", "\\")) or name[1:2] == ":"
    return not rooted and ".." not in parts and name.isprintable()


def _duplicates(
    index: ShardIndex, digests: np.ndarray, hashes: list[int | None], config: ValidateConfig
) -> list[Finding]:
    """Samples that repeat an earlier one's key or picture, and pictures that nearly do."""
    reader = ShardReader(index)

    def found(kind: str, pairs: Iterable[tuple[int, int]]) -> list[Finding]:
        return [
            Finding(
                kind,
                reader.shard_of(late),
                str(index.keys[late]),
                f"as {printable(str(index.keys[early]))} in {reader.shard_of(early)}",
                late,
            )
            for late, early in pairs
        ]

    keys = [hashlib.sha256(str(key).encode(errors="replace")).digest()[:16] for key in index.keys]
    key_digests = np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)
    pairs = repeats(digests)
    findings = found("duplicate_key", repeats(key_digests)) + found("duplicate_image", pairs)
    if config.near_duplicates is not None:
        same = {late for late, _ in pairs}
        left = {row: steps for row, steps in enumerate(hashes) if steps is not None}
        rows = [row for row in left if row not in same]
        near = repeats_of_hashes([left[row] for row in rows], config.near_duplicates)
        findings += found("near_duplicate", [(rows[late], rows[early]) for late, early in near])
    return findings
