"""Figures of shards against what was put in, and pictures of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from data_pipelines.contact_sheet import MARGIN, draw_contact_sheet
from data_pipelines.shard_plots import draw_stats, render_stats
from data_pipelines.shard_stats import measure
from data_pipelines.tool_config import ShowConfig, StatsConfig

MakeShard = Callable[..., Path]
CAPTIONS = ["A cat.\nthe CAT sat", "dog's $5 $dog", "cat " * 100]


@pytest.fixture
def shards(make_shard: MakeShard, encode: Callable[..., bytes]) -> Path:
    """Three good samples of 8 x 4, 16 x 16 and 40 x 10, and one without picture and captions."""
    sizes, formats = ((8, 4), (16, 16), (40, 10)), ("PNG", "JPEG", "WEBP")
    samples: list[tuple[str, dict[str, bytes]]] = [
        (
            f"s{number}",
            {
                formats[number].lower(): encode(
                    Image.new("RGB", sizes[number], (200, 30, 30)), formats[number]
                ),
                "txt": CAPTIONS[number].encode(),
                "cls": b"%d" % (number % 2),
            },
        )
        for number in range(3)
    ]
    samples.append(("bad", {"png": b"nothing", "txt": b" ", "cls": b"0"}))
    make_shard("s/1.tar", samples[2:])
    return make_shard("s/0.tar", samples[:2]).parent


@pytest.mark.parametrize("workers", [0, 2])
def test_figures(shards: Path, workers: int) -> None:
    stats = measure(StatsConfig(str(shards)), workers)
    figures = json.loads(json.dumps(stats.as_json(top=2, names=["even", "odd"])))
    assert (figures["shards"], figures["samples"], figures["looked_at"]) == (2, 4, 4)
    assert figures["unreadable"] == {"broken image": 1, "no caption": 1}
    assert figures["formats"] == {"PNG": 1, "JPEG": 1, "WEBP": 1}
    assert figures["top_words"] == [["cat", 102], ["5", 1]]
    assert figures["different_words"] == 7  # a, cat, the, sat, dog's, 5, dog
    assert figures["top_labels"] == [["0 even", 3], ["1 odd", 1]]
    assert sorted(stats.tally.widths) == [8, 16, 40]
    assert figures["distributions"]["width / height"]["max"] == 4
    assert figures["distributions"]["words per caption"]["max"] == 100
    assert list(stats.tally.captions) == [2, 1, 1]


def test_tokens_are_those_of_training(shards: Path) -> None:
    stats = measure(StatsConfig(str(shards)), 0)
    texts = [line for caption in CAPTIONS for line in caption.splitlines()]
    tokens = SimpleTokenizer(context_length=200)(texts)
    assert list(stats.tally.tokens) == (tokens != 0).sum(1).tolist()
    assert stats.over_context == 1  # 100 cats and two marks
    assert stats.tally.token_counts["cat</w>"] == 102


def test_tokens_of_a_hugging_face_tokenizer(shards: Path, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    stats = measure(StatsConfig(str(shards), tokenizer=str(tmp_path / "bert")), 0)
    assert stats.tally.token_counts["cat"] == 102
    assert stats.tally.tokens[-1] == 102  # with [CLS] and [SEP]


def test_some_samples_stand_for_all(shards: Path) -> None:
    stats = measure(StatsConfig(str(shards), samples=2, tokenizer=None), 0)
    assert (stats.samples, stats.tally.samples) == (4, 2)
    assert sorted(stats.tally.widths) == [8, 40]


def test_figure_has_a_panel_for_all_there_is(shards: Path) -> None:
    figure = draw_stats(measure(StatsConfig(str(shards)), 0), top=5)
    assert len(figure.axes) == 9
    assert figure.axes[0].get_title() == "3 sizes of 3 pictures"
    without_tokens = draw_stats(measure(StatsConfig(str(shards), tokenizer=None), 0), top=5)
    assert len(without_tokens.axes) == 7
    # Draws words with a $, which must not be taken for formulas.
    picture = render_stats(measure(StatsConfig(str(shards)), 0), top=5)
    assert np.asarray(Image.open(io.BytesIO(picture))).std() > 10


def pixel(sheet: Image.Image, column: int, size: int, settings: ShowConfig) -> tuple[int, ...]:
    """The middle of the lowest picture row of a tile."""
    left = MARGIN + column * (settings.size + MARGIN)
    colour: Any = sheet.getpixel((left + size // 2, 16 + 2 * MARGIN + settings.size - 2))
    return colour


def test_contact_sheet_shows_pictures_and_says_what_is_missing(shards: Path) -> None:
    settings = ShowConfig(str(shards), count=4, columns=4, size=64)
    sheet, count = draw_contact_sheet(settings)
    assert count == 4
    assert sheet.width == 4 * 72 + MARGIN
    for column in range(3):
        red, green, blue = pixel(sheet, column, 64, settings)
        assert (abs(red - 200) < 6, abs(green - 30) < 6, abs(blue - 30) < 6) == (True,) * 3
    assert pixel(sheet, 3, 64, settings) == (224, 224, 224)
    below = np.asarray(sheet.convert("L"))[16 + 2 * MARGIN + 64 :]
    for column in range(4):  # words beneath each
        assert below[:, MARGIN + column * 72 :][:, :64].min() < 128


def test_contact_sheet_draws_by_seed(shards: Path) -> None:
    sheets = [
        np.asarray(draw_contact_sheet(ShowConfig(str(shards), count=2, seed=seed))[0])
        for seed in (1, 1, 2, 3, 4)
    ]
    assert np.array_equal(sheets[0], sheets[1])
    assert any(not np.array_equal(sheets[0], sheet) for sheet in sheets[2:])


def test_no_random_numbers_of_training_are_used(shards: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    measure(StatsConfig(str(shards)), 0)
    assert torch.rand(1) == expected
