"""Hugging Face text towers by family: padding, pooling, the hub's cache, files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
)

from encoders.clip_model import build_clip
from encoders.hugging_face_text import (
    LastTokenPooler,
    checkpoint_files,
    hugging_face_text_config,
    read_pretrained_text,
    text_model_folder,
)
from encoders.text_towers import build_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "apple", "##s"]
TEXTS = ["a red apple", "apple", "a green apples apple"]
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
VISION = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}


def save_bert(folder: Path) -> Any:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **SIZES)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return tokenizer


def save_roberta(folder: Path) -> Any:
    folder.mkdir(parents=True)
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(TEXTS, vocab_size=300, special_tokens=special)
    trained.save_model(str(folder))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    pairs: Any = [tuple(line.split()) for line in merges]
    tokenizer = RobertaTokenizerFast(vocab=trained.get_vocab(), merges=pairs)
    tokenizer.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=14, pad_token_id=1, **SIZES
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return tokenizer


def save_minilm(folder: Path) -> Any:
    """As sentence-transformers publishes MiniLM: its tokenizer pads and cuts by itself, and its
    weights are a BERT's with a pooler and with the positions that old versions wrote."""
    tokenizer = save_bert(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(12).unsqueeze(0)
    weights["pooler.dense.weight"] = torch.zeros(16, 16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return tokenizer


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "bert": save_bert,
    "roberta": save_roberta,
    "minilm": save_minilm,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text") / request.param
    FAMILIES[request.param](folder)
    return folder


def build(text: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_clip({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text}).eval()


@torch.no_grad()
def encode(model: Any, tokens: Tensor) -> Tensor:
    return model.encode_text(tokens)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_does_not_count(folder: Path, pooling: Any) -> None:
    """Features of padded rows are those of transformers on each text alone, without padding."""
    config = hugging_face_text_config(folder, 12, pooling=pooling)
    tokenizer, model = build_tokenizer(config), build(config)
    reference: Any = AutoModel.from_pretrained(folder).eval()
    padding, tokens = reference.config.pad_token_id, tokenizer(TEXTS)
    assert tokens.shape == (3, 12)
    lengths = (tokens != padding).sum(1).tolist()
    assert len(set(lengths)) == 3
    found = encode(model, tokens)
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, :length]
        with torch.no_grad():
            hidden = reference(input_ids=alone, attention_mask=torch.ones_like(alone))[0][0]
            pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            expected = model.text.proj(pooled)
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encode(model, alone)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_long_caption_is_cut_before_its_end_token(folder: Path) -> None:
    tokenizer = build_tokenizer(hugging_face_text_config(folder, 6))
    tokens, whole = tokenizer(["a red apple a red apple"])[0], tokenizer(["apple"])[0]
    last: Any = tokenizer.tokenizer
    assert tokens.shape == (6,)
    assert tokens[-1] == last.sep_token_id
    assert last.sep_token_id in whole[:5]


def test_the_last_token_is_the_last_that_counts() -> None:
    class Output:
        last_hidden_state = torch.arange(24.0).view(3, 4, 2)

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    found = LastTokenPooler()(Output(), mask)
    assert found.tolist() == [[2, 3], [14, 15], [16, 17]]


def test_the_weights_are_the_folders(folder: Path) -> None:
    tensors, left_out = read_pretrained_text(folder)
    saved = load_file(folder / "model.safetensors")
    for name in ("embeddings.position_ids", "pooler.dense.weight"):
        saved.pop(name, None)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in tensors.items())
    assert left_out == (["pooler.dense.weight"] if folder.name == "minilm" else [])


def test_a_checkpoint_carries_config_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    config = hugging_face_text_config(folder, 12, pooling="cls")
    tokenizer, model = build_tokenizer(config), build(config)
    for name, content in checkpoint_files(config, tokenizer).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    own = config | {
        "hf_model_name": str(tmp_path / "text"),
        "hf_tokenizer_name": str(tmp_path),
        "hf_model_pretrained": False,
    }
    assert torch.equal(build_tokenizer(own)(TEXTS), tokenizer(TEXTS))
    again = build(own)
    again.load_state_dict(model.state_dict())
    assert torch.equal(encode(again, tokenizer(TEXTS)), encode(model, tokenizer(TEXTS)))
    assert str(folder) not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_a_model_published_in_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    half: Any = AutoModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
    half.half().save_pretrained(tmp_path / "bert")
    config = hugging_face_text_config(tmp_path / "bert", 8)
    for pretrained in (False, True):
        model = build(config | {"hf_model_pretrained": pretrained})
        assert {p.dtype for p in model.text.parameters()} == {torch.float32}
    files = checkpoint_files(config, build_tokenizer(config))
    assert files["text/config.json"]["dtype"] == "float32"


def test_a_name_is_looked_up_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    cached = tmp_path / f"models--{name.replace('/', '--')}"
    save_minilm(cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    config = hugging_face_text_config(name, 8)
    assert config["hf_model_name"] == config["hf_tokenizer_name"] == name
    assert text_model_folder(name) == cached / "snapshots" / "0123abcd"
    model, tokens = build(config), build_tokenizer(config)(TEXTS)
    assert encode(model, tokens).shape == (3, 8)
    assert "text/config.json" in checkpoint_files(config, build_tokenizer(config))
    with pytest.raises(ValueError, match="'someone/none' is no folder here, nor could it be had"):
        hugging_face_text_config("someone/none", 8)
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    save_bert(tmp_path / "someone" / "bert")
    assert text_model_folder("someone/bert") == Path("someone/bert")


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=r"pads on the left.*set padding_side"):
        build_tokenizer(hugging_face_text_config(tmp_path / "bert", 8))


def test_unknown_pooling_is_refused(tmp_path: Path) -> None:
    pooling: Any = "max"
    with pytest.raises(ValueError, match="pooling 'max': choose mean, cls, last"):
        hugging_face_text_config(tmp_path, 8, pooling=pooling)
