"""The bag of words: what it reads, what it ignores, and how it is described."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from encoders.bag_of_words import BagOfWords
from encoders.clip_model import build_clip, opens_in_open_clip, vision_config
from encoders.text_towers import bag_of_words_config, build_tokenizer


@pytest.fixture
def tower() -> BagOfWords:
    torch.manual_seed(0)
    return BagOfWords(vocab_size=49408, width=16, embed_dim=8, context_length=9)


def test_it_is_the_mean_of_the_pieces(tower: BagOfWords) -> None:
    tokens = SimpleTokenizer(context_length=9)(["red apple"])
    pieces = tokens[0, 1 : int(tokens[0].argmax())]
    mean = tower.token_embedding.weight[pieces].mean(0)
    assert len(pieces) == 2
    expected = tower.ln_final(mean) @ tower.text_projection
    torch.testing.assert_close(tower(tokens)[0], expected)


def test_order_padding_and_marks_do_not_matter_but_words_do(tower: BagOfWords) -> None:
    texts = ["red apple", "apple red", "red apples", "red apple red apple"]
    rows = tower(SimpleTokenizer(context_length=9)(texts))
    torch.testing.assert_close(rows[0], rows[1])
    torch.testing.assert_close(rows[0], rows[3])
    assert not torch.allclose(rows[0], rows[2])
    longer = tower(SimpleTokenizer(context_length=30)(texts))
    torch.testing.assert_close(rows, longer)


def test_no_words_and_a_cut_caption_are_finite(tower: BagOfWords) -> None:
    rows = tower(SimpleTokenizer(context_length=9)(["", "a " * 50]))
    rows.sum().backward()
    assert rows.isfinite().all()
    gradient = tower.token_embedding.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", ["vocab_size", "width", "embed_dim", "context_length"])
def test_sizes_are_checked(size: str) -> None:
    sizes = {"vocab_size": 4, "width": 4, "embed_dim": 4, "context_length": 4}
    with pytest.raises(ValueError, match=f"{size} must be at least 1, got 0"):
        BagOfWords(**sizes | {size: 0})


def test_a_description_builds_it_beside_a_picture_tower_with_two_layers_on_top() -> None:
    for arguments in ({}, {"img_size": 32}):
        vision = vision_config("soft_moe_vit_test_patch16_64", arguments, projection="mlp")
        config = {
            "embed_dim": 8,
            "vision_cfg": vision,
            "text_cfg": bag_of_words_config(16, 9),
            "custom_text": True,
        }
        assert not opens_in_open_clip(config)
        model: Any = build_clip(config)
        assert isinstance(model.text, BagOfWords)
        assert model.visual.head.mlp.fc1.out_features == 16
        assert model.visual.head.mlp.fc2.bias is None
        size = model.visual.image_size[0]
        features = model(
            torch.rand(2, 3, size, size), build_tokenizer(config["text_cfg"])(["a"] * 2)
        )
        assert [f.shape for f in features[:2]] == [(2, 8), (2, 8)]
