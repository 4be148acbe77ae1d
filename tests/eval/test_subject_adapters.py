"""Models of other libraries: their own embeddings, their own tokens, every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from eval.subject import open_subject
from tests.tiny_models import write_dual_encoder

WORDS = ["<pad>", "<end>", "[UNK]", "a", "red", "green", "square", "circle"]
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
TEXTS = ["a red square", "green", "a circle a square a red green circle square a red red red"]


def save_inputs(folder: Path, processor: Any, length: int) -> None:
    processor.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="[UNK]",
        model_max_length=length,
    ).save_pretrained(folder)  # fmt: skip


def siglip(folder: Path) -> None:
    text = TOWER | {"vocab_size": len(WORDS), "max_position_embeddings": 9, "projection_size": 16}
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    transformers.SiglipModel(config).save_pretrained(folder)
    processor = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    save_inputs(folder, processor, 9)


def dual_encoder(folder: Path) -> None:
    vision = transformers.ViTConfig(**TOWER, image_size=16, patch_size=8)
    text = transformers.BertConfig(**TOWER, vocab_size=len(WORDS), max_position_embeddings=20)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=8
    )
    transformers.VisionTextDualEncoderModel(config).save_pretrained(folder)
    save_inputs(folder, transformers.ViTImageProcessor(size={"height": 16, "width": 16}), 20)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("make", "length"), [(siglip, 9), (dual_encoder, 20)])
def test_embeddings_are_those_of_the_whole_model(make: Any, length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)) for _ in range(3)]
    subject = open_subject(str(tmp_path))
    assert subject.encode_image is not None
    assert subject.encode_text is not None
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    images = subject.encode_image(torch.stack([subject.transform(image) for image in pixels]))
    texts = subject.encode_text(TEXTS)

    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padding = "max_length" if make is siglip else True
    tokens = tokenizer(
        TEXTS, padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    if make is siglip:
        assert tokens["input_ids"].shape == (3, 9)
    with torch.inference_mode():
        whole = model(
            pixel_values=processor(pictures, return_tensors="pt")["pixel_values"], **tokens
        )
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(images), unit(whole.image_embeds), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit(texts), unit(whole.text_embeds), rtol=1e-4, atol=1e-5)
    # Texts of another length in the batch change nothing.
    torch.testing.assert_close(subject.encode_text(TEXTS[1:2]), texts[1:2], rtol=1e-4, atol=1e-5)
    features = subject.features(torch.stack([subject.transform(image) for image in pixels]))
    assert features.shape == (3, 16)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_is_near_and_not_the_same(precision: str, tmp_path: Path) -> None:
    run = str(write_dual_encoder(tmp_path / "run"))
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8)
    full, low = open_subject(run), open_subject(run, precision=precision)
    assert full.encode_image is not None
    assert low.encode_image is not None
    assert full.encode_text is not None
    assert low.encode_text is not None
    pairs = [
        (full.encode_image(images), low.encode_image(images)),
        (full.features(images), low.features(images)),
        (full.encode_text(TEXTS), low.encode_text(TEXTS)),
    ]
    for one, two in pairs:
        assert two.dtype == torch.float32
        assert not torch.equal(one, two)
        assert torch.nn.functional.cosine_similarity(one, two).min() > 0.99
    assert low.identity.fingerprint == full.identity.fingerprint  # precision is a part of its own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:nobody/nothing", "cannot be opened"),
        ("transformers:nobody/nothing", "transformers cannot open 'nobody/nothing'"),
        ("ViT-B-33", "no model of open_clip; did you mean ViT-B-32"),
        ("ViT-B/32", "needs weights: set --pretrained to one of .*openai"),
        ("tests/nowhere", "model 'tests/nowhere' does not exist"),
    ],
)
def test_names_that_cannot_be_opened_are_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_subject(name)
    assert "\n" not in str(error.value).strip()


def test_a_checkpoint_that_has_been_removed_names_the_others(tmp_path: Path) -> None:
    for step in ("step_00000042", "step_00000060"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoints' holds step_00000042, step_00000060$"):
        open_subject(str(tmp_path / "checkpoints" / "step_00000020"))


def test_a_precision_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="precision 'int4' is unknown: choose fp32, bf16, fp16"):
        open_subject("ViT-B-32", precision="int4")
