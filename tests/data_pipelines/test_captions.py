"""Which caption is drawn, and what tokenizers make of long ones."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_pipelines.captions import draw_weighted
from data_pipelines.config import ImageTextConfig
from data_pipelines.image_text import image_text_stream

Picture = Callable[[int], bytes]
Tokenize = Callable[[list[str]], Tensor]
LENGTH = 8
WORDS = ["a", "photo", "of", "bird", "on", "grass"]
LONG = "a photo of a bird on grass " * 20


@pytest.fixture
def shards(make_shard: Any, picture: Picture) -> str:
    """Ten samples with one line of text and four captions in json; the last has text alone."""
    samples = []
    for number in range(10):
        record = {"made": [f"made {letter}" for letter in "abcd"]} if number < 9 else {}
        text = {"txt": b"written", "json": json.dumps(record).encode()}
        samples.append((f"k{number}", {"png": picture(number)} | text))
    return str(make_shard("x.tar", samples))


def drawn(
    shards: str, tokenize: Tokenize, steps: int, start: int = 0, **settings: Any
) -> list[str]:
    config = ImageTextConfig(shards=shards, caption_key="txt::json:made", **settings)
    stream = image_text_stream(config, image_size=4, tokenize=tokenize, seed=1, global_batch=10)
    rows = [row for b in itertools.islice(stream.batches(start), steps) for row in b["text"]]
    return ["".join(map(chr, row)).rstrip("\0") for row in torch.stack(rows).tolist()]


def test_weights_are_of_fields(shards: str, tokenize: Tokenize) -> None:
    alike = Counter(drawn(shards, tokenize, 60))
    assert set(alike) == {"written", *(f"made {letter}" for letter in "abcd")}
    assert 0.2 < alike["written"] / 600 < 0.36  # 0.28: a fifth of nine tenths, and a tenth
    captions = drawn(shards, tokenize, 60, caption_weights=[3.0, 1.0])
    counts = Counter(captions)
    assert 0.7 < counts["written"] / 600 < 0.85  # 0.775
    assert all(counts[f"made {letter}"] > 15 for letter in "abcd")
    # A function of (seed, visit): going on in the middle draws the same.
    assert drawn(shards, tokenize, 3, start=57, caption_weights=[3.0, 1.0]) == captions[-30:]


def test_absent_fields_leave_their_weight_to_others() -> None:
    assert draw_weighted([["a"], [], []], [1e-9, 5.0, 5.0]) == "a"
    counts = Counter(draw_weighted([["a"], [], ["b"]], [1.0, 100.0, 3.0]) for _ in range(400))
    assert 250 < counts["b"] < 350
    assert counts["a"] + counts["b"] == 400


def test_weights_that_do_not_fit(shards: str, tokenize: Tokenize) -> None:
    with pytest.raises(ValueError, match=r"caption_weights has 1 entries, but .* has 2 fields"):
        drawn(shards, tokenize, 1, caption_weights=[1.0])
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="choose numbers above 0"):
            drawn(shards, tokenize, 1, caption_weights=[1.0, bad])


def hugging_face(folder: Path, template: str) -> HFTokenizer:
    """A word tokenizer of transformers with end tokens as in a template, through open_clip."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in special[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return HFTokenizer(str(folder), context_length=LENGTH, local_files_only=True)


@pytest.mark.parametrize("kind", ["open_clip", "bert", "t5"])
def test_long_captions_are_cut_and_keep_their_end(kind: str, tmp_path: Path) -> None:
    if kind == "open_clip":
        tokenizer: Any = SimpleTokenizer(context_length=LENGTH)
        end = tokenizer.eot_token_id
    else:
        template = "[CLS] $A [SEP]" if kind == "bert" else "$A [SEP]"
        tokenizer, end = hugging_face(tmp_path, template), 3
    short, long = tokenizer(["a bird", LONG])
    assert (long.shape, long.dtype) == ((LENGTH,), torch.int64)
    assert long[-1] == end
    assert (long == end).sum() == (short == end).sum() == 1
    whole = tokenizer(["a photo of a bird on grass"])[0]
    assert torch.equal(long[:-1], whole[:-1])  # what is kept is the beginning
    assert short[-1] == 0 != long[-2]
