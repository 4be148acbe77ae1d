"""Reading captions and labels out of the members of a sample."""

from __future__ import annotations

import hashlib
import json

import torch

MAX_BYTES = 1 << 20


class FieldError(ValueError):
    """A member that cannot be used; the message is the reason, in a few words."""


def member_of(key: str) -> str:
    """Extension of the member that `key` reads: 'txt' for 'txt', 'json' for 'json:caption'."""
    return key.partition(":")[0]


def read_field(key: str, data: bytes | None) -> object:
    """Text of a member, or one field of a JSON member for keys such as 'json:caption'.

    Raises:
        FieldError: the member or the field is missing, cannot be parsed, or is over MAX_BYTES.
    """
    member, _, field = key.partition(":")
    if data is None:
        raise FieldError(f"no {member} member")
    if len(data) > MAX_BYTES:  # tokenizers and parsers would take seconds and much memory
        raise FieldError(f"{member} member over {MAX_BYTES} bytes")
    text = data.decode("utf-8-sig", errors="replace")
    if not field:
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"broken {member} member") from error
    if not isinstance(record, dict) or record.get(field) is None:
        raise FieldError(f"no field '{field}' in {member}")
    return record[field]


def captions_of(value: object) -> list[str]:
    """Non-empty captions: one per line of a text, or the strings in a list.

    Raises:
        FieldError: there is none.
    """
    entries = value.splitlines() if isinstance(value, str) else value
    captions: list[str] = []
    if isinstance(entries, list):
        captions = [e.strip() for e in entries if isinstance(e, str) and e.strip()]
    if not captions:
        raise FieldError("no caption")
    return captions


def draw_caption(captions: list[str]) -> str:
    """One of the captions, from torch's default generator."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(torch.randint(len(captions), ()))]


def label_of(value: object, num_classes: int) -> int:
    """An integer label in [0, num_classes).

    Raises:
        FieldError: not an integer, or out of range.
    """
    try:
        label = int(str(value).strip())
    except ValueError as error:
        raise FieldError("label is no integer") from error
    if not 0 <= label < num_classes:
        raise FieldError(f"label outside 0..{num_classes - 1}")
    return label


def group_of(value: object) -> int:
    """A 63-bit number that is the same for equal values, in every process and run."""
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:8], "big") >> 1
