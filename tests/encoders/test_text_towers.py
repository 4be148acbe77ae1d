"""Text tower configurations and tokenizers, run through open_clip's own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    MT5Config,
    RobertaConfig,
)

from encoders import variants
from encoders.causal_soft_moe import CausalSoftMoE
from encoders.clip_model import build_clip
from encoders.hugging_face_text import hugging_face_text_config
from encoders.lora import add_lora
from encoders.text_towers import (
    ROUTED_BLOCKS,
    build_tokenizer,
    open_clip_text_config,
    route_text_blocks,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "app", "##s"]
IMAGE = "soft_moe_vit_test_patch16_64"
VISION = {"timm_model_name": IMAGE, "image_size": variants.input_size(IMAGE)}


def dual_encoder(text_config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_clip({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text_config})


@pytest.mark.parametrize("routed", [(), (0,), (1,)])
def test_adapters_reach_the_text_tower(routed: tuple[int, ...]) -> None:
    model = dual_encoder(route_text_blocks(open_clip_text_config(16, 2, 2, 8), routed, 2)).eval()
    text = torch.tensor([[49406, 320, 49407, 0, 0, 0, 0, 0]])
    before = model.encode_text(text).detach()
    lora = add_lora(model, 2)
    assert torch.equal(model.encode_text(text), before)
    block = "text.transformer.resblocks."
    dense, experts = ("c_fc.weight", "c_proj.weight"), ("experts.fc1_weight", "experts.fc2_weight")
    assert {name for name in lora.places if name.startswith("text.")} == {
        *(f"{block}{index}.attn.out_proj.weight" for index in (0, 1)),
        *(f"{block}{i}.mlp.{name}" for i in (0, 1) for name in (experts if i in routed else dense)),
    }
    model.train().encode_text(text).sum().backward()
    for name, place in lora.places.items():
        grad = place.adapter.up.grad
        assert name.startswith("visual.") or (grad is not None and grad.any()), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random BERT with a WordPiece tokenizer, as `save_pretrained` leaves it."""
    (tmp_path / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    bert = tmp_path / "bert"
    BertTokenizerFast(vocab=str(tmp_path / "words.txt")).save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(bert)
    return bert


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build(text_config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return CustomTextCLIP(8, VISION, text_config, output_dict=True).eval()


def encode(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(torch.zeros(len(tokens), 3, 64, 64), tokens)["text_features"]


def test_open_clip_tower_reads_what_its_tokenizer_writes() -> None:
    config = open_clip_text_config(width=16, heads=2, layers=1, context_length=9)
    tokenizer = build_tokenizer(config)
    assert isinstance(tokenizer, SimpleTokenizer)
    tokens = tokenizer(["a red apple", "two apples"])
    assert tokens.shape == (2, 9)
    assert tokens.dtype == torch.int64
    model = build(config)
    assert model.text.context_length == 9
    assert model.text.token_embedding.weight.shape == (49408, 16)
    features = encode(model, tokens)
    assert features.shape == (2, 8)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert not torch.allclose(features[0], features[1], atol=1e-3)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_hugging_face_tower_loads_the_folder(folder: Path, projection: Any) -> None:
    config = hugging_face_text_config(folder, 7, projection)
    tokenizer = build_tokenizer(config)
    assert isinstance(tokenizer, HFTokenizer)
    tokens = tokenizer(["a red apple", "apples"])
    assert tokens.tolist() == [[2, 5, 6, 7, 3, 0, 0], [2, 7, 9, 3, 0, 0, 0]]
    model = build(config)
    saved = AutoModel.from_pretrained(folder).state_dict()
    for name, value in model.text.transformer.state_dict().items():
        assert torch.equal(value, saved[name])
    linears = [module for module in model.text.proj.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == {"linear": 1, "mlp": 2}[projection]
    # Padding is masked and mean pooling skips it: the length of the row does not matter.
    features = encode(model, tokens)
    torch.testing.assert_close(features[1:], encode(model, tokens[1:, :4]))


def test_the_description_holds_in_another_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(folder.parent)
    config = hugging_face_text_config(folder.name, 7)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert build_tokenizer(config)(["apple"]).shape == (1, 7)
    assert build(config).text.config.hidden_size == 16


def test_random_weights_need_no_weight_file(folder: Path) -> None:
    saved = AutoModel.from_pretrained(folder).embeddings.word_embeddings.weight
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        hugging_face_text_config(folder, 7)
    model = build(hugging_face_text_config(folder, 7, pretrained=False))
    drawn = model.text.transformer.embeddings.word_embeddings.weight
    assert drawn.shape == saved.shape
    assert not torch.equal(drawn, saved)


def test_folder_that_is_no_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        hugging_face_text_config(folder / "elsewhere", 7)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        hugging_face_text_config(folder, 7)
    edit_config(folder, model_type="distilbert")
    with pytest.raises(ValueError, match="'distilbert'; it takes bert, m2m_100"):
        hugging_face_text_config(folder, 7)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        hugging_face_text_config(folder, 7)


def test_context_must_fit_the_positions(folder: Path) -> None:
    assert hugging_face_text_config(folder, 12)["context_length"] == 12
    for length in (0, 13):
        with pytest.raises(ValueError, match="1 to 12"):
            hugging_face_text_config(folder, length)
    # RoBERTa starts counting behind its padding id.
    RobertaConfig(max_position_embeddings=12).save_pretrained(folder)
    with pytest.raises(ValueError, match="1 to 10"):
        hugging_face_text_config(folder, 11)
    # T5 has relative positions and no limit.
    MT5Config().save_pretrained(folder)
    assert hugging_face_text_config(folder, 2000)["context_length"] == 2000


def test_unknown_projection_is_refused(folder: Path) -> None:
    projection: Any = "none"
    with pytest.raises(ValueError, match="'linear' or 'mlp'"):
        hugging_face_text_config(folder, 7, projection)


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    config = hugging_face_text_config(folder, 7)
    edit_config(folder, pad_token_id=3)
    with pytest.raises(ValueError, match=r"pads with id 0, .* expects 3"):
        build_tokenizer(config)
    edit_config(folder, pad_token_id=0, vocab_size=9)
    with pytest.raises(ValueError, match=r"10 entries, .* 9 embeddings"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("change", "problem"), [({"heads": 3}, "16 is not divisible by 3"), ({"layers": 0}, "layers")]
)
def test_impossible_sizes_are_refused(change: dict[str, int], problem: str) -> None:
    sizes = {"width": 16, "heads": 2, "layers": 1, "context_length": 9} | change
    with pytest.raises(ValueError, match=problem):
        open_clip_text_config(**sizes)


ROUTED = {"width": 16, "heads": 2, "layers": 3, "context_length": 9}


def routed(blocks: int | list[int] = 1, **options: int) -> dict[str, Any]:
    return route_text_blocks(open_clip_text_config(**ROUTED), blocks, 3, **options)


def build_routed(text_config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text_config, "custom_text": True}
    return build_clip(model, output_dict=True).eval()


def test_routed_blocks_take_the_place_of_mlps() -> None:
    text = build_routed(routed([0, 2], slots_per_expert=2, block_size=4)).text
    layers = [block.mlp for block in text.transformer.resblocks]
    assert [isinstance(layer, CausalSoftMoE) for layer in layers] == [True, False, True]
    assert layers[0].phi.shape == (16, 3, 2)
    assert layers[0].block_size == 4
    assert text.transformer.get_cast_dtype() == torch.float32
    names = [name for name, _ in text.transformer.resblocks[0].named_children()]
    assert names == [name for name, _ in text.transformer.resblocks[1].named_children()]


def test_a_routed_block_starts_as_the_dense_one() -> None:
    """Equal experts make equal slots of equal positions, so one repeated token shows the MLP."""
    dense, routed_model = build(open_clip_text_config(**ROUTED)), build_routed(routed(3))
    x = torch.randn(2, 1, 16).expand(2, 9, 16)
    for ours, theirs in zip(
        routed_model.text.transformer.resblocks, dense.text.transformer.resblocks, strict=True
    ):
        # The rest of the difference is that of the two GELUs.
        torch.testing.assert_close(ours.mlp(x), theirs.mlp(x), rtol=0, atol=1e-3)
        assert theirs.mlp(x).abs().max() > 0.05
    assert torch.equal(routed_model.visual.trunk.pos_embed, dense.visual.trunk.pos_embed)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_later_token_leaves_earlier_hidden_states_alone(
    block_size: int, checkpointing: bool
) -> None:
    text = build_routed(routed(2, block_size=block_size)).text
    text.set_grad_checkpointing(checkpointing)
    tokens = torch.randint(1, 49000, (2, 9), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 5] += 1

    def hidden(ids: Tensor) -> list[Tensor]:
        return text.forward_intermediates(ids, output_fmt="NLC")["text_intermediates"]

    for before, after in zip(hidden(tokens), hidden(changed), strict=True):
        assert torch.equal(before[:, :5], after[:, :5])
        assert not torch.allclose(before[:, 5], after[:, 5])
    assert not torch.equal(encode_text(text, tokens), encode_text(text, changed))


def encode_text(text: nn.Module, tokens: Tensor) -> Tensor:
    return text(tokens).detach()


def test_without_routed_blocks_the_description_is_open_clips() -> None:
    plain = open_clip_text_config(**ROUTED)
    assert routed(0) == plain
    ours, theirs = build_routed(plain).state_dict(), build(plain).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def test_open_clip_refuses_routed_blocks() -> None:
    with pytest.raises(TypeError, match=ROUTED_BLOCKS):
        build(routed())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"blocks": 4}, "moe_blocks=4: choose 0 to 3"),
        ({"blocks": [3]}, r"\[3\] do not exist"),
        ({"slots_per_expert": 0}, "slots_per_expert must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_impossible_routed_blocks_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        routed(**options)


def test_a_hugging_face_tower_takes_no_routed_blocks(folder: Path) -> None:
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        route_text_blocks(hugging_face_text_config(folder, 7), 1, 3)
