"""Reading captions and labels out of the members of a sample."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shard_reader import Bytes, ShardReader
from data_pipelines.shards import FieldError

MAX_BYTES = 1 << 20  # tokenizers and parsers would take seconds and much memory for more
JOINT = "::"  # between the fields of a caption key
_SURROGATES = re.compile("[\ud800-\udfff]")


def member_of(key: str) -> str:
    """Extension of the member that `key` reads: 'txt' for 'txt', 'json' for 'json:caption'."""
    return key.partition(":")[0]


def members_of(key: str) -> list[str]:
    """Extensions of the members that `read_captions` reads."""
    return [member_of(part) for part in key.split(JOINT)]


def read_field(reader: ShardReader, sample: int, key: str) -> object:
    """What `key` names in a sample; see `parse_field`.

    Raises:
        FieldError: the member or the field is missing, cannot be parsed, or is over MAX_BYTES.
    """
    return parse_field(key, reader.read(sample, member_of(key), MAX_BYTES))


def parse_field(key: str, data: Bytes | None) -> object:
    """Text of a member, one field of a JSON member for keys such as 'json:caption', or the array
    of an `npy` member.

    Halves of surrogate pairs, which JSON can escape alone but no encoder takes, become U+FFFD.

    Raises:
        FieldError: the member or the field is missing or cannot be parsed.
    """
    member, _, field = key.partition(":")
    if data is None:
        raise FieldError(f"no {member} member")
    if member == "npy":
        return _array(data)
    text = data.decode("utf-8-sig", errors="replace")
    if not field:
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"broken {member} member") from error
    if not isinstance(record, dict) or record.get(field) is None:
        raise FieldError(f"no field '{field}' in {member}")
    value = record[field]
    return [_encodable(entry) for entry in value] if isinstance(value, list) else _encodable(value)


def _array(data: Bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises nearly anything on broken files
        raise FieldError("broken npy member") from error


def _encodable(value: object) -> object:
    return _SURROGATES.sub("\ufffd", value) if isinstance(value, str) else value


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


def read_captions(reader: ShardReader, sample: int, key: str) -> list[str]:
    """The captions of a sample's field, or of several that `key` joins by `::`, in that order.

    Raises:
        FieldError: none of the fields has one; it says why the first has not.
    """
    return [entry for field in captions_by_field(reader, sample, key) for entry in field]


def captions_by_field(reader: ShardReader, sample: int, key: str) -> list[list[str]]:
    """The captions of each field that `key` joins by `::`; empty where a field has none.

    Raises:
        FieldError: none of the fields has one; it says why the first has not.
    """
    captions: list[list[str]] = []
    problems: list[FieldError] = []
    for part in key.split(JOINT):
        try:
            captions.append(captions_of(read_field(reader, sample, part)))
        except FieldError as error:
            captions.append([])
            problems.append(error)
    if not any(captions):
        raise problems[0]
    return captions


def check_weights(weights: Sequence[float], key: str) -> None:
    """Raise ValueError unless there is a weight above 0 for each field of a caption key."""
    fields = key.split(JOINT)
    if len(weights) != len(fields):
        raise ValueError(
            f"data.caption_weights has {len(weights)} entries, but data.caption_key '{key}' has"
            f" {len(fields)} fields: give one weight for each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"data.caption_weights {list(weights)}: choose numbers above 0, and leave fields that"
            " should not be drawn out of data.caption_key"
        )


def draw_weighted(fields: list[list[str]], weights: Sequence[float]) -> str:
    """A field that has captions, with probability in proportion to its weight, and one of its
    captions; from torch's default generator, and with no randomness where there is no choice."""
    present = [(field, weight) for field, weight in zip(fields, weights, strict=True) if field]
    if len(present) == 1:
        return draw_caption(present[0][0])
    ends = torch.tensor([weight for _, weight in present], dtype=torch.float64).cumsum(0)
    place = torch.rand((), dtype=torch.float64) * ends[-1]
    number = min(int(torch.searchsorted(ends, place, right=True)), len(present) - 1)
    return draw_caption(present[number][0])


def draw_number(count: int) -> int:
    """A number below `count`, from torch's default generator; of one, no randomness is used."""
    return int(torch.randint(count, ())) if count > 1 else 0


def draw_caption(captions: list[str]) -> str:
    """One of the captions, by `draw_number`."""
    return captions[draw_number(len(captions))]


def integer_of(value: object) -> int:
    """A label of any size.

    Raises:
        FieldError: not an integer.
    """
    try:
        return int(str(value).strip())
    except ValueError as error:
        raise FieldError("label is no integer") from error


def label_of(value: object, num_classes: int) -> int:
    """An integer label in [0, num_classes).

    Raises:
        FieldError: not an integer, or out of range.
    """
    label = integer_of(value)
    if not 0 <= label < num_classes:
        raise FieldError(f"label outside 0..{num_classes - 1}")
    return label


def vector_of(value: object, num_classes: int) -> Tensor:
    """A number in [0, 1] for each class, float32 (num_classes,): several may be 1, or shares.

    Takes lists, arrays, and text of numbers with spaces or commas between them.

    Raises:
        FieldError: something else, another length, or a number out of range.
    """
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    try:
        vector = torch.from_numpy(np.asarray(value, np.float32).reshape(-1).copy())
    except (TypeError, ValueError) as error:
        raise FieldError("label is no vector of numbers") from error
    if len(vector) != num_classes:
        raise FieldError(f"label of other than {num_classes} numbers")
    if not ((vector >= 0) & (vector <= 1)).all():  # NaN is neither
        raise FieldError("label with a number outside 0..1")
    return vector


def class_indices_of(value: object, num_classes: int) -> Tensor:
    """The classes that a list names, as ones in a float32 (num_classes,).

    An empty list is none.

    Raises:
        FieldError: something else, or a class out of range.
    """
    if not isinstance(value, list):
        raise FieldError("label is no list")
    vector = torch.zeros(num_classes)
    for entry in value:
        vector[label_of(entry, num_classes)] = 1
    return vector


def group_of(value: object) -> int:
    """A 63-bit number that is the same for equal values, in every process and run."""
    return (
        int.from_bytes(
            hashlib.sha256(str(value).encode("utf-8", "surrogatepass")).digest()[:8], "big"
        )
        >> 1
    )
